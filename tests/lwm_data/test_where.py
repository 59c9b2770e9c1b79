"""Conditions on fields mean what Python means by the same words, and can do nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lwm_data.where import MAX_LENGTH, parse_where

NAMES = ["width", "caption", "p_2", "été", "LICENCE"]
VALUES = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "a", "CC0", 'it\'s "1"\n', "été"]),
    st.booleans(),
    st.none(),
)
FIELDS = st.fixed_dictionaries({name: VALUES for name in NAMES})

NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False)
)
ATOMS = st.one_of(
    st.sampled_from(NAMES),
    NUMBERS.map(repr),
    st.text(st.characters(codec="utf-8"), max_size=8).map(repr),
    st.sampled_from(["True", "False", "'CC0'", '"a"', "r'\\d'", "1_000", "0x1F", "1e3"]),
)
TUPLES = st.lists(ATOMS, max_size=3).map(lambda parts: f"({''.join(part + ', ' for part in parts)})")
LISTS = TUPLES.map(lambda text: f"[{text[1:-1]}]")
OPERATORS = st.sampled_from(["<", "<=", ">", ">=", "==", "!=", "in", "not in"])


@st.composite
def _comparisons(draw: st.DrawFn) -> str:
    text = draw(ATOMS | TUPLES | LISTS)
    for _ in range(draw(st.integers(1, 3))):
        operator = draw(OPERATORS)
        right = TUPLES | LISTS | st.sampled_from(NAMES)
        text = f"{text} {operator} {draw(right if operator.endswith('in') else ATOMS | right)}"
    return text


CONDITIONS = st.recursive(
    _comparisons(),
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("{} or {}".format, inner, inner),
        st.builds("({} or {} or {})".format, inner, inner, inner),
        st.builds("not ({})".format, inner),
    ),
    max_leaves=5,
)


def _python(text: str, fields: Mapping[str, Any]) -> Any:
    """What Python makes of `text`: a truth value, or the type of its error."""
    try:
        return bool(eval(text, {"__builtins__": {}}, dict(fields)))
    except (TypeError, NameError) as error:
        return type(error)


def _ours(text: str, fields: Mapping[str, Any]) -> Any:
    condition = parse_where(text)
    try:
        return condition(fields)
    except (TypeError, KeyError) as error:
        return type(error)


@settings(max_examples=200)
@given(text=CONDITIONS, fields=FIELDS)
@example("width < 3 == True", {name: 1 for name in NAMES})
@example("not width in (1, 2) and width not in [3]", {name: 1 for name in NAMES})
@example("caption in ('a CC0 b',) or LICENCE == 'CC0'", {name: "CC0" for name in NAMES})
@example("width != width", {name: float("nan") for name in NAMES})
@example("width < 3 < caption", {name: 5 for name in NAMES} | {"caption": "a"})  # never compares 3 with "a"
def test_a_condition_means_what_python_means(text: str, fields: dict[str, Any]) -> None:
    assume(len(text) <= MAX_LENGTH)
    got = _ours(text, fields)
    assert got is _python(text, fields)


@given(text=CONDITIONS, fields=FIELDS, missing=st.sets(st.sampled_from(NAMES), min_size=1))
@example("width > 0 and caption == 'a'", {name: 1 for name in NAMES}, {"caption"})
def test_a_field_that_is_needed_and_missing_is_a_key_error(
    text: str, fields: dict[str, Any], missing: set[str]
) -> None:
    assume(len(text) <= MAX_LENGTH)
    there = {name: value for name, value in fields.items() if name not in missing}
    wanted, got = _python(text, there), _ours(text, there)
    if wanted is NameError:
        assert got is KeyError
    else:  # a chain looks at all its fields, where Python stops at the first comparison that fails
        assert got in (wanted, KeyError)


def test_the_missing_field_is_named() -> None:
    with pytest.raises(KeyError, match="pwatermark"):
        parse_where("width > 1 and pwatermark < 0.8")({"width": 2})


def test_a_field_that_is_not_needed_may_be_missing() -> None:
    assert parse_where("width > 1 or pwatermark < 0.8")({"width": 2}) is True
    assert parse_where("width > 1 and pwatermark < 0.8")({"width": 0}) is False


class _Watched(Mapping[str, Any]):
    """Fields that remember which were asked for."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self.fields[name]

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a condition does not list the fields")

    def __len__(self) -> int:
        raise AssertionError("a condition does not count the fields")


@given(text=CONDITIONS, fields=FIELDS)
def test_a_condition_asks_for_the_fields_it_names_and_no_other(text: str, fields: dict[str, Any]) -> None:
    assume(len(text) <= MAX_LENGTH)
    watched = _Watched(fields)
    assert _ours(text, watched) is _ours(text, fields)
    assert all(name in text for name in watched.asked)


def test_a_name_of_pythons_own_is_a_field_like_any_other() -> None:
    fields = {"print": 1, "__class__": 2, "__import__": 3}
    assert parse_where("print == 1 and __class__ == 2 and __import__ == 3")(fields) is True
    with pytest.raises(KeyError, match="__builtins__"):
        parse_where("__builtins__ == 1")(fields)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true') == 0",
        "open('/etc/passwd') != ''",
        "print(1) == 1",
        "caption.__class__ != ''",
        "().__class__.__bases__ == ()",
        "caption.upper() == 'A'",
        "fields['caption'] == 'a'",
        "caption[0] == 'a'",
        "caption[:9] == 'a'",
        "(lambda: 1) != 2",
        "(lambda: 1)() == 1",
        "[x for x in (1, 2)] == (1, 2)",
        "(x for x in y) != 1",
        "{1: 2} == 1",
        "1 in {1, 2}",
        "1 in {x for x in y}",
        "(x := 3) < 4",
        "(yield) < 4",
        "await x < 4",
        "x if y < 1 else z",
        "(x < 4) < 4",
        "9 ** 9 ** 9 > 1",
        "'a' * 10000000000 != ''",
        "width + 1 > 2",
        "1 << 99999999999 > 0",
        "~width < 3",
        "+width < 3",
        "-width < 3",
        "--3 < 3",
        "-'a' < 3",
        "f'{width}' == '3'",
        "width < 1j",
        "caption == b'a'",
        "caption == None",
        "caption == ...",
        "caption is True",
        "caption in ('image')",
        "caption not in 'image'",
        "caption in 3",
        "caption != '' in 'image'",
        "caption is not None",
        "(*width, 3) == 3",
        "width",
        "not width",
        "True",
        "width > 1 and height",
        "3",
        "'a'",
        "",
        "   ",
        "# nothing",
        "width <",
        "< 3",
        "width < 3;",
        "width < 3; import os",
        "width < 3\nwidth > 1",
        "import os",
        "width = 3",
        "width =< 3",
        "width < 3 && height < 3",
        "width < 3 AND height < 3",
        "a b < 3",
        "width < '",
        "width < 3)",
        "\x00",
        "width\x00 < 3",
        "'\ud800' == caption",
        "(" * 500 + "width < 3" + ")" * 500,
        "lambda: " * 100 + "1",
        "width if width < 1 else " * 40 + "width",
    ],
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^where: "):
        parse_where(text)


DEEP = {
    "minus": "-" * 1000 + "1 < 2",
    "tilde": "~" * 1000 + "width < 2",
    "attributes": "width" + ".b" * 450 + " < 2",
    "calls": "width" + "()" * 450 + " < 2",
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP.keys())
def test_what_is_too_deep_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^where: "):
        parse_where(text)


def test_a_list_equals_a_field_that_is_a_list() -> None:
    assert parse_where("sizes == [1, 2]")({"sizes": [1, 2]}) is True
    assert parse_where("sizes == (1, 2)")({"sizes": [1, 2]}) is False


def test_a_condition_is_as_long_as_is_read_and_no_longer() -> None:
    longest = "width < 3".ljust(MAX_LENGTH)
    assert parse_where(longest)({"width": 2}) is True
    with pytest.raises(ValueError, match=r"at most 1,024 characters \(got 1,025\)"):
        parse_where(longest + " ")


@pytest.mark.parametrize(
    "text", ["not " * 250 + "width < 3", "width<" * 160 + "width", "width < 3 and " * 70 + "width < 3"]
)
def test_a_long_condition_is_walked_without_trouble(text: str) -> None:
    assert _ours(text, {"width": 2}) is _python(text, {"width": 2})


def test_the_message_shows_what_was_got_and_what_is_wanted() -> None:
    with pytest.raises(ValueError, match=r'a condition like "pwatermark < 0.8 .*" \(got .width <.: invalid syntax'):
        parse_where("width <")
    with pytest.raises(ValueError, match=r"a field, a number or a string \(got 'width \+ 1'\)"):
        parse_where("width + 1 < 3")
    with pytest.raises(ValueError, match=r"a list after in, as \('a b',\) \(got \"caption in 'a b'\"\)"):
        parse_where("caption in ('a b')")
    with pytest.raises(ValueError, match=r"one of < <= > >= == != in, not in \(got 'width is 3'\)"):
        parse_where("width is 3")
