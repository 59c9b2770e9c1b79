"""Needle prompts (length, depth, borders) and how answers are scored."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from lwm_data.format.prompt import needle, needle_answer, needle_prompt, needle_question
from lwm_data.format.vocab import TextTokenizer
from lwm_train.config import ModelSpec, NeedleSpec
from lwm_train.evaluate import needle as needle_module
from lwm_train.evaluate.needle import NeedlePrompt, evaluate_needle, needle_prompts, read_haystack
from lwm_train.model import init_params

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory, corpus_text: str) -> NeedleSpec:
    folder = tmp_path_factory.mktemp("haystack")
    (folder / "a.txt").write_text(corpus_text[:20_000], encoding="utf-8")
    (folder / "b.txt").write_text(corpus_text[20_000:], encoding="utf-8")
    return NeedleSpec(haystack=str(folder / "*.txt"), lengths=(128, 500, 1024), depths=DEPTHS, rounds=3, seed=1)


@pytest.fixture(scope="module")
def prompts(demo_tokenizer: TextTokenizer, spec: NeedleSpec) -> list[NeedlePrompt]:
    return needle_prompts(demo_tokenizer, read_haystack(spec.haystack), spec)


def test_a_prompt_has_its_number_of_tokens_or_hardly_less(
    demo_tokenizer: TextTokenizer, prompts: list[NeedlePrompt]
) -> None:
    for prompt in prompts:
        assert prompt.ids == (demo_tokenizer.bos, *demo_tokenizer.encode(prompt.text))
        assert prompt.length - 2 <= len(prompt.ids) <= prompt.length
    exact = sum(len(prompt.ids) == prompt.length for prompt in prompts)
    assert exact >= 0.9 * len(prompts)


def test_a_needle_stands_once_at_its_depth_between_sentences(prompts: list[NeedlePrompt], corpus_text: str) -> None:
    for prompt in prompts:
        fact = needle(prompt.city, prompt.number)
        before, after = prompt.text.split(fact)
        frame_before, frame_after = needle_prompt("\0", [prompt.city]).split("\0")
        assert before.startswith(frame_before) and after.endswith(frame_after)
        before, after = before.removeprefix(frame_before), after.removesuffix(frame_after)
        assert str(prompt.number) not in before + after
        assert needle_question([prompt.city]) in frame_after
        assert before == "" or after == "" or before[-1].isspace() or before.rstrip("\"'”’)")[-1] in ".!?"
        num_chars = len(before) + len(after)
        assert abs(len(before) / num_chars - prompt.depth) < (0.5 if prompt.length == 128 else 0.15)
        if prompt.depth in (0.0, 1.0):
            assert len(before) == prompt.depth * num_chars
        assert before + after in read_back(corpus_text)


def read_back(corpus_text: str) -> str:
    """The haystack of `spec` as one text."""
    return corpus_text[:20_000].strip() + "\n\n" + corpus_text[20_000:].strip()


def test_prompts_depend_on_nothing_but_their_own_case(
    demo_tokenizer: TextTokenizer, spec: NeedleSpec, prompts: list[NeedlePrompt]
) -> None:
    fewer = spec.model_copy(update={"lengths": (500,), "depths": (0.5,), "rounds": 2})
    again = needle_prompts(demo_tokenizer, read_haystack(spec.haystack), fewer)
    assert again == [p for p in prompts if p.length == 500 and p.depth == 0.5 and p.round < 2]
    other = needle_prompts(demo_tokenizer, read_haystack(spec.haystack), fewer.model_copy(update={"seed": 2}))
    assert all(a.text != b.text for a, b in zip(again, other, strict=True))
    assert len({(p.city, p.number) for p in prompts}) == len(prompts)


def test_a_short_haystack_is_repeated(demo_tokenizer: TextTokenizer, spec: NeedleSpec) -> None:
    (prompt,) = needle_prompts(
        demo_tokenizer,
        "A short tale. It ends soon.",
        spec.model_copy(update={"lengths": (400,), "depths": (0.5,), "rounds": 1}),
    )
    assert 398 <= len(prompt.ids) <= 400


def test_a_length_without_room_and_a_missing_haystack_are_refused(
    demo_tokenizer: TextTokenizer, spec: NeedleSpec, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"needle.lengths: got 20; the question alone takes"):
        needle_prompts(demo_tokenizer, "Some text. " * 99, spec.model_copy(update={"lengths": (20,)}))
    with pytest.raises(ValueError, match="no text in 0 files"):
        read_haystack(str(tmp_path / "*.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt: not UTF-8"):
        read_haystack(str(tmp_path / "*.txt"))


def test_right_answers_are_counted_in_their_cell(
    demo_tokenizer: TextTokenizer, spec: NeedleSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the model that knows every answer at depth 0.5, one of three at depth 1, and none elsewhere."""
    small = spec.model_copy(update={"lengths": (128, 500)})
    prompts = needle_prompts(demo_tokenizer, read_haystack(spec.haystack), small)

    def know(
        params: object, config: object, ids: list[tuple[int, ...]], *args: object, **keys: object
    ) -> list[list[int]]:
        answers = []
        for prompt, given in zip(prompts, ids, strict=True):
            assert given == prompt.ids
            knows = prompt.depth == 0.5 or (prompt.depth == 1 and prompt.round == 0)
            number = prompt.number if knows else prompt.number + 1
            answers.append(demo_tokenizer.encode(needle_answer([(prompt.city, number)])).tolist())
        return answers

    monkeypatch.setattr(needle_module, "generate", know)
    result = evaluate_needle(None, None, demo_tokenizer, small)  # type: ignore[arg-type]
    assert result.accuracy == ((0, 0, 1, 0, 1 / 3),) * 2
    assert result.mean_accuracy == pytest.approx(4 / 15)
    for answer, prompt in zip(result.answers, prompts, strict=True):
        assert prompt.text.endswith(answer.tail) and answer.num_tokens == len(prompt.ids)
        assert answer.is_right == (f"number is: {answer.number}." in answer.answer)


def test_a_model_that_was_not_trained_finds_nothing(demo_tokenizer: TextTokenizer, spec: NeedleSpec) -> None:
    config = ModelSpec(preset="tiny").config(demo_tokenizer.vocab_size)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    small = spec.model_copy(update={"lengths": (128,), "rounds": 1})
    done: list[int] = []
    result = evaluate_needle(params, config, demo_tokenizer, small, done.append)
    assert sum(done) == len(result.answers) == 5
    assert result.mean_accuracy == 0
    assert all(answer.answer for answer in result.answers)
