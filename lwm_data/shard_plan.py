"""Which rows go in which shard: from the plan of examples, by the manifest's seed, shares and groups.

examples -> order (mix.py) -> rows (pack.py) -> shards of so many rows, as a stream
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from lwm_data.example_plan import ExamplePlan
from lwm_data.manifest import DatasetManifest
from lwm_data.mix import mixed_order
from lwm_data.pack import ALONE, Cut, pack
from lwm_data.shard_rows import ShardRows


def packing_order(manifest: DatasetManifest, plan: ExamplePlan) -> Int64[np.ndarray, " m"]:
    """The examples of `plan`, by number, in the order to pack them; those that no share asks for are not in it."""
    shares = [source.share for source in manifest.sources]
    return mixed_order(plan.sources, plan.lengths, shares, manifest.share_by, manifest.seed)


def plan_shards(
    manifest: DatasetManifest, plan: ExamplePlan, order: np.ndarray, rows_per_shard: int
) -> Iterator[ShardRows]:
    """The shards in turn, each of `rows_per_shard` rows but the last; `order` as `packing_order` gives it."""
    sources = manifest.sources
    group_of = {"any": len(sources), "none": ALONE}
    groups = np.array([group_of.get(source.pack_with, i) for i, source in enumerate(sources)], np.int32)
    rows = pack(plan.lengths[order], groups[plan.sources[order]], manifest.row_length, manifest.packing)
    held: list[list[Cut]] = []
    number = 0
    for row in rows:
        held.append(row)
        if len(held) == rows_per_shard:
            yield _shard(number, held, plan, order)
            held, number = [], number + 1
    if held:
        yield _shard(number, held, plan, order)


def _shard(number: int, rows: list[list[Cut]], plan: ExamplePlan, order: np.ndarray) -> ShardRows:
    cuts = np.array([cut for row in rows for cut in row], np.int64)
    examples = order[cuts[:, 0]]
    columns = [plan.units[examples], plan.records[examples], plan.parts[examples], cuts[:, 1], cuts[:, 2]]
    row_starts = np.cumsum([0, *map(len, rows)])
    return ShardRows(f"shard-{number:06d}.tar", np.stack(columns, axis=1).astype(np.int64), row_starts)
