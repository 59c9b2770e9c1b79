"""What examples.parquet says of a dataset, in numbers of a bounded size: a shard's lines are read a batch at a time.

shard-000000.examples.parquet   row 0: novels 2,048 | row 1: talk 512, needles 1,400 | ...
shard-000001.examples.parquet   ...                                  of SHARDS at most, evenly from all over
        |
        v   by source: examples, tokens, loss, lengths      by row: fill      by shard: tokens of each source
            by source of questions: the depths of their evidence, which the keys tell
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64

from lwm_data.format.dataset import Dataset, DatasetInfo, ShardInfo
from lwm_data.report.charts import FILL_BINS, LOG_BINS, log_bin
from lwm_data.sources.qa import asked_of
from lwm_data.work_folder import examples_name

SHARDS = 256  # read; a dataset of more is sampled
BATCH = 1 << 16  # lines
COLUMNS = ["row", "source", "num_tokens", "num_trained"]


@dataclass
class Counts:
    """Of the shards in `shards`, ascending numbers; arrays are by source, in the order of the index.

    loss: the sum of the loss weights, where it is known from the lines (`packing: naive` cuts examples).
    lengths: examples by log_bin of their tokens. rows, row_fills: rows with a token of the source, and the sum of their
    fills. fills: rows by their fill. mix: tokens by shard. depths: questions by the place of their evidence in what is
    read before them.
    """

    shards: Int64[np.ndarray, " k"]
    examples: Int64[np.ndarray, " sources"]
    tokens: Int64[np.ndarray, " sources"]
    loss: Int64[np.ndarray, " sources"]
    longest: Int64[np.ndarray, " sources"]
    lengths: Int64[np.ndarray, "sources bins"]
    rows: Int64[np.ndarray, " sources"]
    row_fills: np.ndarray
    fills: Int64[np.ndarray, " bins"]
    num_full: int
    emptiest: float
    mix: Int64[np.ndarray, "k sources"]
    depths: Int64[np.ndarray, "sources bins"]


def count(dataset: Dataset, most: int = SHARDS, advance: Callable[[int], None] = lambda _: None) -> Counts:
    """Count the lines of `most` shards or fewer. ValueError where they are damaged; advance: told of each shard."""
    all_shards, names = dataset.info.shards, list(dataset.info.sources)
    num = len(names)
    if len(all_shards) > most:
        chosen = np.arange(most) * (len(all_shards) - 1) // max(most - 1, 1)
    else:
        chosen = np.arange(len(all_shards))

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int64)

    counts = Counts(
        shards=chosen,
        examples=zeros(num),
        tokens=zeros(num),
        loss=zeros(num),
        longest=zeros(num),
        lengths=zeros(num, LOG_BINS),
        rows=zeros(num),
        row_fills=np.zeros(num),
        fills=zeros(FILL_BINS),
        num_full=0,
        emptiest=1.0,
        mix=zeros(len(chosen), num),
        depths=zeros(num, FILL_BINS),
    )
    number_of = {name: number for number, name in enumerate(names)}
    for at, number in enumerate(chosen.tolist()):
        shard = all_shards[number]
        try:
            _count_shard(dataset, shard, number_of, counts, at)
        except (KeyError, IndexError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"{dataset.url}/{examples_name(shard.name)}: not the examples of its shard ({error}); `lwm-data check` "
                "tells what is damaged"
            ) from error
        advance(1)
    return counts


def _count_shard(dataset: Dataset, shard: ShardInfo, number_of: dict[str, int], counts: Counts, at: int) -> None:
    num, is_by_token = len(number_of), dataset.info.loss_weighting == "token"
    used = np.zeros(shard.num_rows, np.int64)  # tokens of each row
    found: list[np.ndarray] = []  # row * sources + source, of what is in which row
    columns = [*COLUMNS, "key"] if _may_ask(dataset.info) else COLUMNS
    with fsspec.open(f"{dataset.url}/{examples_name(shard.name)}", "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=columns):
            rows, tokens, trained = (
                batch.column(name).to_numpy(zero_copy_only=False).astype(np.int64)
                for name in ("row", "num_tokens", "num_trained")
            )
            if len(rows) and (rows.min() < 0 or rows.max() >= shard.num_rows or tokens.min() < 0):
                raise ValueError("a row beyond the shard's last, or a negative number")
            coded = batch.column("source").dictionary_encode()
            sources = np.array([number_of[name] for name in coded.dictionary.to_pylist()], np.int64)
            sources = sources[coded.indices.to_numpy(zero_copy_only=False)]
            if len(rows):
                low = int(rows.min())
                held = np.bincount(rows - low, weights=tokens).astype(np.int64)
                used[low : low + len(held)] += held
            found.append(_distinct(rows * num + sources))
            counts.examples += np.bincount(sources, minlength=num)
            counts.mix[at] += np.bincount(sources, weights=tokens, minlength=num).astype(np.int64)
            # The weights of an example sum to 1, unless none of its tokens is trained.
            loss = trained if is_by_token else trained > 0
            counts.loss += np.bincount(sources, weights=loss, minlength=num).astype(np.int64)
            np.maximum.at(counts.longest, sources, tokens)
            bins = np.bincount(sources * LOG_BINS + log_bin(tokens), minlength=num * LOG_BINS)
            counts.lengths += bins.reshape(num, LOG_BINS)
            if "key" in columns:
                keys = batch.column("key")
                for line in np.flatnonzero(pc.match_substring(keys, "@").to_numpy(zero_copy_only=False)).tolist():
                    for asked in asked_of(keys[line].as_py()):
                        place = min(int(asked.depth * FILL_BINS), FILL_BINS - 1)
                        counts.depths[sources[line], place] += 1
    counts.tokens += counts.mix[at]
    fills = used / dataset.info.row_length
    if len(fills) and fills.max() > 1:
        raise ValueError(f"{used.max():,} tokens in a row of {dataset.info.row_length:,}")
    counts.fills += np.bincount(np.minimum((fills * FILL_BINS).astype(np.int64), FILL_BINS - 1), minlength=FILL_BINS)
    counts.num_full += int((used == dataset.info.row_length).sum())
    counts.emptiest = min(counts.emptiest, float(fills.min()))
    rows, sources = np.divmod(_distinct(np.concatenate(found)) if found else np.zeros(0, np.int64), max(num, 1))
    counts.rows += np.bincount(sources, minlength=num)
    np.add.at(counts.row_fills, sources, fills[rows])


def _distinct(values: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """Each value once, ascending; np.unique hashes them, which takes twenty times as long on values like these."""
    values.sort()
    distinct: np.ndarray = values[np.diff(values, prepend=-1) != 0]
    return distinct


def _may_ask(info: DatasetInfo) -> bool:
    """Whether a source may have questions; keys are most of the bytes, and not read for nothing."""
    sources = info.manifest.get("sources")
    if not isinstance(sources, list):  # made of other datasets
        return True
    return any(isinstance(source, dict) and source.get("type") == "qa" for source in sources)
