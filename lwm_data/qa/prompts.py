"""What is said to a model about a chunk, from a prompt file, and the key under which the answer is kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from lwm_data.manifest_qa import PromptTexts, QaPrompt
from lwm_data.qa.answers import Pair
from lwm_data.qa.chunks import Chunk

Messages = list[dict[str, str]]  # {"role": system or user, "content": text}
PLACE = re.compile(r"\{(chunk|pairs|question|answer)\}")


def pair_messages(texts: PromptTexts, chunk: Chunk, pairs: int) -> Messages:
    """The messages that ask for `pairs` pairs about `chunk`."""
    places = {"chunk": chunk.text.strip(), "pairs": str(pairs)}
    return [{"role": "system", "content": texts.system}, {"role": "user", "content": _filled(texts.user, places)}]


def judge_messages(texts: PromptTexts, chunk: Chunk, pair: Pair) -> Messages:
    """The messages that ask whether `chunk` proves `pair`."""
    places = {"chunk": chunk.text.strip(), "question": pair.question, "answer": pair.answer}
    return [{"role": "user", "content": _filled(texts.judge, places)}]


def prompt_fingerprint(prompt: QaPrompt, language: str, pairs: int) -> str:
    """Equal for two prompts exactly when they ask for the same, so what must be asked anew has another."""
    texts = prompt.languages[language]
    return _sha256([prompt.name, prompt.version, language, texts.system, texts.user, pairs])


def answer_key(chunk: Chunk, model: str, fingerprint: str, parameters: Mapping[str, Any]) -> str:
    """The journal's key of what `model` wrote about `chunk`, 32 hex digits."""
    return _sha256(["answer", chunk.sha256, model, fingerprint, parameters])[:32]


def judge_key(answer: str, texts: PromptTexts, pair: Pair) -> str:
    """The journal's key of the verdict on `pair`, which came with the answer of the key `answer`."""
    return _sha256(["judge", answer, texts.judge, pair.question, pair.answer])[:32]


def _filled(text: str, places: Mapping[str, str]) -> str:
    """`text` with its places filled once: what a book says in braces stays as it is."""
    return PLACE.sub(lambda match: places.get(match[1], match[0]), text)


def _sha256(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
