"""What a model wrote, read as pairs: strict JSON where it gave some, and what comes near to it otherwise.

{"pairs": [{"question": "Who?", "answer": "Ahab"}]}      as asked
```json [{"question": ..., "answer": ...}] ```           fenced, a bare list, one pair alone
Sure! {'question': 'Who?', 'answer': 'Ahab',} Bye        inside prose, single quotes, a trailing comma
Q: Who?  A: Ahab                                         lines

What is meant as a pair and is none (no answer, a list for an answer) is a pair with a problem. A server may be hostile:
no text raises, and each is read in a time that grows as it does; the patterns give nothing back (`*+`).
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_ANSWER = 1 << 20  # characters of an answer that are read
MAX_SCANNED = 8 << 20  # characters that are read in vain while JSON is looked for
TRY = 1000  # characters that each try in vain counts for at least
MAX_LITERAL = 1 << 14  # characters of a value as Python writes it
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
OPENING = re.compile(r"[\[{]")
TRAILING_COMMA = re.compile(r",(\s*+[\]}])")
MARK = r"[*_#>\s]*+(?:\d++[.)]\s*+)?+[*_]*+"
ASKED, TOLD = "(?:Q(?:uestion)?|Frage|Pregunta)", "(?:A(?:nswer)?|Antwort|Réponse|Respuesta)"
AFTER = r"\s*+\d*+[*_]*+\s*+[:.)][*_]*+\s*+(.+)"
QUESTION_LINE = re.compile(rf"{MARK}{ASKED}{AFTER}", re.IGNORECASE)
ANSWER_LINE = re.compile(rf"{MARK}{TOLD}{AFTER}", re.IGNORECASE)
ANSWER_INSIDE = re.compile(rf"(?<!\s)\s++{TOLD}\s*+:\s*+")


@dataclass(frozen=True)
class Pair:
    """One question with its answer, blanks at the ends removed. problem: why it is none, where it is none."""

    question: str
    answer: str
    problem: str = ""


def parse_answer(raw: str) -> list[Pair]:
    """The pairs in what a model wrote, in its order; none where there are none. Never raises for any text."""
    text = _without_thoughts(raw)
    pairs: list[Pair] = []
    others, at = [], 0
    for begin, end, value in _values(text):
        if found := _pairs_of(value):
            pairs += found
            others.append(text[at:begin])
            at = end
    pairs += _from_lines("\n".join([*others, text[at:]]))
    return pairs or _from_literal(text)


def parse_verdict(raw: str) -> bool | None:
    """What a judge said: yes, no, or neither (None)."""
    word = re.search(r"[a-z]+", _without_thoughts(raw).lower())
    return {"yes": True, "no": False}.get(word[0]) if word else None


def _without_thoughts(raw: str) -> str:
    """`raw` without what stands between <think> and </think>, or before a </think> that nothing opens."""
    text, parts, at = raw[:MAX_ANSWER], [], 0
    while (begin := text.find("<think>", at)) >= 0 and (end := text.find("</think>", begin)) >= 0:
        parts.append(text[at:begin])
        at = end + len("</think>")
    return "".join([*parts, text[at:]]).rpartition("</think>")[2].strip()


def _values(text: str) -> Iterator[tuple[int, int, Any]]:
    """JSON values in `text`, from each brace or bracket on that is in none: where each begins, ends, and itself."""
    loose = TRAILING_COMMA.sub(r" \1", text)
    decoder = json.JSONDecoder(strict=False)  # a model's strings may hold line ends
    left, at = MAX_SCANNED, 0
    while left > 0 and (match := OPENING.search(text, at)):
        begin, at = match.start(), match.end()
        for spelled in (text, loose) if loose != text else (text,):
            try:
                value, at = decoder.raw_decode(spelled, begin)
            except json.JSONDecodeError as error:
                left -= TRY + error.pos  # it has counted the lines before
            except (ValueError, RecursionError):  # a number of thousands of digits; thousands of brackets
                left -= TRY + len(text)
            else:
                yield begin, at, value
                break


def _from_literal(text: str) -> list[Pair]:
    """The pairs of a value as Python writes it."""
    if "'" not in text:
        return []
    for match in itertools.islice(OPENING.finditer(text), 3):
        for closing in "}]":
            last = text.rfind(closing)
            for end in (last, text.rfind(closing, 0, max(last, 0))):
                if not match.start() < end <= match.start() + MAX_LITERAL:
                    continue
                try:
                    pairs = _pairs_of(ast.literal_eval(text[match.start() : end + 1]))
                except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, OverflowError):
                    continue
                if pairs:
                    return pairs
    return []


def _pairs_of(value: Any) -> list[Pair]:
    wanted = False  # each item is meant as a pair
    if isinstance(value, dict):
        fields = _folded(value)
        if fields.keys() & {"question", "answer"}:
            return [_pair(value)]
        wanted = "pairs" in fields
        value = fields["pairs"] if wanted else next((of for of in fields.values() if isinstance(of, list)), [])
        if isinstance(value, dict):
            value = [value]
    if not isinstance(value, list):
        return []
    return [
        _pair(of) for of in value if wanted or (isinstance(of, dict) and _folded(of).keys() & {"question", "answer"})
    ]


def _folded(value: dict[Any, Any]) -> dict[str, Any]:
    return {name.casefold(): of for name, of in value.items() if isinstance(name, str)}


def _pair(value: Any) -> Pair:
    if not isinstance(value, dict):
        return Pair("", "", f"got {type(value).__name__}; wanted a question and an answer")
    fields = _folded(value)
    question, answer = _text(fields.get("question")), _text(fields.get("answer"))
    wrong = [name for name, text in (("question", question), ("answer", answer)) if text is None]
    got = [f"{name}: got {type(fields[name]).__name__ if name in fields else 'none'}; wanted a text" for name in wrong]
    return Pair(question or "", answer or "", "; ".join(got))


def _text(value: Any) -> str | None:
    try:
        return _clean(str(value)) if isinstance(value, str | int | float) else None
    except ValueError:  # a number of thousands of digits
        return None


def _from_lines(text: str) -> list[Pair]:
    pairs: list[Pair] = []
    question: str | None = None
    for line in [*text.splitlines(), "Q: the end"]:
        if asked := QUESTION_LINE.match(line):
            if question is not None:
                pairs.append(Pair(_clean(question), "", "answer: got none; wanted a text"))
            question = asked[1]
            if told := ANSWER_INSIDE.search(question):
                pairs.append(Pair(_clean(question[: told.start()]), _clean(question[told.end() :])))
                question = None
        elif (told := ANSWER_LINE.match(line)) and question is not None:
            pairs.append(Pair(_clean(question), _clean(told[1])))
            question = None
    return pairs


def _clean(text: str) -> str:
    """`text` without blanks and bold marks at its ends, and without what UTF-8 cannot say (halves of pairs)."""
    return text.encode("utf-8", "replace").decode().strip().strip("*").strip()
