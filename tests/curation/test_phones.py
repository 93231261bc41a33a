"""Sec. 2.6: telephone numbers as people write them are found whole, whatever stands beside them; other numbers stay."""

import numpy as np
import pytest

from flywheel_tasks.curation.identifiers import find
from flywheel_tasks.curation.phones import phone_numbers
from flywheel_tasks.curation.privacy import identifiers, mask


def masked(text: str) -> str:
    return mask(text, identifiers(text))


NUMBERS = (
    "9876543210", "98765 43210", "098765 43210", "91 9876543210", "+91 98765 43210", "07700 900123", "+44 7700 900123",
    "00447700900123", "020 7946 0958", "0171 1234567", "0171/1234567", "0151 23456789", "030 901820", "030/901820",
    "030 90 18 20", "91234-5678", "(11) 91234-5678", "+55 11 91234-5678", "06 12 34 56 78", "06.12.34.56.78",
    "044 668 18 00", "(415) 555-2671", "415.555.2671", "98765·43210", "020|7946|0958", "+49 30 901820",
)  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "phone:{}",
        "Mobile: {}",
        "whatsapp:{}",
        "Tel:{}",
        "#{}",
        "me={}",
        "mob-{}",
        "ph.{}",
        "or me/{}",
        "({})",
        "{}: that's mine",
        "{}:call me",
        "born 12.11.1998 {}",
        "on 12/11/2026 {} maybe",
        "2026-11-16 {}",
        "at 12:30 {}",
        "{} 12:30",
        "my number {} times",
        "text {} people think im lying",
        "me chama no zap {}",
    ],
)
def test_a_number_is_masked_whole_whatever_stands_beside_it(number: str, around: str) -> None:
    assert masked(around.format(number)) == around.format("[PHONE]")


@pytest.mark.parametrize(
    "text",
    [
        "it costs $1234567890 or €12500000 or £9,876,543",
        "R$ 1.234.567,89 and 12.500.000 Rp",
        "on 12.11.1998, 12/11/1998, 12-11-1998, 1998-11-12 and 12 11 1998",
        "from 2019-2020-2021 to 2022/2023",
        "at 12:34:56, or 08:30 - 12:45, on 2024-01-15 12:34",
        "we won 112-108 and 99-95, then 6-4, 7-5, 6-3",
        "pi is 3.14159265358979 and 0.1234567890 of it",
        "7800000000 people and 1 000 000 more",
        "order #1234567890, invoice no. 0012345678, tracking number 123456789012",
        "order number 48213907",
        "ISBN 978-3-030-12345-6, doi 10.1007/978-3-030-12345-6",
        "zip 12345-6789",
        "(3136-2005)*12=800-80-560=98000000000",
        "(6-1)(6-3)(6-7)(6-9) and (20/100)*25",
        "8f5fa95e-0185-4960-a9c3-89382210c123",
        "1920x1080, 40/50/70/85/100%",
        "&#1042469;",
        "10 9 8 7 6 5 4 3 2 1 liftoff",
        "level 120 with 4500 xp in 2024",
    ],
)
def test_prices_dates_times_scores_and_codes_stay(text: str) -> None:
    assert masked(text) == text


def test_random_numbers_of_the_everyday_forms_all_go() -> None:
    """A digit can make a shape another shape: a check of one example proves little."""
    rng = np.random.default_rng(7)

    def digits(count: int) -> str:
        return "".join(map(str, rng.integers(0, 10, count)))

    for _ in range(200):
        for text in (
            f"my phone:9{digits(9)}", f"it is 91 9{digits(9)}", f"it is 00447{digits(9)}", f"it is 0171 {digits(7)}",
            f"it is 0151 2{digits(7)}", f"it is 0171/{digits(7)}", f"it is 030 9{digits(5)}", f"it is 030/9{digits(5)}",
            f"it is 9{digits(4)}-{digits(4)}", f"born 12.11.1998 0171 {digits(7)}", f"it is 098765 {digits(5)}",
        ):  # fmt: skip
            assert masked(text).endswith(" [PHONE]") or masked(text).endswith(":[PHONE]"), text


def test_a_count_before_a_number_does_not_hide_it() -> None:
    assert masked("it has 5 98765 43210") == "it has 5 [PHONE]"
    assert masked("I am 5 (0171) 1234567") == "I am 5 [PHONE]"


def test_two_numbers_are_two() -> None:
    assert masked("9876543210/9876543211") == "[PHONE]/[PHONE]"
    assert masked("call 9876543210,9876543211") == "call [PHONE],[PHONE]"
    assert masked("0171 1234567 12.11.2026 030 901820") == "[PHONE] 12.11.2026 [PHONE]"


def test_a_word_that_runs_into_a_number_does_not_hide_it() -> None:
    assert masked("ph9876543210") == "ph[PHONE]"
    assert list(phone_numbers("tracking 1Z999AA10123456784")) == []


def test_a_number_in_a_link_stays_part_of_the_link() -> None:
    text = "https://example.com/9876543210"
    assert mask(text, identifiers(text)) == "[URL]"
    assert {span.entity for span in find(text)} == {"URL", "PHONE"}
