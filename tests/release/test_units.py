"""Positions of ids against a dictionary, for integers and strings of any length."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.units import build, hashed, id_words, in_order, values

integers = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5), unique=True, max_size=80)
strings = st.lists(st.text(max_size=30), unique=True, max_size=80)


def check(known: list[object], asked: list[object], kind: pa.DataType) -> None:
    words = id_words(pa.array(known, kind))
    h = hashed(words)
    order = np.argsort(h)
    table = build(words, in_order(h, order), order)
    queries = table.read(pa.array(asked, kind))
    expected = {known[i]: rank for rank, i in enumerate(order)}
    assert table.find(hashed(queries), queries).tolist() == [expected.get(a, -1) for a in asked]


@given(integers, integers)
def test_integers(known: list[int], other: list[int]) -> None:
    check(list(known), [*other, *known], pa.int64())


@given(strings, strings)
def test_strings(known: list[str], other: list[str]) -> None:
    check(list(known), [*other, *known], pa.string())


def test_strings_that_differ_in_trailing_zero_bytes_or_length() -> None:
    known = ["a", "a\0", "a\0\0", "", "\0", "12345678", "123456789"]
    check(list(known), [*known, "\0\0", "1234567", "x" * 200], pa.string())


def test_the_extreme_hashes_are_not_mistaken_for_empty_places() -> None:
    """Integers whose hashes are all ones or zero, looked up in tables that do not hold them."""
    everything = np.arange(0, 2**64 - 1, 2**58, dtype=np.uint64)
    order = np.argsort(everything)
    table = build(everything.reshape(-1, 1), in_order(everything, order), order)
    asked = np.array([2**64 - 1, 0, 1, 2**64 - 2], np.uint64)
    assert table.find(asked, asked.reshape(-1, 1)).tolist()[0] == -1
    assert (table.find(asked, asked.reshape(-1, 1)) >= 0).tolist() == [False, True, False, False]


def test_sliced_and_dictionary_columns() -> None:
    whole = pa.array(["a", "bb", "ccc", "dd"])
    assert (id_words(whole.slice(1, 2)) == id_words(pa.array(["bb", "ccc"]))).all()
    assert (id_words(whole.dictionary_encode()) == id_words(whole)).all()
    assert values(pa.array([1, 2, 3]).slice(1), np.int64).tolist() == [2, 3]


def test_what_is_no_id_is_refused() -> None:
    for wrong in (pa.array([1.5]), pa.array([b"x"]), pa.array(["x" * 300]), pa.array([1, None])):
        with pytest.raises(InputError):
            id_words(wrong)
