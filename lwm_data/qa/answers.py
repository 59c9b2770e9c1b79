"""What a model wrote, read as pairs: strict JSON where it gave some, and what comes near to it otherwise.

{"pairs": [{"question": "Who?", "answer": "Ahab"}]}      as asked
```json [{"question": ..., "answer": ...}] ```           fenced, a bare list, one pair alone
Sure! {'question': 'Who?', 'answer': 'Ahab',} Bye        inside prose, single quotes, a trailing comma
Q: Who?  A: Ahab                                         lines
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

MAX_ANSWER = 1 << 20  # characters of an answer that are read
MAX_TRIES = 200  # places of an answer at which JSON is looked for
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
TRAILING_COMMA = re.compile(r",(\s*[\]}])")
MARK = r"[*_#>\s]*(?:\d+[.)]\s*)?[*_]*"
QUESTION_LINE = re.compile(rf"^{MARK}(?:Q(?:uestion)?|Frage|Pregunta)\s*\d*[*_]*\s*[:.)][*_]*\s*(.+)", re.IGNORECASE)
ANSWER_LINE = re.compile(
    rf"^{MARK}(?:A(?:nswer)?|Antwort|Réponse|Respuesta)\s*\d*[*_]*\s*[:.)][*_]*\s*(.+)", re.IGNORECASE
)


@dataclass(frozen=True)
class Pair:
    """One question with its answer, blanks at the ends removed."""

    question: str
    answer: str


def parse_answer(raw: str) -> list[Pair]:
    """The pairs in what a model wrote, in its order; none where there are none. Never raises for any text."""
    text = THOUGHT.sub("", raw[:MAX_ANSWER]).strip()
    for value in _values(text):
        if pairs := _pairs_of(value):
            return pairs
    return _from_lines(text)


def parse_verdict(raw: str) -> bool | None:
    """What a judge said: yes, no, or neither (None)."""
    words = re.findall(r"[a-z]+", THOUGHT.sub("", raw[:MAX_ANSWER]).lower())
    return {"yes": True, "no": False}.get(words[0]) if words else None


def _values(text: str) -> Any:
    """JSON values in `text`: the whole, then from each brace or bracket on; last, Python's way of writing them."""
    loose = TRAILING_COMMA.sub(r"\1", text)
    decoder = json.JSONDecoder(strict=False)  # a model's strings may hold line ends
    places = [match.start() for match in re.finditer(r"[\[{]", loose)][:MAX_TRIES]
    skipped_to = 0
    found = []
    for place in places:
        if place < skipped_to:
            continue
        try:
            value, skipped_to = decoder.raw_decode(loose, place)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and {"question", "answer"} <= value.keys():
            found.append(value)
        else:
            yield value
    yield found
    if "'" in text:
        for place in places[:3]:
            for end in (loose.rfind("}"), loose.rfind("]")):
                try:
                    yield ast.literal_eval(loose[place : end + 1])
                except (ValueError, SyntaxError, RecursionError, MemoryError):
                    continue


def _pairs_of(value: Any) -> list[Pair]:
    if isinstance(value, dict):
        if "question" in value:
            value = [value]
        else:
            lists = [of for of in value.values() if isinstance(of, list)]
            value = value.get("pairs", lists[0] if lists else None)
    if not isinstance(value, list):
        return []
    pairs = []
    for item in value:
        if not isinstance(item, dict):
            continue
        question, answer = item.get("question"), item.get("answer")
        if isinstance(question, str) and isinstance(answer, str | int | float):
            pairs.append(Pair(_clean(question), _clean(str(answer))))
    return pairs


def _from_lines(text: str) -> list[Pair]:
    pairs: list[Pair] = []
    question: str | None = None
    for line in text.splitlines():
        if asked := QUESTION_LINE.match(line):
            question = asked[1]
            both = re.split(r"\s+(?:A|Answer|Antwort|Réponse|Respuesta)\s*:\s*", question, maxsplit=1)
            if len(both) == 2:
                pairs.append(Pair(_clean(both[0]), _clean(both[1])))
                question = None
        elif (told := ANSWER_LINE.match(line)) and question is not None:
            pairs.append(Pair(_clean(question), _clean(told[1])))
            question = None
    return pairs


def _clean(text: str) -> str:
    """`text` without blanks and bold marks at its ends, and without what UTF-8 cannot say (halves of pairs)."""
    return text.encode("utf-8", "replace").decode().strip().strip("*").strip()
