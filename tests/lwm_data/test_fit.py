"""Fitting records of text and vision to rows: against what the parts must hold, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.format.example import Example, Run, text_runs, vision_runs
from lwm_data.format.vocab import CODES_PER_FRAME, EOF, EOV, TextTokenizer
from lwm_data.manifest_sources import Overflow
from lwm_data.sources.fit import FRAME, RunShape, evenly, fit, num_text_parts, part_lengths
from lwm_data.sources.record import Record

WHOLE = st.one_of(st.integers(1, 900), st.integers(1, 6).map(lambda frames: -frames))
ITEMS = st.lists(WHOLE, min_size=1, max_size=4)  # a number of text tokens, or minus a number of frames
ROW = st.integers(300, 1400)  # one frame and its delimiters, or more


def _record(items: list[int], tokenizer: TextTokenizer) -> Record:
    """Text of all different ids, frames of all different codes: what is in a part can be told by it."""
    runs: list[Run] = list(text_runs(tokenizer, [], eos=False))
    word, frame = 10, 0
    for item in items:
        if item > 0:
            runs.append(Run(np.arange(word, word + item, dtype=np.int32), False, True))
            word += item
        else:
            codes = np.repeat(np.arange(frame, frame - item, dtype=np.int32)[:, None], CODES_PER_FRAME, axis=1)
            runs += vision_runs(tokenizer, codes, trained=True)
            frame -= item
    runs.append(Run(np.array([tokenizer.eos], np.int32), False, True))
    return Record("key", tuple(runs))


def _contents(example: Example, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """Text ids and frames of a part, in order; every block is checked to be whole."""
    words: list[int] = []
    frames: list[int] = []
    first, *rest = example.runs
    assert first.tokens.tolist() == [tokenizer.bos]
    assert not first.trained
    for before, run, after in zip([first, *rest], rest, [*rest[1:], None], strict=False):
        if run.is_vision:
            assert after is not None
            assert np.array_equal(before.tokens, tokenizer.vision_start)
            assert np.array_equal(after.tokens, tokenizer.vision_end)
            block = run.tokens.reshape(-1, FRAME)
            assert block[:, -1].tolist() == [EOF] * (len(block) - 1) + [EOV]
            assert (block[:, :-1] == block[:, :1]).all()
            frames += block[:, 0].tolist()
        elif not (before.is_vision or (after is not None and after.is_vision)):
            words += run.tokens.tolist()
    return words, frames


def _fitted(record: Record, row_length: int, overflow: Overflow) -> list[Example]:
    """All parts, with the lengths that were planned."""
    shape = [RunShape(len(run.tokens), run.is_vision) for run in record.runs]
    if sum(run.num_tokens for run in shape) <= row_length:
        return [fit(record, "s", 0, row_length, overflow)]
    lengths, num_untrained = part_lengths(shape, row_length, overflow)
    assert num_untrained == 0
    parts = [fit(record, "s", part, row_length, overflow) for part in range(len(lengths))]
    assert [part.num_tokens for part in parts] == lengths
    assert all(length <= row_length for length in lengths)
    return parts


@given(items=ITEMS, row_length=ROW)
def test_split_parts_hold_every_token_and_frame_once_and_in_order(
    items: list[int], row_length: int, demo_tokenizer: TextTokenizer
) -> None:
    record = _record(items, demo_tokenizer)
    held = [_contents(part, demo_tokenizer) for part in _fitted(record, row_length, "split")]
    words = [word for part, _ in held for word in part]
    frames = [frame for _, part in held for frame in part]
    assert words == [*range(10, 10 + sum(item for item in items if item > 0)), demo_tokenizer.eos]
    assert frames == list(range(-sum(item for item in items if item < 0)))


@given(items=ITEMS, row_length=ROW)
def test_a_truncated_record_is_a_beginning_and_no_longer_one_would_fit(
    items: list[int], row_length: int, demo_tokenizer: TextTokenizer
) -> None:
    record = _record(items, demo_tokenizer)
    (part,) = _fitted(record, row_length, "truncate")
    words, frames = _contents(part, demo_tokenizer)
    whole_words, whole_frames = _contents(Example("s", "key", 0, record.runs), demo_tokenizer)
    assert words == whole_words[: len(words)]
    assert frames == whole_frames[: len(frames)]
    if (words, frames) != (whole_words, whole_frames):
        delimiters = len(demo_tokenizer.vision_start) + len(demo_tokenizer.vision_end)
        assert part.num_tokens > row_length - FRAME - delimiters


@given(items=ITEMS, row_length=ROW)
def test_a_thinned_record_keeps_its_text_and_both_ends_of_each_video(
    items: list[int], row_length: int, demo_tokenizer: TextTokenizer
) -> None:
    record = _record(items, demo_tokenizer)
    parts = _fitted(record, row_length, "thin")
    whole_words, whole_frames = _contents(Example("s", "key", 0, record.runs), demo_tokenizer)
    text = sum(len(run.tokens) for run in record.runs if not run.is_vision)
    blocks = [-item for item in items if item < 0]
    if not parts:
        assert not blocks or text + FRAME * len(blocks) > row_length
        return
    (part,) = parts
    words, frames = _contents(part, demo_tokenizer)
    assert words == whole_words
    first = 0
    kept = [[frame for frame in frames if start <= frame < start + count] for start, count in _spans(blocks)]
    for inside, count in zip(kept, blocks, strict=True):
        assert inside[0] == first
        assert len(inside) == 1 or inside[-1] == first + count - 1
        gaps = np.diff(inside)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
        first += count
    if frames != whole_frames:  # one frame more of each thinned block would be too many
        most = max(map(len, kept))
        assert text + FRAME * sum(min(most + 1, count) for count in blocks) > row_length


def _spans(blocks: list[int]) -> list[tuple[int, int]]:
    return list(zip(np.cumsum([0, *blocks[:-1]]).tolist(), blocks, strict=True)) if blocks else []


def test_frames_are_kept_as_the_release_keeps_them() -> None:
    assert evenly(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly(8, 4).tolist() == [0, 2, 4, 7]  # 2.33 and 4.67, cut off
    assert evenly(5, 1).tolist() == [0]


@given(num_tokens=st.integers(2, 400), row_length=st.integers(2, 60))
def test_text_is_split_the_same_in_one_step_as_part_by_part(num_tokens: int, row_length: int) -> None:
    (parts,) = num_text_parts(np.array([num_tokens]), row_length, "split").tolist()
    if num_tokens <= row_length:
        assert parts == 1
        return
    shape = [RunShape(1, False), RunShape(num_tokens - 2, False), RunShape(1, False)]
    lengths, _ = part_lengths([run for run in shape if run.num_tokens], row_length, "split")
    assert len(lengths) == parts
    assert lengths[:-1] == [row_length] * (parts - 1)
    assert sum(lengths) - parts == num_tokens - 1


def test_a_row_that_holds_no_frame_is_an_error_with_numbers(demo_tokenizer: TextTokenizer) -> None:
    shape = [RunShape(len(run.tokens), run.is_vision) for run in _record([-1], demo_tokenizer).runs]
    with pytest.raises(ValueError, match="a frame of 257 tokens and its delimiters do not fit a row of 256"):
        part_lengths(shape, 256, "split")


@given(items=ITEMS, row_length=ROW, first_trained=st.integers(0, 12))
def test_parts_in_which_nothing_is_trained_are_left_out_and_counted(
    items: list[int], row_length: int, first_trained: int, demo_tokenizer: TextTokenizer
) -> None:
    whole = _record(items, demo_tokenizer)
    runs = tuple(Run(run.tokens, run.is_vision, i > 0 and i >= first_trained) for i, run in enumerate(whole.runs))
    shape = [RunShape(len(run.tokens), run.is_vision, run.trained) for run in runs]
    if sum(run.num_tokens for run in shape) <= row_length:
        return
    lengths, num_untrained = part_lengths(shape, row_length, "split")
    all_lengths, none = part_lengths([RunShape(run.num_tokens, run.is_vision) for run in shape], row_length, "split")
    assert none == 0 and len(all_lengths) == len(lengths) + num_untrained
    parts = [fit(Record("key", runs), "s", part, row_length, "split") for part in range(len(lengths))]
    assert all(part.num_trained > 0 for part in parts)
    assert [part.num_tokens for part in parts] == lengths
    words = [word for part in parts for run in part.runs if run.trained and not run.is_vision for word in run.tokens]
    wanted = [word for run in runs if run.trained and not run.is_vision for word in run.tokens]
    delimiters = {*demo_tokenizer.vision_start.tolist(), *demo_tokenizer.vision_end.tolist()}
    assert [word for word in words if word not in delimiters] == [word for word in wanted if word not in delimiters]
