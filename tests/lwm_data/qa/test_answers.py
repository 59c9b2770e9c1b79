"""Pairs are found in whatever a model writes, and nothing that it writes is an error."""

import json

import pytest
from hypothesis import given
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
        ('{"pairs": [{"question": null, "answer": "x"}, 3, []]}', []),
        ("[" * 100_000, []),
        ('{"a":' * 5000, []),
    ],
)
def test_pairs_are_found(raw: str, pairs: list[Pair]) -> None:
    assert parse_answer(raw) == pairs


@given(st.text(st.sampled_from("{}[]\"':,\\ \nQA:questionanswer1\ud800"), max_size=200))
def test_no_answer_is_an_error(raw: str) -> None:
    for pair in parse_answer(raw):
        json.dumps([pair.question, pair.answer], ensure_ascii=False).encode()


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
