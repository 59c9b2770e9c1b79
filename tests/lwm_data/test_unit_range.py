"""Shares of a build's units: each unit in exactly one, whatever their number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_data.unit_range import parse_unit_range


@given(num_units=st.integers(0, 200), num_shares=st.integers(1, 40))
def test_every_unit_belongs_to_exactly_one_share(num_units: int, num_shares: int) -> None:
    shares = [parse_unit_range(f"{share}/{num_shares}").of(num_units) for share in range(1, num_shares + 1)]
    assert sorted(unit for share in shares for unit in share) == list(range(num_units))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(num_units=st.integers(0, 50), start=st.integers(0, 60), length=st.integers(1, 60))
def test_a_stretch_is_that_of_python(num_units: int, start: int, length: int) -> None:
    stretch = parse_unit_range(f"{start}:{start + length}")
    if 0 < num_units <= start:
        with pytest.raises(ValueError, match=f"got {start}:{start + length}; there are {num_units} units"):
            stretch.of(num_units)
    else:
        assert list(stretch.of(num_units)) == list(range(num_units))[start:][:length]


@pytest.mark.parametrize("text", ["", "0/3", "4/3", "3", "a/b", "1/0", "5:5", "7:3", "-1:3", "1/2/3", "1:", "1/3 "])
def test_another_form_is_refused_with_the_right_one(text: str) -> None:
    with pytest.raises(ValueError, match="wanted a share such as 3/16"):
        parse_unit_range(text)
