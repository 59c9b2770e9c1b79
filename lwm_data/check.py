"""Checks every invariant of a dataset, through format's own reader.

file    size and sha256 of each shard and of its examples table
row     runs cover it; segments 1, 2, ... in turn, then padding; padding is token 0 of weight 0
segment begins with BOS; its weights sum to 1 (example) or are 0 or 1 (token)
token   ids are of their vocabulary; vision blocks are whole frames that end in EOF, the last in EOV
table   says of each segment what the row holds
index   totals

A shard is a unit of work; what is found is told in the shards' order, whoever was faster.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lwm_data.engine import run_units
from lwm_data.format.dataset import Dataset, DatasetInfo, ShardInfo
from lwm_data.format.packed import PackedSequence
from lwm_data.format.vocab import CODES_PER_FRAME, EOF, EOV, TextTokenizer
from lwm_data.work_folder import examples_name

BLOCK = 1 << 20
TOLERANCE = 1e-4  # of a sum of float32 weights
MAX_PROBLEMS = 100

Lines = list[tuple[int, int, int, int]]
"""Of one row in the examples table: (segment, tokens, vision tokens, trained tokens) of each example."""


@dataclass(frozen=True)
class _Checking:
    url: str
    info: DatasetInfo
    tokenizer: TextTokenizer


@dataclass(frozen=True)
class _Checked:
    """Of one shard. problems: at most MAX_PROBLEMS; totals: what its rows and its table add to those of the index;
    is_read: whether that is all of it."""

    problems: list[str]
    totals: dict[str, int]
    is_read: bool


def check_dataset(dataset: Dataset, progress: Callable[[int], None], workers: int = 1) -> list[str]:
    """What is wrong with `dataset`, each with its shard, row and token; at most MAX_PROBLEMS. progress(rows done)."""
    problems = list(itertools.islice(_problems(dataset, progress, workers), MAX_PROBLEMS))
    return [*problems, f"stopped after {MAX_PROBLEMS} problems"] if len(problems) == MAX_PROBLEMS else problems


def _problems(dataset: Dataset, progress: Callable[[int], None], workers: int) -> Iterator[str]:
    try:
        tokenizer = dataset.text_tokenizer
    except (ValueError, OSError) as error:
        yield f"text_tokenizer.yaml: {error}"
        return
    info = dataset.info
    if tokenizer.vocab_size != info.text_vocab_size:
        yield f"index.json: text_vocab_size: got {info.text_vocab_size}; the tokenizer has {tokenizer.vocab_size}"
    totals: Counter[str] = Counter()
    is_read = True
    numbers = range(len(info.shards))
    checked = run_units(_check_shard, _Checking(dataset.url, info, tokenizer), numbers, workers, len(numbers))
    for shard, of in zip(info.shards, checked, strict=True):
        progress(shard.num_rows)
        yield from of.problems
        totals.update(of.totals)
        is_read = is_read and of.is_read
    if is_read:
        yield from _total_problems(dataset, totals)


def _check_shard(shared: _Checking, number: int) -> _Checked:
    dataset = Dataset(shared.url, shared.info)
    shard = shared.info.shards[number]
    totals: dict[str, int] = defaultdict(int)
    problems = list(_file_problems(dataset, shard.name, shard.num_bytes, shard.sha256))
    is_there = not any("bytes" in problem or "no such file" in problem for problem in problems)
    name = examples_name(shard.name)
    lines: dict[int, Lines] | None = None
    table_problems = list(_file_problems(dataset, name, None, shard.examples_sha256))
    if not table_problems:
        lines = _read_lines(dataset, name, totals)
    problems += table_problems
    if is_there:
        first_row = sum(of.num_rows for of in shared.info.shards[:number])
        found = _row_problems(dataset, shared.tokenizer, shard, first_row, lines, totals)
        problems += itertools.islice(found, MAX_PROBLEMS - len(problems))
    return _Checked(problems, totals, is_there and lines is not None)


def _file_problems(dataset: Dataset, name: str, num_bytes: int | None, sha256: str) -> Iterator[str]:
    digest = hashlib.sha256()
    size = 0
    try:
        with fsspec.open(f"{dataset.url}/{name}", "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        yield f"{name}: no such file; build again"
        return
    # A build looks at sizes, and at the tables' hashes; it would leave a shard of the right size alone.
    remedy = "build again" if num_bytes is None else "remove it and build again"
    if num_bytes is not None and size != num_bytes:
        yield f"{name}: {size:,} bytes, the index says {num_bytes:,}: truncated or changed; build again"
    elif digest.hexdigest() != sha256:
        yield f"{name}: sha256 is {digest.hexdigest()}, the index says {sha256}: changed; {remedy}"


def _read_lines(dataset: Dataset, name: str, totals: dict[str, int]) -> dict[int, Lines]:
    """The examples table by row; adds it to the totals of its sources."""
    with fsspec.open(f"{dataset.url}/{name}", "rb") as file:
        table: pa.Table = pq.read_table(file)
    lines: dict[int, Lines] = defaultdict(list)
    names = ("row", "segment", "source", "num_tokens", "num_vision", "num_trained")
    for row, segment, source, tokens, vision, trained in zip(*(table[n].to_pylist() for n in names), strict=True):
        lines[row].append((segment, tokens, vision, trained))
        for field, count in (
            ("examples", 1),
            ("tokens", tokens),
            ("vision_tokens", vision),
            ("trained_tokens", trained),
        ):
            totals[f"{source}.{field}"] += count
    return lines


def _row_problems(
    dataset: Dataset,
    tokenizer: TextTokenizer,
    shard: ShardInfo,
    first_row: int,
    lines: dict[int, Lines] | None,
    totals: dict[str, int],
) -> Iterator[str]:
    for row in range(shard.num_rows):
        where = f"{shard.name}: row {row}"
        try:
            packed = dataset.packed(first_row + row)
            found = list(_check_row(packed, dataset, tokenizer))
            if not found:
                totals["tokens"] += int(packed.runs[packed.runs[:, 1] > 0, 0].sum())
                totals["trained"] += int(packed.trained_lengths.sum())
                if lines is not None:
                    found = list(_check_lines(packed, lines[row], dataset.info.packing == "naive"))
        except (ValueError, IndexError, OSError, OverflowError, MemoryError) as error:
            found = [f"cannot be read: {error}"]
        for problem in found:
            yield f"{where}: {problem}"


def _check_row(packed: PackedSequence, dataset: Dataset, tokenizer: TextTokenizer) -> Iterator[str]:
    info = dataset.info
    lengths, segments, vision = packed.runs.astype(np.int64).T
    weights = packed.weights
    if not len(lengths) or lengths.min() < 1 or lengths.sum() != info.row_length:
        yield f"runs: they cover {lengths.sum():,} tokens; the row has {info.row_length:,}"
        return
    begins = np.cumsum(lengths) - lengths
    real = segments[segments > 0]
    if np.any(segments[len(real) :]) or len(segments) - len(real) > 1:
        yield f"token {begins[np.argmin(segments)]}: padding that is not last"
        return
    if not len(real) or real[0] != 1 or np.any((np.diff(real) != 0) & (np.diff(real) != 1)):
        yield f"segments: got {np.unique(real).tolist()[:8]} in the order {real.tolist()[:8]}; wanted 1, 2, ... in turn"
        return
    if not np.isfinite(weights).all() or weights.min() < 0 or (vision > 1).any():
        yield "runs: a weight that is no number of 0 or more, or a vision flag that is neither 0 nor 1"
        return
    if len(real) < len(segments):
        nonzero = np.flatnonzero(packed.tokens[begins[-1] :])
        if len(nonzero) or weights[-1] or vision[-1]:
            at = begins[-1] + (nonzero[0] if len(nonzero) else 0)
            yield f"token {at}: padding of id {packed.tokens[at]} and weight {weights[-1]:g}; wanted 0 and 0"
    is_vision = np.repeat(vision != 0, lengths)
    limits = np.where(is_vision, EOV + 1, info.text_vocab_size)
    outside = np.flatnonzero(packed.tokens >= limits)
    if len(outside):
        at = outside[0]
        yield f"token {at}: id {packed.tokens[at]}; wanted below {limits[at]} ({'vision' if is_vision[at] else 'text'})"
    firsts = np.flatnonzero(np.diff(real, prepend=0))
    for run in firsts.tolist():
        if info.packing == "masked" and packed.tokens[begins[run]] != tokenizer.bos:
            yield f"token {begins[run]}: id {packed.tokens[begins[run]]} begins segment {segments[run]}; wanted BOS"
    yield from _check_weights(packed, begins, firsts, info.packing == "masked", info.loss_weighting == "example")
    if info.packing == "masked":
        yield from _check_vision(packed.tokens, vision, segments, begins, lengths, tokenizer)


def _check_weights(
    packed: PackedSequence, begins: np.ndarray, firsts: np.ndarray, is_masked: bool, by_example: bool
) -> Iterator[str]:
    weights = packed.weights.astype(np.float64)
    if not by_example:
        for run in np.flatnonzero((weights != 0) & (weights != 1)).tolist()[:1]:
            yield f"token {begins[run]}: weight {weights[run]:g}; wanted 0 or 1 (loss_weighting: token)"
    elif is_masked:
        sums = np.add.reduceat(packed.trained_lengths * weights, firsts)
        for segment in np.flatnonzero((sums != 0) & (np.abs(sums - 1) > TOLERANCE)).tolist():
            yield f"token {begins[firsts[segment]]}: weights of segment {segment + 1} sum to {sums[segment]:g}, not 1"
        for segment in range(len(firsts)):
            stop = firsts[segment + 1] if segment + 1 < len(firsts) else len(weights)
            distinct = np.unique(weights[firsts[segment] : stop])
            if len(distinct[distinct > 0]) > 1:
                yield f"token {begins[firsts[segment]]}: segment {segment + 1} has weights {distinct.tolist()[:4]}"


def _check_vision(
    tokens: np.ndarray,
    vision: np.ndarray,
    segments: np.ndarray,
    begins: np.ndarray,
    lengths: np.ndarray,
    tokenizer: TextTokenizer,
) -> Iterator[str]:
    run = 0
    while run < len(vision):
        if not vision[run]:
            run += 1
            continue
        last = run
        while last + 1 < len(vision) and vision[last + 1] and segments[last + 1] == segments[run]:
            last += 1
        start, stop = begins[run], begins[last] + lengths[last]
        block = tokens[start:stop]
        before, after = tokenizer.vision_start, tokenizer.vision_end
        if len(block) % (CODES_PER_FRAME + 1):
            yield f"token {start}: a vision block of {len(block)} tokens; wanted a multiple of {CODES_PER_FRAME + 1}"
        else:
            frames = block.reshape(-1, CODES_PER_FRAME + 1)
            ends = np.append(np.full(len(frames) - 1, EOF), EOV)
            if np.any(frames[:, -1] != ends) or np.any(frames[:, :-1] >= EOF):
                yield f"token {start}: a vision block whose frames do not end in EOF, and the last in EOV"
        if not np.array_equal(tokens[max(0, start - len(before)) : start], before):
            yield f"token {start}: a vision block without <vision> before it"
        stray = np.append(tokenizer.bos, after)  # of the release's last version; lwm_jsonl's stray_bos
        if not any(np.array_equal(tokens[stop : stop + len(end)], end) for end in (after, stray)):
            yield f"token {stop}: a vision block without </vision> after it"
        run = last + 1


def _check_lines(packed: PackedSequence, lines: Lines, is_naive: bool) -> Iterator[str]:
    """Does the examples table say what the row holds? Of a naive row, one segment, it can only be asked in sum."""
    lengths, segments, vision = packed.runs.astype(np.int64).T
    trained = packed.trained_lengths
    got: Lines = []
    for segment in range(1, int(segments.max()) + 1):
        of = lengths * (segments == segment)
        got.append((segment, int(of.sum()), int((of * vision).sum()), int(trained[segments == segment].sum())))
    if is_naive:
        sums = [sum(line[i] for line in lines) for i in (1, 2, 3)]
        sums[2] -= sums[2] - got[0][3] == 1  # the first token of a row that begins inside an example
        lines = [(1, sums[0], sums[1], sums[2])]
    if got != lines:
        differ = next((pair for pair in zip(got, lines, strict=False) if pair[0] != pair[1]), (got[-1], lines[-1:]))
        yield (
            f"segments (number, tokens, vision, trained): got {differ[0]}, the examples table says {differ[1]}; "
            f"{len(got)} segments, {len(lines)} lines"
        )


def _total_problems(dataset: Dataset, totals: dict[str, int]) -> Iterator[str]:
    info = dataset.info
    wanted = {"tokens": info.num_tokens, "trained": info.num_trained}
    for name, source in info.sources.items():
        for field in ("examples", "tokens", "vision_tokens", "trained_tokens"):
            if field != "examples" or info.packing == "masked":  # naive rows have a line per piece of an example
                wanted[f"{name}.{field}"] = getattr(source, field)
    for name, count in wanted.items():
        if totals[name] != count:
            yield f"index.json: {name}: got {count:,}; the rows have {totals[name]:,}"
