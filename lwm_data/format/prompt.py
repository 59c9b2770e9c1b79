"""The words around an example, the same for training data, evaluation and generation.

Chat, after the release's sampling script (system text, one space, `USER:`, text, `ASSISTANT:`; every part
encoded alone). The release leaves the separators of its chat training data open; here each answer ends in EOS:

    <s> You are a helpful assistant. USER: Hello!  ASSISTANT:   Good day. </s>   USER: Bye!  ASSISTANT:   Bye. </s>
        not trained                                             trained          not trained              trained

Needle retrieval, after the release's `scripts/eval_needle.py`: a fact is planted in a text and asked for.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence

import numpy as np

from lwm_data.format.example import Run, text_runs
from lwm_data.format.vocab import TextTokenizer

SYSTEM = "You are a helpful assistant."
NEEDLE_DIGITS = 7  # numbers are uniform in 1000000..9999999
BORDER = re.compile(r"(?<=[.!?])[\"'”’)]*\s+|\n+")  # ends of sentences and lines

# Cities of the needle task: well known, and each one once (the release's list of 100 has 69 distinct names).
_CITIES = (
    "Amsterdam Athens Auckland Baghdad Bangkok Barcelona Beijing Berlin Bogota Brussels Budapest Cairo Chicago "
    "Copenhagen Dallas Delhi Dhaka Dublin Geneva Hamburg Hanoi Havana Helsinki Istanbul Jakarta Johannesburg Karachi "
    "Kinshasa Kyoto Lagos Lima Lisbon London Madrid Manila Melbourne Miami Milan Montreal Moscow Mumbai Nairobi Naples "
    "Osaka Oslo Paris Prague Riga Rome Santiago Seoul Shanghai Singapore Stockholm Sydney Taipei Tehran Tokyo Toronto "
    "Vienna Warsaw Zurich"
)
CITIES = tuple(_CITIES.split())


def needle(city: str, number: int) -> str:
    """The planted fact."""
    return f"\nThe special magic {city} number is: {number}\n"


def plant(text: str, facts: Sequence[str], depths: Sequence[float]) -> str:
    """`text` with each of `facts` at the border of a sentence or a line that is nearest to its depth (0 to 1)."""
    borders = [0, *(match.end() for match in BORDER.finditer(text)), len(text)]
    nearest = [borders[_nearest(borders, depth * len(text))] for depth in depths]
    for place, fact_number in sorted(zip(nearest, range(len(nearest)), strict=True), reverse=True):
        text = text[:place] + facts[fact_number] + text[place:]
    return text


def _nearest(borders: list[int], place: float) -> int:
    after = bisect.bisect_left(borders, place)
    if after == len(borders) or (after and place - borders[after - 1] <= borders[after] - place):
        return after - 1
    return after


def needle_question(cities: list[str]) -> str:
    """The question for the numbers of `cities`."""
    if len(cities) == 1:
        return f"What is the special magic {cities[0]} number?"
    names = ", ".join(cities[:-1]) + f", and {cities[-1]}"
    return f"What are the special magic {names} numbers?"


def needle_answer(facts: list[tuple[str, int]]) -> str:
    """An answer as a model should give it; scoring asks only that each number stands in it."""
    return " ".join(f"The special magic {city} number is: {number}." for city, number in facts)


def needle_prompt(context: str, cities: list[str]) -> str:
    """The prompt that asks for the numbers of `cities`, planted in `context`; the same in training and evaluation."""
    return (
        f"{SYSTEM} USER: {context} {needle_question(cities)} Don't give information outside the document or repeat "
        "your findings. Keep your response short and direct. ASSISTANT:"
    )


def chat_runs(tokenizer: TextTokenizer, turns: list[tuple[str, str]], system: str = SYSTEM) -> tuple[Run, ...]:
    """Runs of a chat of (user, assistant) turns; the assistant's words and the EOS after them are trained.

    system: what stands before the first turn.
    """
    parts = []
    for i, (user, assistant) in enumerate(turns):
        prompt = f"{system} USER: {user} ASSISTANT:" if i == 0 else f"USER: {user} ASSISTANT:"
        if i:
            parts.append((np.array([tokenizer.eos], np.int32), True))
        parts += [(tokenizer.encode(prompt), False), (tokenizer.encode(assistant), True)]
    return text_runs(tokenizer, parts, eos=True)


def chat_prompt(tokenizer: TextTokenizer, user: str) -> list[int]:
    """Ids of a chat's first prompt, BOS included, after which the model answers."""
    return [tokenizer.bos, *tokenizer.encode(f"{SYSTEM} USER: {user} ASSISTANT:").tolist()]
