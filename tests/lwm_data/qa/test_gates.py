"""Each gate turns away what it is for, in each language with a prompt, and lets good pairs through."""

import pytest

from lwm_data.manifest_qa import Gates, read_prompt
from lwm_data.qa.answers import Pair
from lwm_data.qa.gates import grounded_share, normalised, pair_problem
from lwm_data.qa.languages import book_language
from tests.conftest import DEMO, ROOT

CHUNK = (
    "Captain Ahab nailed a gold doubloon to the mast of the Pequod on Monday, and Starbuck looked at it in silence. "
    "Le capitaine Achab cloua une pièce d'or au mât du navire. Kapitän Ahab nagelte eine goldene Dublone an den Mast. "
    "El capitán Ahab clavó una moneda de oro en el mástil del barco."
)


def problem(question: str, answer: str, language: str = "en", **gates: object) -> str | None:
    found = pair_problem(Pair(question, answer), CHUNK, language, Gates.model_validate(gates))
    return found[0] if found else None


@pytest.mark.parametrize(
    ("language", "question", "answer"),
    [
        ("en", "What did Captain Ahab nail to the mast of the Pequod?", "A gold doubloon."),
        ("en", "Who looked at the doubloon in silence after Ahab nailed it to the mast?", "Starbuck looked at it."),
        ("en", "Is it true that Captain Ahab nailed a doubloon to the mast?", "Yes, on Monday."),
        ("en", "Who is the author of Moby Dick, which tells of Captain Ahab?", "Captain Ahab nailed gold."),
        ("de", "Was nagelte Kapitän Ahab an den Mast seines Schiffes?", "Eine goldene Dublone."),
        ("fr", "Qu'est-ce que le capitaine Achab cloua au mât du navire ?", "Une pièce d'or."),
        ("es", "¿Qué clavó el capitán Ahab en el mástil del barco?", "Una moneda de oro."),
    ],
)
def test_a_good_pair_passes(language: str, question: str, answer: str) -> None:
    assert problem(question, answer, language) is None


@pytest.mark.parametrize(
    ("language", "question"),
    [
        ("en", "According to the passage, what did Ahab nail to the mast?"),
        ("en", "What does Captain Ahab nail to the mast in this excerpt?"),
        ("en", "What does the author say about Captain Ahab?"),
        ("de", "Was nagelte Kapitän Ahab laut dem Text an den Mast?"),
        ("de", "Was sagt der Autor über Kapitän Ahab und den Mast?"),
        ("fr", "D'après le texte, que cloua le capitaine Achab au mât ?"),
        ("fr", "Que dit l’auteur du capitaine Achab dans cet extrait ?"),
        ("es", "Según el texto, ¿qué clavó el capitán Ahab en el mástil?"),
        ("es", "¿Qué dice el autor sobre el capitán Ahab?"),
    ],
)
def test_a_question_that_speaks_of_the_text_is_rejected(language: str, question: str) -> None:
    assert problem(question, "Ahab nagelte cloua clavó Ahab", language) == "speaks of the text"


@pytest.mark.parametrize(
    ("language", "question"),
    [
        ("en", "What did he nail to the mast of the ship?"),
        ("en", "Why was that man so silent when the day came?"),
        ("en", "What does the narrator think of Captain Ahab?"),
        ("de", "Was nagelte er an den hohen Mast?"),
        ("fr", "Que cloua-t-il au mât du grand navire ?"),
        ("es", "¿Qué clavó ella en el mástil del barco?"),
    ],
)
def test_a_question_about_nobody_named_is_rejected(language: str, question: str) -> None:
    assert problem(question, "Ahab", language) == "ambiguous without the chunk"


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Why?", "A gold doubloon.", "question too short"),
        ("What did Captain Ahab nail " + "very " * 100 + "hard?", "A gold doubloon.", "question too long"),
        ("What did Captain Ahab nail to the mast?", "", "answer too short"),
        ("What did Captain Ahab nail to the mast?", "gold " * 500, "answer too long"),
        ("What did Captain Ahab nail to the mast?", "A silver dollar from Boston.", "not grounded"),
        ("What did Captain Ahab nail to the mast?", "...", "not grounded"),
        ("Qu'est-ce que le capitaine Achab cloua au mât du navire ?", "Une pièce d'or.", "other language"),
    ],
)
def test_other_gates_turn_away(question: str, answer: str, reason: str) -> None:
    assert problem(question, answer) == reason


def test_every_gate_can_be_opened() -> None:
    open_gates = {"grounded": 0, "self_contained": False, "same_language": False}
    assert problem("Que dit-il dans le texte, hier et demain ?", "Rien.", "en", **open_gates) is None


def test_an_answer_in_other_forms_of_the_chunks_words_is_grounded() -> None:
    assert grounded_share(Pair("What was nailed?", "Ahab's golden doubloons"), CHUNK) == 1
    assert grounded_share(Pair("What was nailed?", "Ahab's silver dollars"), CHUNK) == pytest.approx(1 / 3)
    assert grounded_share(Pair("When?", "In 185"), "It was 1851.") == 0  # a number is whole


def test_questions_that_differ_in_marks_and_case_are_one() -> None:
    assert normalised("Who  is “Ahab”?") == normalised("who is AHAB")
    assert normalised("Who is Ahab?") != normalised("Who was Ahab?")


def test_novels_are_english_and_so_is_what_is_short_and_uncertain() -> None:
    for path in sorted((DEMO / "novels").glob("*.txt"))[:3]:
        assert book_language(path.read_text(encoding="utf-8")) == "en"
    assert problem("Queequeg, Tashtego, Daggoo?", "Ahab, Pequod", "en") is None


def test_the_prompts_that_ship_have_four_languages_and_say_how_to_answer() -> None:
    prompt = read_prompt(ROOT / "manifests" / "qa" / "prompts" / "questions.yaml")
    assert {"en", "de", "fr", "es"} <= prompt.languages.keys()
    for texts in prompt.languages.values():
        assert '{"pairs": [{"question": "...", "answer": "..."}]}' in texts.user
