"""Telephone numbers in text (Sec. 2.6): a run of digits and marks, cut at its dates, then read by shape and by context.

A shape that people write in one country only, such as 0171/1234567, is a number wherever it stands, also among others;
a loose one, such as 555 1234, only as a whole run. As in identifiers.py, time is linear in the text.
"""

import re
from collections.abc import Iterator
from typing import Final

_RUN = re.compile(
    r"(?<![\w$€£₹])(?<!&#)(?<!\d\.)(?<!\d:(?=\d\d\b))(?:\+\s?|00)?\(?\d++(?:[ .\-/()·•*|]{1,3}\d++)*+"
    r"(?P<extension>\s?(?:x|ext\.?|extension)\s?\d{1,6}(?![\d:%]))?",
    re.I,
)
_S: Final = r"[ ./·•*|)-]{1,3}"
_B: Final = r"[ ·•*|)-]{1,3}"
_NATIONAL = re.compile(
    r"(?<!\d)(?<!\d[./·•*|-])(?:"
    rf"\(?0[1-9](?:\d{{1,4}}{_S}\d{{5,8}}|{_S}\d{{7,8}})"  # 030 901820, 0171/1234567, 098765 43210, 06-12345678
    rf"|\(?0\d{{2,3}}(?:{_S}\d{{3,4}}){{2}}|\(?0[1-9](?:{_S}\d\d){{4}}"  # 020 7946 0958, 06 12 34 56 78
    rf"|\(?0[1-9]\d{{1,3}}(?:{_S}\d{{2,3}})(?:{_S}\d\d){{2,3}}"  # 030 12 34 56, 044 668 18 00
    rf"|(?:1{_B})?\(?[2-9]\d\d{_S}[2-9]\d\d{_S}\d{{4}}"  # (415) 555-2671
    rf"|[6-9]\d{{4}}{_B}\d{{5}}|(?:\(?\d\d{_B})?9\d{{4}}{_B}\d{{4}}"  # 98765 43210, (11) 91234-5678
    r")(?![./·•*|-]?\d)"
    r"|(?<!\d)(?<!\d\.)(?:00[1-9]\d{7,14}|(?:\d{1,3}[ -])?\d{10}|\d{11,13})(?!\.?\d)"  # 00447700900123, 91 9876543210
)
_CONTEXT = re.compile(
    r"\b(?:call|phone|ph|tel|telephone|mob|mobile|cell|text|txt|whats\s?app|zap|fax|desk|contact|reach|ring|dial|sms|hotline"
    r"|(?:my|his|her|our|your|their|mera|meu|mi|meine|mon)\s(?:number|num|no|n[uú]mero|nummer|num[eé]ro)"
    r"|fon|telefon|m[oó]vil|celular|tel[eé]fono|llama|portable|cellulare|mobil|handy|registered)\b[^\n]{0,24}$",
    re.I,
)
_ORDER = re.compile(
    r"\b(?:order|invoice|ticket|tracking|receipt|booking|transaction|reference|ref|case|serial|isbn)"
    r"\s?(?:#|no\.?|nr\.?|num|number|id|code)\s?(?:is\s|[:#=]\s?)?$",
    re.I,
)
_UNIT = re.compile(
    r"\s?(?:usd|eur|dollars?|euros?|rupees?|rs|bucks|km|miles?|meters?|kg|lbs?|years?|people|points?|views|followers|users|"
    r"times|steps|words|tokens|degrees|million|billion)\b",
    re.I,
)
_DATE = re.compile(
    r"(?<!\d)(?<!\d[./-])(?:(?:1[89]|20)\d\d[-/. ](?:0?[1-9]|1[0-2])[-/. ](?:0?[1-9]|[12]\d|3[01])(?!\d)"
    r"|(?:0?[1-9]|[12]\d|3[01])(?:([-/.])(?:0?[1-9]|[12]\d|3[01])\1(?:1[89]|20)?\d\d(?![\d/-]|\.\d)"
    r"|\s(?:0?[1-9]|1[0-2])\s(?:19|20)\d\d(?!\d)))"
)
_DOI = re.compile(r"10\.\d{4,5}/")
_YEAR = re.compile(r"1[89]\d\d|20\d\d")
_NOT_ITS_OWN = re.compile(r":\d|%")
"""What makes the last group before it the hour of a time, or a percentage."""
_AFTER_WORD = re.compile(r"(?<=[a-z]{2})\+?\d{10,13}(?!\w)")
WORD_DIGIT: Final = r"(?:zero|oh|one|two|three|four|five|six|seven|eight|nine)"
_SPELLED = re.compile(rf"(?<!\w){WORD_DIGIT}(?:[\s,.-]{{1,3}}(?:double\s|triple\s)?{WORD_DIGIT}(?!\w)){{6,}}+", re.I)
_PAIRS = frozenset({(3, 4), (4, 4), (3, 7), (3, 8), (4, 6), (4, 7), (5, 5), (5, 6), (2, 7), (2, 8)})
_MOST_DIGITS, _LONGEST = 15, 80
_GLUE: Final = frozenset("-./#=:@(")
"""What stands before a number, and as often before a part of a code, a sum or a range."""
_CODE = re.compile(r"-?\w")


def phone_numbers(text: str) -> Iterator[tuple[int, int]]:
    """Where telephone numbers stand, also those whose digits are spelled as words."""
    for run in _RUN.finditer(text):
        if run.end() - run.start() >= 7:
            for start, end in _between_dates(text, *_own(text, run)):
                yield from _read(text, *_trim(text, start, end))
    for pattern in (_AFTER_WORD, _SPELLED):
        for match in pattern.finditer(text):
            yield match.span()


def _own(text: str, run: re.Match[str]) -> tuple[int, int]:
    """The run without a last group that belongs to what follows it."""
    start, end = run.span()
    if run["extension"] is None and _NOT_ITS_OWN.match(text, end):
        digits = re.search(r"\d++$", text[max(start, end - 16) : end])
        if digits and len(digits.group()) <= 3:
            return start, end - len(digits.group())
    return start, end


def _between_dates(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    if not (text[start] == "+" and sum(map(str.isdigit, text[start : min(end, start + 64)])) <= _MOST_DIGITS):
        for date in _DATE.finditer(text, start, end):
            yield start, date.start()
            start = date.end()
    yield start, end


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """The run without marks at its ends and without brackets that have no partner."""
    body = text[start:end].rstrip(" .-/()·•*|")
    end = start + len(body)
    opening, closing = body.find("("), body.find(")")
    if closing >= 0 and not 0 <= opening < closing:
        start += closing + 1
    elif opening >= 0 and closing < 0:
        start, end = (start + 1, end) if opening == 0 else (start, start + opening)
    body = text[start:end]
    return end - len(body.lstrip(" .-/)·•*|")), start + len(body.rstrip(" .-/()·•*|"))


def _read(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The run itself where it is a number, else the numbers of a national shape in it."""
    before = max(0, start - 40)
    told = _CONTEXT.search(text, before, start) is not None
    if _DOI.match(text, start, end) or (not told and _ORDER.search(text, before, start)):
        return
    if end - start <= _LONGEST and _is_phone(text, start, end, told):
        yield start, end
    else:
        for match in _NATIONAL.finditer(text, start, end):
            coded = text[match.start() - 1 : match.start()] in _GLUE and _CODE.match(text, match.end())
            if match.span() != (start, end) and not coded:
                yield match.span()


def _is_phone(text: str, start: int, end: int, told: bool) -> bool:
    number = re.split(r"(?i)\s?(?:x|ext)", text[start:end])[0]
    groups = re.findall(r"\d+", number)
    sizes = tuple(map(len, groups))
    digits, separators = sum(sizes), set(re.findall(r"[^\d+]", number))
    glued = start > 0 and text[start - 1] in _GLUE
    counted = _UNIT.match(text, end) is not None
    if _NATIONAL.fullmatch(number) or (number[:1] == "+" and 10 <= digits <= _MOST_DIGITS):
        return not ((counted or glued) and number.endswith("000")) and not (glued and _CODE.match(text, end))
    if counted or not 7 <= digits <= _MOST_DIGITS or all(map(_YEAR.fullmatch, groups)):
        return False
    if told or number[0] == "+":
        return True
    if glued or number.count("(") > 1 or separators & set("·•*|"):
        return False
    return ((number[0] == "(" or number.startswith("00")) and len(groups) > 1) or _is_loose(number, sizes, separators)


def _is_loose(number: str, sizes: tuple[int, ...], separators: set[str]) -> bool:
    """Groups that are a telephone number where nothing speaks against it."""
    if len(sizes) == 1 or separators == {"/"}:
        return False
    if separators == {"."} and (len(sizes) < 3 or all(size == 3 for size in sizes[1:])):
        return False
    if len(sizes) == 2:
        return sizes in _PAIRS and bool(separators & {" ", "-", "("})
    if re.fullmatch(r"\d{1,3}(?: 000)+", number):
        return False
    if max(sizes) == 1:
        return 10 <= sum(sizes) <= 13 and number[:17:2] != "123456789"
    return sum(sizes) >= 8 and min(sizes) >= 2 and len(sizes) <= 6
