"""How long many items take on workers of which some are slow and all die at times: a simulation.

    python -m spatial_mamba_d2.profiling.bulk_simulation --items 100000 --workers 64

Workers predict shards, as ``tools/predict.py --shard I/N`` does, and leave a part for each item.
One that dies is started again after a while, and continues after its last part. What
the rules of the shards cost is measured against workers that lose nothing: the sum of their speeds
would take the ideal time. Nothing is predicted; the times of items are random.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from spatial_mamba_d2.system.cli import build_parser, run_tool
from spatial_mamba_d2.system.tables import console_table

SLOWNESS = 4.0  # of a slow worker
_SPREAD = 0.5  # standard deviation of the logarithm of an item's time


@dataclass(frozen=True)
class Setting:
    """What happens to a run.

    Attributes:
        item_s: mean time of an item on a worker that is not slow.
        slow_share: of the workers, which take :data:`SLOWNESS` times as long.
        deaths_per_hour: of each worker, on average.
        restart_s: from a death, or the end of a shard, to the first item of the next start: the
            queue of the cluster, and loading the model.
        batch: items of which the parts are written together.
    """

    num_items: int = 100_000
    num_workers: int = 64
    item_s: float = 1.0
    slow_share: float = 0.05
    deaths_per_hour: float = 0.5
    restart_s: float = 120.0
    batch: int = 1
    seed: int = 0


@dataclass
class Outcome:
    """What it took.

    Attributes:
        hours: from the first start to the last part.
        efficiency: ideal time, of workers that neither wait nor die, over that time.
        num_deaths: of workers.
        num_repeated: items that were begun again after a death.
        times_done: how often each item got its part, ``int64[num_items]``.
    """

    hours: float
    efficiency: float
    num_deaths: int = 0
    num_repeated: int = 0
    times_done: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def simulate(setting: Setting, num_shards: int) -> Outcome:
    """Run ``num_shards`` shards, item ``i`` in shard ``i % num_shards``, on the workers.

    Free workers take the next shard; a shard whose worker has died stays with it.
    """
    rng = np.random.default_rng(setting.seed)
    item_s = rng.lognormal(-(_SPREAD**2) / 2, _SPREAD, setting.num_items) * setting.item_s
    num_slow = round(setting.slow_share * setting.num_workers)
    slowness = np.ones(setting.num_workers)
    slowness[:num_slow] = SLOWNESS
    rng.shuffle(slowness)
    ideal_s = item_s.sum() / (1 / slowness).sum()
    outcome = Outcome(0.0, 0.0, times_done=np.zeros(setting.num_items, np.int64))
    free = [(setting.restart_s, worker) for worker in range(setting.num_workers)]
    heapq.heapify(free)
    end_s = 0.0
    for shard in range(num_shards):
        now, worker = heapq.heappop(free)
        items = np.arange(shard, setting.num_items, num_shards)
        now = _run_shard(now, items, item_s[items] * slowness[worker], setting, rng, outcome)
        end_s = max(end_s, now)
        heapq.heappush(free, (now + setting.restart_s, worker))
    outcome.hours = end_s / 3600
    outcome.efficiency = ideal_s / end_s
    return outcome


def _run_shard(
    now: float,
    items: np.ndarray,
    seconds: np.ndarray,
    setting: Setting,
    rng: np.random.Generator,
    outcome: Outcome,
) -> float:
    """When the last item of a shard, which starts at ``now``, has its part."""
    position = 0
    while position < len(items):
        life_s = np.inf
        if setting.deaths_per_hour:
            life_s = rng.exponential(3600 / setting.deaths_per_hour)
        ends = np.cumsum(seconds[position:])
        # The parts of a batch appear at its end.
        last_of_batch = np.minimum(
            np.arange(len(ends)) // setting.batch * setting.batch + setting.batch, len(ends)
        )
        num_done = int(np.searchsorted(ends[last_of_batch - 1], life_s, side="right"))
        outcome.times_done[items[position : position + num_done]] += 1
        position += num_done
        if position == len(items):
            return now + float(ends[-1])
        outcome.num_deaths += 1
        outcome.num_repeated += int(np.searchsorted(ends, life_s, side="right")) - num_done + 1
        now += life_s + setting.restart_s
    return now


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--item-seconds", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args()
    rows = []
    for title, slow_share, deaths in (
        ("no failures", 0.0, 0.0),
        ("5 % slow", 0.05, 0.0),
        ("0.5 deaths/h", 0.0, 0.5),
        ("both", 0.05, 0.5),
        ("both, 6 deaths/h", 0.05, 6.0),
    ):
        for factor in (1, 4, 16, 64):
            setting = Setting(
                args.items, args.workers, args.item_seconds, slow_share, deaths,
                batch=args.batch_size,
            )  # fmt: skip
            outcome = simulate(setting, factor * args.workers)
            if not (outcome.times_done == 1).all():
                raise AssertionError("an item has no part, or two")
            rows.append(
                (
                    title,
                    str(factor),
                    f"{outcome.hours:.2f}",
                    f"{outcome.efficiency:.0%}",
                    str(outcome.num_deaths),
                    str(outcome.num_repeated),
                )
            )
    columns = ("what happens", "shards per worker", "hours", "efficiency", "deaths", "repeated")
    print(console_table(columns, rows))


if __name__ == "__main__":
    run_tool(main)
