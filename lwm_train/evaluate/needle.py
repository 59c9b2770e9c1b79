"""Needle retrieval: a fact is planted in a text of a given length at a given depth, and asked for at its end.

    <s> You are a helpful assistant. USER: ... held-out text ...        depth 0
    The special magic Lima number is: 4083112                           <- the needle, between two sentences
    ... held-out text ... What is the special magic Lima number? ... ASSISTANT:      depth 1
    |------------------ `length` tokens, BOS included -------------------------|     then the model answers, greedily

An answer is right if the number stands in it, as the release's `scripts/eval_needle.py` scores it. Each prompt is a
function of (seed, length, depth, round) and of the haystack, so that adding a length changes no other prompt.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from jax.sharding import Mesh

from lwm_data.format.prompt import BORDER, CITIES, NEEDLE_DIGITS, needle, needle_answer, needle_prompt, plant
from lwm_data.format.vocab import TextTokenizer
from lwm_train.config import ModelConfig, NeedleSpec
from lwm_train.generate import generate
from lwm_train.model import Params

CHANCE = 1 / (9 * 10 ** (NEEDLE_DIGITS - 1))  # of guessing a number without reading the text
CHARS_PER_TOKEN = 8  # more than any text needs
SPARE_TOKENS = 8  # of an answer, beyond those of the expected words
TAIL_CHARS = 400  # of a prompt's end, kept for the report


@dataclass(frozen=True)
class NeedlePrompt:
    """One question. ids: BOS and the prompt's tokens, `length` of them or as many fewer as the tokenizer demands."""

    length: int
    depth: float
    round: int
    city: str
    number: int
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class NeedleAnswer:
    """One question's outcome. num_tokens: of the prompt; tail: the end of its text."""

    length: int
    depth: float
    round: int
    num_tokens: int
    city: str
    number: int
    tail: str
    answer: str
    is_right: bool


@dataclass(frozen=True)
class NeedleResult:
    """accuracy[length][depth]: the share of the `rounds` answers that are right; answers: all, in the grid's order."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    rounds: int
    accuracy: tuple[tuple[float, ...], ...]
    answers: tuple[NeedleAnswer, ...]

    @property
    def mean_accuracy(self) -> float:
        return sum(answer.is_right for answer in self.answers) / len(self.answers)


def evaluate_needle(
    params: Params,
    config: ModelConfig,
    tokenizer: TextTokenizer,
    spec: NeedleSpec,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> NeedleResult:
    """Ask the model all questions of `spec`; `progress` is called with the number of new answers.

    ValueError where the haystack is missing or a length leaves no room for the question.
    """
    prompts = needle_prompts(tokenizer, read_haystack(spec.haystack), spec)
    expected = (needle_answer([(prompt.city, prompt.number)]) for prompt in prompts)
    num_tokens = max(len(tokenizer.encode(text)) for text in expected) + SPARE_TOKENS
    ids = [prompt.ids for prompt in prompts]
    found = generate(
        params, config, ids, num_tokens, temperature=0, seed=0, eos=tokenizer.eos, mesh=mesh, progress=progress
    )
    answers = tuple(_score(tokenizer, prompt, out) for prompt, out in zip(prompts, found, strict=True))
    right = iter(answer.is_right for answer in answers)
    accuracy = tuple(
        tuple(sum(next(right) for _ in range(spec.rounds)) / spec.rounds for _ in spec.depths) for _ in spec.lengths
    )
    return NeedleResult(spec.lengths, spec.depths, spec.rounds, accuracy, answers)


def needle_prompts(tokenizer: TextTokenizer, haystack: str, spec: NeedleSpec) -> list[NeedlePrompt]:
    """The questions of `spec`, by length, depth and round in turn."""
    cases = [(length, depth, i) for length in spec.lengths for depth in spec.depths for i in range(spec.rounds)]
    return [_prompt(tokenizer, haystack, spec.seed, *case) for case in cases]


def read_haystack(pattern: str) -> str:
    """The texts that the glob names, end to end. ValueError where there is none, or one is not UTF-8."""
    paths = sorted(glob.glob(pattern, recursive=True))
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8").strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: {error}") from error
    haystack = "\n\n".join(text for text in texts if text)
    if not haystack:
        raise ValueError(f"needle.haystack: {pattern}: no text in {len(paths)} files; name held-out texts")
    return haystack


def _prompt(
    tokenizer: TextTokenizer, haystack: str, seed: int, length: int, depth: float, round_number: int
) -> NeedlePrompt:
    rng = Random(f"{seed}/{length}/{depth}/{round_number}")
    city = rng.choice(CITIES)
    number = rng.randrange(10 ** (NEEDLE_DIGITS - 1), 10**NEEDLE_DIGITS)
    piece = _piece(haystack, rng, length * CHARS_PER_TOKEN)

    def text_of(num_chars: int) -> str:
        return needle_prompt(plant(piece[:num_chars], [needle(city, number)], [depth]), [city])

    num_chars = _longest_cut(lambda cut: 1 + len(tokenizer.encode(text_of(cut))), length, len(piece))
    text = text_of(num_chars)
    ids = (tokenizer.bos, *tokenizer.encode(text).tolist())
    return NeedlePrompt(length, depth, round_number, city, number, text, ids)


def _longest_cut(count: Callable[[int], int], length: int, num_chars: int) -> int:
    """A number of characters, at most `num_chars`, for which `count` is `length`, or else next below it.

    `count` grows nearly in proportion to the characters, so the search goes by its slope and needs few tries.
    """
    fewest = count(0)
    if fewest > length:
        raise ValueError(f"needle.lengths: got {length}; the question alone takes {fewest} tokens; ask for more")
    low, low_count, high = 0, fewest, num_chars + 1
    guess = min(num_chars, 3 * (length - fewest))
    while low_count < length and high - low > 1:
        got = count(guess)
        if got > length:
            high = guess
        else:
            low, low_count = guess, got
        slope = max(1.0, guess / max(1, got - fewest))
        guess = min(max(guess + round((length - got) * slope), low + 1), high - 1)
    return low


def _piece(haystack: str, rng: Random, num_chars: int) -> str:
    """A contiguous piece from the beginning of a sentence on; a haystack that is too short is repeated."""
    at = rng.randrange(max(1, len(haystack) - num_chars))
    border = BORDER.search(haystack, at) if at else None
    at = border.end() if border else at
    piece = haystack[at : at + num_chars]
    while len(piece) < num_chars:
        piece += "\n\n" + haystack[: num_chars - len(piece)]
    return piece


def _score(tokenizer: TextTokenizer, prompt: NeedlePrompt, out: Sequence[int]) -> NeedleAnswer:
    answer = tokenizer.decode(np.array(out, np.int32))
    return NeedleAnswer(
        length=prompt.length,
        depth=prompt.depth,
        round=prompt.round,
        num_tokens=len(prompt.ids),
        city=prompt.city,
        number=prompt.number,
        tail=prompt.text[-TAIL_CHARS:],
        answer=answer,
        is_right=str(prompt.number) in answer,
    )
