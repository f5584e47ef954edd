"""How many threads process a token in the kernels that normalize it: see ``team.cuh``."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from spatial_mamba_d2.ops.cuda.arguments import LANES, blocks_of
from spatial_mamba_d2.ops.cuda.channels import channels_of_thread
from spatial_mamba_d2.ops.cuda.source import constants

# Of kernels whose blocks write partial sums. Not tuned on a GPU.
WARPS_PER_MULTIPROCESSOR = 32
MIN_TOKENS_PER_TEAM = 8


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

    def shared_bytes_with_sums(self, count: int, acc: torch.dtype) -> int:
        """Of a block that ends with sums of ``count`` values of each thread over its teams."""
        of_sums = self.block_warps * count * LANES * acc.itemsize
        return max(self.shared_bytes, of_sums if self.teams > 1 else 0)

    def backward_blocks(self, tokens: int, multiprocessors: int) -> int:
        """Number of blocks, each of which writes partial sums."""
        most = blocks_of(multiprocessors * WARPS_PER_MULTIPROCESSOR, self.block_warps)
        return min(most, blocks_of(tokens, self.teams * MIN_TOKENS_PER_TEAM))
