"""What a pair must be to be kept; each reason is one of few, to be counted. docs/qa.md explains the rules.

broken pair                                without a question or an answer
question or answer too short, too long     characters
speaks of the text                         `according to the passage`, `in this excerpt`, `the author`, by language
ambiguous without the chunk                `he`, `this`, `the narrator` with nothing before it that it could mean
not grounded                               fewer of the answer's words stand in the chunk than `grounded` asks for
other language                             by py3langid, of question and answer together
question asked before                      in the same book; generate.py sees to it
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from lwm_data.manifest_qa import Gates
from lwm_data.qa.answers import Pair
from lwm_data.qa.languages import other_language

MARGIN = 0.5  # by which another language must be more likely than the book's
WORD = re.compile(r"\w+(?:['’]\w+)*")
STEM = 6  # letters of a longer word that are compared, so that its endings may differ
SHORT = 3  # letters: shorter words stand in every text and prove nothing, unless capital or digits


def _words(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(alternatives)})\b", re.IGNORECASE)


OF_THE_TEXT: Mapping[str, re.Pattern[str]] = {
    "en": _words(
        r"(?:the|this|that|given|above|following|provided) (?:given |above |following |provided |present |short )?"
        r"(?:passage|excerpt|extract|text|paragraph|snippet|chunk|story excerpt)s?",
        r"(?:the|this|its) author(?! of (?-i:[A-Z\"“]))(?:'s|’s)?",
        r"(?:in|of|from) this (?:chapter|story|book|novel|scene|section)",
        r"(?:as )?(?:mentioned|described|stated|told|quoted) (?:above|here)",
    ),
    "de": _words(
        r"(?:der|die|das|den|dem|des|diese[mnrs]?|vorliegende[nmrs]?|obige[nmrs]?) (?:(?:gegeben|vorliegend|obig)en? )?"
        r"(?:text(?:e?s|stelle|ausschnitt|auszug|passage)?|auszugs?|abschnitts?|ausschnitts?|passage|absatz(?:es)?)",
        r"laut text",
        r"(?:der|des|dem|den) autors?",
        r"in diese[mr] (?:kapitel|geschichte|buch|roman|szene)",
    ),
    "fr": _words(
        r"(?:le|du|au|ce|cet|cette|la|les|ces) (?:présent |présente )?(?:texte|passage|extrait|paragraphe)s?",
        r"l['’](?:extrait|auteur)",
        r"cet (?:extrait|auteur)",
        r"dans ce(?:tte)? (?:chapitre|histoire|livre|roman|scène)",
    ),
    "es": _words(
        r"(?:el|del|al|este|ese|la|esta|los|estos) (?:presente )?(?:texto|pasaje|fragmento|extracto|párrafo)s?",
        r"(?:el|del|al|este) autor",
        r"en est[ea] (?:capítulo|historia|libro|novela|escena)",
    ),
}
# Words that point at something; where no name or noun comes before one in the question, nothing says at what.
POINTERS: Mapping[str, re.Pattern[str]] = {
    "en": _words(
        *("he", "she", "they", "him", "them", "his", "her", "their", "it", "its", "this", "these", "those"),
        "that (?:man|woman|boy|girl|person|place|house|day|night|time|moment|scene)",
    ),
    "de": _words("er", "ihm", "ihn", "ihnen", "sein", "seine[mnrs]?", "diese[mnrs]?", "jene[mnrs]?"),
    "fr": _words("il", "elle", "ils", "elles", "lui", "leurs?", "ce", "cette", "ces", "celui", "celle"),
    "es": _words("él", "ella", "ellos", "ellas", "este", "esta", "estos", "estas", "ese", "esa", "aquel", "aquella"),
}
EXPLETIVES: Mapping[str, re.Pattern[str]] = {  # pointers that point at nothing: `who is it that`, `is it true`
    "en": re.compile(r"\b(?:is|was) it (?:that|who|when|to|true|possible|said|like)\b", re.IGNORECASE),
    "fr": re.compile(r"\b(?:est-ce|y a-t-il|qu['’]il y a|il y a|ce (?:que|qui|qu['’]))", re.IGNORECASE),
}
NAMELESS: Mapping[str, re.Pattern[str]] = {
    "en": _words(
        r"the (?:narrator|speaker|protagonist|main character|unnamed \w+)",
        r"(?:here|just now)(?=\W*$)",
        "(?:do|did|am|was|have|had|can|could|would|should) I",
    ),
    "de": _words(r"(?:der|des|dem|den) (?:ich-)?(?:erzählers?|sprechers?|protagonisten?)", r"hier(?=\W*$)", "ich"),
    "fr": _words(r"(?:le|du|au) (?:narrateur|locuteur|protagoniste)", r"ici(?=\W*$)", "je"),
    "es": _words(r"(?:el|del|al) (?:narrador|hablante|protagonista)", r"aquí(?=\W*$)", "yo"),
}


def pair_problem(pair: Pair, chunk: str, language: str, gates: Gates) -> tuple[str, str] | None:
    """Why `pair` about `chunk` cannot be kept: a reason, one of few, and the detail. None: it can."""
    if pair.problem:
        return "broken pair", pair.problem
    for name, text, (least, most) in (
        ("question", pair.question, gates.question_characters),
        ("answer", pair.answer, gates.answer_characters),
    ):
        if not least <= len(text) <= most:
            return f"{name} too {'short' if len(text) < least else 'long'}", f"{len(text):,} characters"
    if gates.self_contained and (found := _not_self_contained(pair, language)):
        return found
    share = grounded_share(pair, chunk)
    if share < gates.grounded:
        return "not grounded", f"{share:.2f} of the answer's words stand in the chunk"
    if gates.same_language and (other := other_language(f"{pair.question} {pair.answer}", language, MARGIN)):
        return "other language", f"{other}, the book is in {language}"
    return None


def normalised(question: str) -> str:
    """Equal for questions that differ only in case, accents' spelling, marks and blanks."""
    return " ".join(WORD.findall(_folded(question)))


def grounded_share(pair: Pair, chunk: str) -> float:
    """The share of the answer's words that stand in `chunk`, without those that stand in the question or in any text.

    An answer of such words alone (`Yes.`) is taken by all of its words; one without a word has share 0.
    """
    known = _folded(chunk)
    asked = {_stem(word) for word in WORD.findall(pair.question)}
    words = WORD.findall(pair.answer)
    told = [word for i, word in enumerate(words) if len(word) > SHORT or (i and word[0].isupper()) or word[0].isdigit()]
    counted = [stem for stem in map(_stem, told) if stem not in asked] or [_stem(word) for word in words]
    return sum(_begins_a_word(stem, known) for stem in counted) / len(counted) if counted else 0.0


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _stem(word: str) -> str:
    """The word in one case, without what endings and apostrophes add: `Ahab's`, `d'Ahab` and `Ahab` are one."""
    plain = max(re.split(r"['’]", _folded(word)), key=len)
    return plain[:STEM] if len(plain) > STEM else plain.removesuffix("s") if len(plain) > SHORT else plain


def _begins_a_word(stem: str, text: str) -> bool:
    """Whether a word of `text` begins with `stem`; where that is short, or a number, it must be the whole word."""
    # No set of the chunk's words: to make one takes 30 times as long as to look for those of one answer.
    at = text.find(stem)
    while at >= 0:
        end = at + len(stem)
        whole = len(stem) > SHORT and not stem[-1].isdigit()
        if not text[at - 1 : at].isalnum() and (whole or not text[end : end + 1].isalnum()):
            return True
        at = text.find(stem, at + 1)
    return False


def _not_self_contained(pair: Pair, language: str) -> tuple[str, str] | None:
    for name, text in (("question", pair.question), ("answer", pair.answer)):
        if language in OF_THE_TEXT and (match := OF_THE_TEXT[language].search(text)):
            return "speaks of the text", f"{name}: {match[0]}"
    if language not in POINTERS:
        return None
    if match := NAMELESS[language].search(pair.question):
        return "ambiguous without the chunk", match[0]
    question = EXPLETIVES[language].sub(" ", pair.question) if language in EXPLETIVES else pair.question
    match = POINTERS[language].search(question)
    if match and not _names_something(question[: match.start()]):
        return "ambiguous without the chunk", match[0]
    return None


def _names_something(before: str) -> bool:
    """Whether a word after the first one has a capital: a name (in German any noun) that a pointer may mean."""
    return any(word[0].isupper() and word != "I" for word in WORD.findall(before)[1:])
