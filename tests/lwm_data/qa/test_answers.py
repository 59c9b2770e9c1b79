"""Pairs are found in whatever a model writes, and nothing that it writes is an error."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lwm_data.qa.answers import Pair, parse_answer, parse_verdict

WHO = Pair("Who is it?", "Ahab")
TWO = [WHO, Pair("Where?", "At sea")]
ONE = '{"question": "Who is it?", "answer": "Ahab"}'
OTHER = '{"question": "Where?", "answer": "At sea"}'


@pytest.mark.parametrize(
    ("raw", "pairs"),
    [
        (f'{{"pairs": [{ONE}, {OTHER}]}}', TWO),
        (f"```json\n[{ONE}, {OTHER}]\n```", TWO),
        (f'Sure! Here you are:\n\n{{"pairs": [{ONE},\n {OTHER},],}}\nBye [1] {{x}}', TWO),
        (f"{ONE}\n{OTHER}", TWO),
        (ONE, [WHO]),
        (f"<think>{{no}} {OTHER}</think>{ONE}", [WHO]),
        ("{'pairs': [{'question': 'Who is it?', 'answer': 'Ahab'}]}", [WHO]),
        ("[{'question': \"Who is it?\", 'answer': 'Ahab',},]", [WHO]),
        ('{"questions": [' + ONE + "]}", [WHO]),
        ('{"pairs": [{"question": "Who\nis it?", "answer": 3}]}', [Pair("Who\nis it?", "3")]),
        ("Q: Who is it?\nA: Ahab\n\nQ2: Where?\nA2: At sea", TWO),
        ("1. **Question:** Who is it?\n   **Answer:** Ahab", [WHO]),
        ("Frage: Wer ist es?\nAntwort: Ahab", [Pair("Wer ist es?", "Ahab")]),
        ("Question : Qui est-ce ?\nRéponse : Ahab", [Pair("Qui est-ce ?", "Ahab")]),
        ("Q: Who is it? A: Ahab", [WHO]),
        ('{"pairs": [{"question": "Who is it?", "ans', []),
        ("I cannot do that.", []),
        (f"Wanted: {ONE}. Here:\n{{'x': 1}} {{\"pairs\": [{OTHER}]}}", TWO),  # an echoed example comes first
        (f'{{"pairs": [{ONE}]}} and {{"pairs": [{OTHER}]}}', TWO),
        (f"{ONE}\nQ: Where?\nA: At sea", TWO),
        ('{"Pairs": [{"Question": "Who is it?", "ANSWER": "Ahab"}]}', [WHO]),
        ("{{'question': 'Who is it?', 'answer': 'Ahab'}}", [WHO]),
        (f"{OTHER} hm </think>{ONE}", [WHO]),
        ('{"question": "What is [a, b, ] then?", "answer": "x, }y"}', [Pair("What is [a, b, ] then?", "x, }y")]),
        ("[" * 100_000, []),
        ('{"a":' * 5000, []),
    ],
)
def test_pairs_are_found(raw: str, pairs: list[Pair]) -> None:
    assert parse_answer(raw) == pairs


@pytest.mark.parametrize(
    ("raw", "questions"),
    [
        ('{"pairs": [{"question": null, "answer": "x"}, 3, []]}', ["", "", ""]),
        ('[{"question": "Who?"}, {"question": "Where?", "answer": ["x"]}, {"answer": null}]', ["Who?", "Where?", ""]),
        ("{'question': 'Who?', 'answer': 0x" + "f" * 5000 + "}", ["Who?"]),
        ("Q: Who?\nQ: Where?", ["Who?", "Where?"]),
    ],
)
def test_what_is_meant_as_a_pair_and_is_none_has_a_problem(raw: str, questions: list[str]) -> None:
    pairs = parse_answer(raw)
    assert [pair.question for pair in pairs] == questions
    assert all(pair.problem for pair in pairs)


@pytest.mark.parametrize(
    "raw",
    [
        "*" * 500_000,
        "<think>" * 140_000,
        "Q: x" + " " * 500_000 + "y",
        "Q" + " " * 500_000,
        "Q: " + "A " * 50_000,
        "{x" * 100_000,
        "['" * 50_000,
        "{'a':" * 2_000,
        "[{'a':(" * 90 + "'",
        "," + " ," * 100_000,
        "Q1" + "1" * 100_000,
    ],
)
def test_long_answers_are_read_in_one_pass(raw: str) -> None:
    pairs = parse_answer(raw)  # a pattern that goes back over these takes minutes to hours
    assert sum(len(pair.question) + len(pair.answer) for pair in pairs) <= len(raw)


PIECES = [
    "{",
    "}",
    "{{",
    "[",
    "]",
    '"',
    "'",
    ":",
    ",",
    "\\",
    " ",
    "\n",
    "Q:",
    "A:",
    "question",
    "answer",
    "pairs",
    "0x",
]


@given(st.text() | st.lists(st.sampled_from([*PIECES, "'question': 'Who?',", "1", "\ud800", "<think>"])).map("".join))
@example("{{'question': 'Who?', 'answer': 'Ahab'}}")
@example("{'question': 'Who?', 'answer': 0x" + "f" * 5000 + "}")
@example("{" + "'a'" + "-" * 9000 + "}")
def test_no_answer_is_an_error(raw: str) -> None:
    for pair in parse_answer(raw):
        written = json.dumps([pair.question, pair.answer], ensure_ascii=False).encode()
        assert json.loads(written) == [pair.question, pair.answer]


@pytest.mark.parametrize(
    ("raw", "verdict"),
    [
        ("yes", True),
        ("Yes, it does.", True),
        ("**No**", False),
        ("<think>yes</think> no", False),
        ("maybe", None),
        ("", None),
    ],
)
def test_a_verdict_is_its_first_word(raw: str, verdict: bool | None) -> None:
    assert parse_verdict(raw) is verdict
