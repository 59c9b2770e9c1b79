"""Which rows a step trains on, as a function of (seed, step), and reading them ahead of time.

    slot g = step * batch_rows + place in the batch
      -> dataset d and draw k: its k-th row so far    by the shares, exact at every g, no state
      -> row of d: a fresh permutation every epoch    by a keyed Feistel network, no table

Nothing is remembered between steps, so resuming needs the step alone, whatever the mesh or number of hosts. What of
the rows a process reads is in row_reader.py.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence

from jax.sharding import Mesh

from lwm_data.format.dataset import Dataset
from lwm_train.batch import Batch
from lwm_train.row_reader import RowAddress, part_of_process, put_part, read_part

AHEAD = 2  # batches read before they are asked for


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
        self._length = datasets[0].info.row_length
        self._part = part_of_process(mesh, batch_rows, self._length)
        self.seconds_waited = 0.0

    def rows(self, step: int) -> list[RowAddress]:
        """The rows of batch `step`, those of other processes too."""
        return rows_at(self._seed, step, self._batch_rows, [len(d) for d in self._datasets], self._shares)

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, on the mesh."""
        part = read_part(self._datasets, self.rows(step), self._part, self._order, self._mesh.shape["sp"])
        return put_part(part, self._part, self._mesh, self._batch_rows, self._length)

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
