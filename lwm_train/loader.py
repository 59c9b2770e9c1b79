"""Which rows a step trains on, as a function of (seed, step), and reading them ahead of time.

    slot g = step * batch_rows + place in the batch
      -> dataset d and draw k: its k-th row so far    by the shares, exact at every g, no state
      -> row of d: a fresh permutation every epoch    by a keyed Feistel network, no table

Nothing is remembered between steps, so resuming needs the step alone, whatever the mesh or number of hosts.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from lwm_data.format.dataset import Dataset
from lwm_data.format.packed import Arrays, row_of
from lwm_train.attention.order import token_order
from lwm_train.batch import Batch, make_batch, put_on_mesh

AHEAD = 2  # batches read before they are asked for
TILE = 128  # tokens that stay together when a row is dealt over the ring


@dataclass(frozen=True)
class RowAddress:
    """A row of one of the datasets."""

    dataset: int
    row: int


def rows_at(
    seed: int, step: int, batch_rows: int, num_rows: Sequence[int], shares: Sequence[float]
) -> list[RowAddress]:
    """The rows of batch `step` from datasets of `num_rows` rows, mixed by `shares` (relative to each other).

    Over any stretch of steps each dataset gets its share to within one row per dataset before it in the list, and
    every epoch of a dataset visits each of its rows once.
    """
    addresses = []
    for slot in range(step * batch_rows, (step + 1) * batch_rows):
        dataset, draw = _draw(slot, shares)
        epoch, index = divmod(draw, num_rows[dataset])
        addresses.append(RowAddress(dataset, _permuted(index, num_rows[dataset], f"{seed}/{dataset}/{epoch}")))
    return addresses


def _draw(slot: int, shares: Sequence[float]) -> tuple[int, int]:
    """(dataset of this slot, how many slots before it were the dataset's)."""
    rest = math.fsum(shares)
    for dataset, share in enumerate(shares[:-1]):
        # Of the slots left to this dataset and those after it, it takes every 1 / fraction-th.
        fraction = share / rest
        before, through = math.floor(slot * fraction), math.floor((slot + 1) * fraction)
        if through > before:
            return dataset, before
        slot -= before
        rest -= share
    return len(shares) - 1, slot


def _permuted(index: int, size: int, key: str) -> int:
    """Where a keyed permutation of 0..size-1 puts `index`: a Feistel network over the next even power of two,
    walked until it lands inside."""
    half = max(1, math.ceil(math.log2(max(2, size)) / 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = (left << half) | right
        if index < size:
            return index


class Loader:
    """Reads batches of a mixture of datasets in a thread, ahead of the steps that take them.

    `seconds_waited` tells how long steps have waited for data.
    """

    def __init__(
        self, datasets: Sequence[Dataset], shares: Sequence[float], seed: int, batch_rows: int, mesh: Mesh, order: str
    ) -> None:
        self._datasets, self._shares, self._seed = datasets, shares, seed
        self._batch_rows, self._mesh, self._order = batch_rows, mesh, order
        self.seconds_waited = 0.0

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, on the mesh."""
        num_rows = [len(dataset) for dataset in self._datasets]
        addresses = rows_at(self._seed, step, self._batch_rows, num_rows, self._shares)
        rows = self._read(addresses)
        return put_on_mesh(make_batch(rows, ring_orders(rows, self._order, self._mesh)), self._mesh)

    def _read(self, addresses: Sequence[RowAddress]) -> list[Arrays]:
        """The rows at `addresses`, those of a dataset all at once."""
        rows: dict[int, Arrays] = {}
        for number, dataset in enumerate(self._datasets):
            places = [place for place, address in enumerate(addresses) if address.dataset == number]
            if places:
                numbers = [addresses[place].row for place in places]
                dataset.will_need(numbers)  # a disk loads them side by side, not one after another
                arrays = dataset.read_batch(numbers)
                rows |= {place: row_of(arrays, i) for i, place in enumerate(places)}
        return [rows[place] for place in range(len(addresses))]

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start..stop, in turn. An error in reading is raised here."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=AHEAD)
        left = threading.Event()

        def read() -> None:
            for step in range(start, stop):
                try:
                    item: Batch | BaseException = self.batch(step)
                except BaseException as error:  # handed to the step that asks for it
                    item = error
                while not left.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if left.is_set() or isinstance(item, BaseException):
                    return

        thread = threading.Thread(target=read, name="loader", daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                begin = time.monotonic()
                item = ready.get()
                self.seconds_waited += time.monotonic() - begin
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            left.set()
            thread.join()


def ring_orders(rows: Sequence[Arrays], order: str, mesh: Mesh) -> list[np.ndarray] | None:
    """The order of each row's tokens over the ring; None where one device holds the whole row."""
    ring = mesh.shape["sp"]
    if ring == 1 or order == "contiguous":
        return None
    return [token_order(order, row["segment_ids"], ring, TILE) for row in rows]
