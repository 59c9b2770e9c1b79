"""Which language a text is in, by py3langid. Short texts are uncertain, so a margin goes with the answer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

SAMPLES = 5  # places of a book that are looked at
SAMPLE = 2000  # characters of each


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def book_language(text: str) -> str:
    """ISO 639 code of the language that most of `text` is in."""
    step = max(len(text) // SAMPLES, SAMPLE)
    return str(_identifier().classify(" ".join(text[at : at + SAMPLE] for at in range(0, len(text), step)))[0])


def other_language(text: str, language: str, margin: float) -> str | None:
    """The language that `text` is in where it is surely not `language`: more likely by `margin` (0 to 1)."""
    identifier = _identifier()
    if language not in identifier.labels:
        return None
    best, likely = identifier.classify(text)
    if best == language or likely - dict(identifier.rank(text))[language] <= margin:
        return None
    return str(best)
