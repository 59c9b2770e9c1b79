"""Example: one record's tokens as runs; a run is a stretch of one modality with one `trained` flag.

<s> You are ... USER: Who hid the gold? ASSISTANT:   Ben Gunn. </s>
|---------------- text, not trained --------------|  |-- text, trained --|
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int32

from lwm_data.format.vocab import CODES_PER_FRAME, EOF, EOV, TextTokenizer


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one modality, all trained (predicted with loss) or none."""

    tokens: Int32[np.ndarray, " n"]
    is_vision: bool
    trained: bool


@dataclass(frozen=True)
class Example:
    """The tokens of one record, or of one part of a record that was split.

    source, key: where it comes from, as in the manifest and in the source's own naming.
    part: 0, 1, ... within the record.
    runs: in reading order; the first token of the first run is never trained.
    """

    source: str
    key: str
    part: int
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        if not self.num_tokens:
            raise ValueError(f"{self.source}: {self.key}: an example without tokens")
        first = next(run for run in self.runs if len(run.tokens))
        assert not first.trained, "nothing predicts the first token of an example"

    @cached_property
    def num_tokens(self) -> int:
        return sum(len(run.tokens) for run in self.runs)

    @cached_property
    def num_vision(self) -> int:
        return sum(len(run.tokens) for run in self.runs if run.is_vision)

    @cached_property
    def num_trained(self) -> int:
        return sum(len(run.tokens) for run in self.runs if run.trained)


def text_runs(
    tokenizer: TextTokenizer, parts: list[tuple[Int32[np.ndarray, " n"], bool]], *, eos: bool
) -> tuple[Run, ...]:
    """BOS (never trained), then `parts` of (text ids, trained), then EOS (trained) if asked."""
    runs = [Run(np.array([tokenizer.bos], np.int32), is_vision=False, trained=False)]
    runs += [Run(ids, is_vision=False, trained=trained) for ids, trained in parts]
    if eos:
        runs.append(Run(np.array([tokenizer.eos], np.int32), is_vision=False, trained=True))
    return tuple(runs)


def vision_runs(
    tokenizer: TextTokenizer, codes: Int32[np.ndarray, "frames codes"], *, trained: bool
) -> tuple[Run, ...]:
    """`<vision> codes EOF ... codes EOV </vision>` of one image (a video of one frame) or video.

    codes: int32[frames, 256], each in 0..8191.
    """
    num_frames, num_codes = codes.shape
    if num_frames == 0 or num_codes != CODES_PER_FRAME or codes.min() < 0 or codes.max() >= EOF:
        raise ValueError(f"codes: got shape {codes.shape}; wanted [frames >= 1, {CODES_PER_FRAME}] of 0..{EOF - 1}")
    ends = np.full((num_frames, 1), EOF, np.int32)
    ends[-1] = EOV
    block = np.concatenate([codes.astype(np.int32), ends], axis=1).reshape(-1)
    return (
        Run(tokenizer.vision_start, is_vision=False, trained=trained),
        Run(block, is_vision=True, trained=trained),
        Run(tokenizer.vision_end, is_vision=False, trained=trained),
    )
