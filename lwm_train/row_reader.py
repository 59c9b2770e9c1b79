"""This process's part of a batch: only its rows, and of each only the tokens that its devices hold.

    a row of 8 chunks, sp = 4 processes, zigzag      0 7 | 1 6 | 2 5 | 3 4      places in ring order
    process 1 reads                                    . [1] . . . . [6] .      two stretches, each with one token more

The token more is the target of a stretch's last one. `dealt` and `striped` scatter a process's tokens over the row,
so there it is read whole, and so it is for `auto`, which must know all the segments to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from lwm_data.format.dataset import Dataset
from lwm_data.format.packed import row_of
from lwm_train.attention.order import token_order
from lwm_train.batch import Batch, make_batch
from lwm_train.mesh import sharding

TILE = 128  # tokens that stay together when a row is dealt over the ring
MAX_STRETCHES = 4  # more reads than this cost more than the bytes between them

Places = np.ndarray  # int64, ascending
Stretch = tuple[int, int]


@dataclass(frozen=True)
class RowAddress:
    """A row of one of the datasets."""

    dataset: int
    row: int


@dataclass(frozen=True)
class Part:
    """rows: places in the batch. tokens: places in the ring's order of a row. Both ascend."""

    rows: Places
    tokens: Places


def part_of_process(mesh: Mesh, batch_rows: int, length: int) -> Part:
    """What the devices of this process hold of a batch [batch_rows, length]."""
    of_devices = sharding(mesh, "batch", "length").addressable_devices_indices_map((batch_rows, length))
    indices = [index for index in of_devices.values() if index is not None]
    rows = {place for index in indices for place in range(*index[0].indices(batch_rows))}
    slices = {index[1].indices(length) for index in indices}
    return Part(np.array(sorted(rows)), np.concatenate([np.arange(*of) for of in sorted(slices)]))


def read_part(datasets: Sequence[Dataset], addresses: Sequence[RowAddress], part: Part, order: str, ring: int) -> Batch:
    """Numpy arrays [rows of the part, tokens of the part] of the rows at `addresses`, those of the whole batch."""
    length = datasets[0].info.row_length
    is_known = ring == 1 or order not in ("auto", "dealt")
    order = "contiguous" if ring == 1 else order
    known = token_order(order, np.zeros(length, np.int32), ring, TILE) if is_known else None
    stretches = [(0, length)]
    if known is not None and len(wanted := _stretches(np.sort(known[part.tokens]))) <= MAX_STRETCHES:
        stretches = wanted
    held = np.concatenate([np.arange(*stretch) for stretch in stretches])
    mine = [addresses[place] for place in part.rows.tolist()]
    whole = _read(datasets, mine, stretches, length)
    if order == "contiguous":
        return whole
    orders = [known if known is not None else token_order(order, ids, ring, TILE) for ids in whole.segment_ids]
    columns = np.stack([np.searchsorted(held, of[part.tokens]) for of in orders])
    return jax.tree.map(lambda a: np.take_along_axis(a, columns, axis=1), whole)


def put_part(batch: Batch, part: Part, mesh: Mesh, batch_rows: int, length: int) -> Batch:
    """The parts of all processes as global arrays: rows over dp and fsdp, tokens over sp."""
    where = sharding(mesh, "batch", "length")

    def piece(array: np.ndarray, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        row, _, _ = index[0].indices(batch_rows)
        token, last, _ = index[1].indices(length)
        first = np.searchsorted(part.rows, row), np.searchsorted(part.tokens, token)
        rows = len(range(*index[0].indices(batch_rows)))
        return array[first[0] : first[0] + rows, first[1] : first[1] + last - token]

    shape = (batch_rows, length)
    return jax.tree.map(lambda a: jax.make_array_from_callback(shape, where, lambda index: piece(a, index)), batch)


def _read(
    datasets: Sequence[Dataset], addresses: Sequence[RowAddress], stretches: Sequence[Stretch], length: int
) -> Batch:
    """The stretches of all rows, side by side; rows of one dataset are read all at once."""
    ends = [(start, stop, min(stop + 1, length)) for start, stop in stretches]
    order: list[int] = []
    batches = []
    for number, dataset in enumerate(datasets):
        places = [place for place, address in enumerate(addresses) if address.dataset == number]
        rows = [addresses[place].row for place in places]
        for start, _, end in ends:
            if rows:
                dataset.will_need(rows, start, end)  # a disk loads them side by side, not one after another
        # All stretches of a row in turn, since a shard remembers the run tables of one page.
        for group in [rows] * bool(rows) if len(stretches) == 1 else [[row] for row in rows]:
            cut = []
            for start, stop, end in ends:
                arrays = dataset.read_batch(group, start, end)
                stretch = make_batch([row_of(arrays, i) for i in range(len(group))])
                cut.append(jax.tree.map(lambda a, size=stop - start: a[:, :size], stretch))
            batches.append(cut[0] if len(cut) == 1 else jax.tree.map(lambda *a: np.concatenate(a, axis=1), *cut))
        order += places
    if len(batches) == 1:
        return batches[0]
    back = np.argsort(order)
    return jax.tree.map(lambda *a: np.concatenate(a)[back], *batches)


def _stretches(ascending: Places) -> list[Stretch]:
    """The fewest (start, stop) that hold just these places."""
    cuts = np.flatnonzero(np.diff(ascending) != 1) + 1
    return [(int(of[0]), int(of[-1]) + 1) for of in np.split(ascending, cuts)]
