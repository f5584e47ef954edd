"""How many threads process a token in the kernels that normalize it: see ``team.cuh``."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from spatial_mamba_d2.ops.cuda.arguments import LANES, blocks_of
from spatial_mamba_d2.ops.cuda.channels import channels_of_thread
from spatial_mamba_d2.ops.cuda.source import constants


class Team(NamedTuple):
    """The threads of a token, and of a block of them."""

    warps: int  # of a team
    teams: int  # of a block
    shared_bytes: int

    @property
    def block_warps(self) -> int:
        return self.warps * self.teams

    @classmethod
    @lru_cache(None)
    def of(cls, dim: int, acc: torch.dtype, count: int | None = None) -> Team:
        """For tokens of ``dim`` channels and sums in ``acc``.

        Args:
            count: channels of a thread, by default ``kPack``.
        """
        found = constants("cuda/team.cuh")
        warps = blocks_of(dim, LANES * (count or channels_of_thread(acc)))
        if warps == 1:
            return cls(1, found["kTeamWarps"], 0)
        return cls(warps, 1, 2 * found["kTeamSums"] * warps * acc.itemsize)
