"""Check digits of the identifiers that carry one: cards (Luhn), IBAN (mod 97), Aadhaar (Verhoeff)."""

from typing import Final

IBAN_LENGTHS: Final[dict[str, int]] = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE BI", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BJ DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
"""Length of an IBAN by country, from the public IBAN registry."""

_VERHOEFF_PERMUTE: Final = (
    "0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415", "7046913258",
)  # fmt: skip
_VERHOEFF_MULTIPLY: Final = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1 check digit."""
    odd = sum(int(d) for d in digits[::-2])
    even = sum(int("0246813579"[int(d)]) for d in digits[-2::-2])
    return (odd + even) % 10 == 0


def mod97(iban: str) -> bool:
    """ISO 13616 check of an IBAN without separators."""
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1


def verhoeff(digits: str) -> bool:
    """Verhoeff check digit, as in Aadhaar numbers."""
    check = 0
    for position, digit in enumerate(reversed(digits)):
        permuted = int(_VERHOEFF_PERMUTE[position % 8][int(digit)])
        check = int(_VERHOEFF_MULTIPLY[check][permuted])
    return check == 0


def card_network(digits: str) -> bool:
    """Whether a card network issues numbers with this prefix and length."""
    size, two, three, four = len(digits), int(digits[:2]), int(digits[:3]), int(digits[:4])
    return (
        (digits[0] == "4" and size in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and size == 16)
        or (two in (34, 37) and size == 15)
        or ((300 <= three <= 305 or two in (30, 36, 38, 39)) and size in (14, 16))
        or (four in (1800, 2131) and size == 15)
        or (two in (35, 62, 64, 65, 81) and 16 <= size <= 19)
        or (four == 6011 and 16 <= size <= 19)
        or ((two in (50, 56, 57, 58, 59) or digits[0] == "6") and 12 <= size <= 19)
    )
