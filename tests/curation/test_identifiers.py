"""Sec. 2.6: what the rules take for an identifier, however it is written, in time linear in the text."""

import time

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.curation.candidates import candidate_rows
from flywheel_tasks.curation.identifiers import find, merge
from flywheel_tasks.curation.normalise import fold
from flywheel_tasks.curation.privacy import identifiers, mask


@pytest.mark.parametrize(
    "text", ["4111 1111 1111 1112", "GB82 WEST 1234 5698 7654 33", "2341 2341 2347", "000-12-3456"]
)
def test_a_wrong_check_digit_is_no_card_iban_or_aadhaar(text: str) -> None:
    assert not {span.entity for span in identifiers(text)} & {"CARD", "IBAN", "AADHAAR", "SSN"}


@pytest.mark.parametrize(
    "separator",
    ["  ", "\t", "\n", "\r\n", ",", ", ", "/", "_", " - ", "\u00a0\u00a0", "...", "·", "•", "*", "|", " | "],
)
@pytest.mark.parametrize(
    ("groups", "entity"),
    [
        (("4111", "1111", "1111", "1111"), "CARD"),
        (("3782", "822463", "10005"), "CARD"),
        (tuple("4111111111111111"), "CARD"),
        (("DE89", "3704", "0044", "0532", "0130", "00"), "IBAN"),
        (("GB82", "WEST", "1234", "5698", "7654", "32"), "IBAN"),
    ],
)
def test_a_separator_hides_no_card_and_no_iban(groups: tuple[str, ...], entity: str, separator: str) -> None:
    text = f"pay to {separator.join(groups)} now"
    assert candidate_rows(pa.array([text])).tolist() == [0]
    assert mask(text, identifiers(text)) == f"pay to [{entity}] now"


def test_lists_of_numbers_are_no_cards() -> None:
    """One in ten would pass the check digit, but no card is printed in such groups."""
    rng = np.random.default_rng(3)
    for separator in (", ", ",", "\n", "\t", "/", "  "):
        for digits in (2, 3, 5, 6):
            for _ in range(40):
                numbers = rng.integers(10 ** (digits - 1), 10**digits, size=12)
                listed = separator.join(map(str, numbers.tolist()))
                assert "CARD" not in {span.entity for span in identifiers(listed)}, listed


def test_merging_names_the_union_by_precedence() -> None:
    text = "https://user:pw@example.com/x"
    assert [(s.start, s.end, s.entity) for s in merge(find(text))] == [(0, len(text), "URL_SECRET")]


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "1",
        "1 ",
        "12-",
        "@",
        "a@",
        "a.",
        " at ",
        "x at x dot ",
        ":",
        "http://",
        "one ",
        "1 Aa bb ",
        "+1(",
        "GB12 ",
        "//a:b@",
        "1.1.",
        "a[at]",
        "a\u200b",
        "नमस्ते ",
        "call 1234567 ",
        "insta is ",
        "Rue a ",
        "Rua a, ",
        "0171/1234567 ",
        "(415) ",
        "12 11 1998 ",
        "DE 89 ",
        "a%40b.",
        "a arroba b ponto ",
    ],
)
def test_a_long_text_takes_linear_time_whatever_it_repeats(unit: str) -> None:
    """100 kB in under 1.5 s each: a pattern that backtracks would take minutes."""
    start = time.process_time()
    find(fold(unit * (100_000 // len(unit))).text)
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize(
    ("head", "unit", "tail"),
    [
        ("", "1 ", "1%"),
        ("", "ig.", ""),
        ("", "one ", "onex"),
        ("insta", " ", "!"),
        ("Rue a", " ", "!"),
        ("1 a", "\n", "!"),
        ("a@", "b.", "1"),
        ("", "4 5 ", ""),
    ],
)
def test_a_megabyte_that_fails_at_its_end_is_read_once(head: str, unit: str, tail: str) -> None:
    """A run that is tried again from each of its characters takes 16 times as long for 4 times the text."""
    for size, seconds in ((50_000, 0.7), (1_000_000, 6.0)):
        start = time.process_time()
        identifiers(head + unit * (size // len(unit)) + tail)
        assert time.process_time() - start < seconds
