"""Rule-based recognizers of high-risk identifiers (Sec. 2.6): pattern, then check digit or shape, then span.

A failed match must not be tried again from inside the run it failed on, or time is quadratic: runs are possessive or of
bounded length, and what may not follow one is looked at in Python. They read folded text (normalise.py).
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from flywheel_tasks.curation.checksums import IBAN_LENGTHS, card_network, luhn, mod97, verhoeff
from flywheel_tasks.curation.phones import phone_numbers


class Span(NamedTuple):
    """An identifier at [start, end) of a text."""

    start: int
    end: int
    entity: str
    inside: tuple[str, ...] = ()
    """Of a merged span: every entity found in it, in order of precedence."""


Recognizer = Callable[[str], Iterator[Span]]

_PROVIDERS: Final = (
    r"(?:gmail|googlemail|yahoo|hotmail|outlook|icloud|proton(?:mail)?|live|aol|gmx|yandex|mail|rediffmail|qq|163)"
)
_S: Final = r"\s{0,3}"
_AT: Final = rf"(?:{_S}[\[({{<]{_S}(?:at|@|arroba){_S}[\])}}>]{_S}|\s{{1,3}}(?:at|arroba)\s{{1,3}}|{_S}@{_S})"
_DOT_WORD: Final = "(?:dot|punto|ponto)"
_DOT: Final = (
    rf"(?:{_S}[\[({{<]{_S}(?:{_DOT_WORD}|\.){_S}[\])}}>]{_S}|\s{{1,3}}{_DOT_WORD}\s{{1,3}}|\s{{0,2}}\.\s{{0,2}})"
)
_LOCAL: Final = r"(?<![\w.+%'-])[\w.+%'-]++"
_EMAIL = re.compile(rf"{_LOCAL}@(?:[\w-]++\.)+[^\W\d_]{{2,24}}(?![\w-])", re.I)
_ENCODED = re.compile(r"(?<![\w.+'-])[\w.+'-]++%40(?:[\w-]++\.)+[^\W\d_]{2,24}(?![\w-])", re.I)
_PAYMENT = re.compile(
    rf"{_LOCAL}@(?:ok(?:axis|hdfcbank|icici|sbi)|wa(?:axis|hdfcbank|icici|sbi)|pt(?:axis|hdfc|sbi|yes)|[aiy]bl|axl|apl|yapl|upi|paytm"
    r"|airtel|freecharge|jupiteraxis|ikwik|sbi|icici|hdfcbank|axisbank|kotak|yesbank|barodampay|pnb|fbl|idfcbank|indus|federal)"
    r"(?![\w-]|\.\w)",
    re.I,
)
"""An address of India's UPI: name@bank."""
_SIGN = re.compile(_AT, re.I)
_HOST_DOT: Final = rf"(?:{_DOT}|\s?,\s?)"
_HIDDEN_HOST = re.compile(r"[\w-]{1,63}+")
_HIDDEN_LABEL = re.compile(rf"{_HOST_DOT}[\w-]{{1,24}}+(?![\w-])", re.I)
_HIDDEN_LOCAL = re.compile(
    rf"(?:(?<!\w)\w\s){{0,30}}(?<![\w+%-])[\w+%-]{{1,64}}+(?:{_DOT}[\w+%-]{{1,64}}+){{0,3}}$", re.I
)
_HIDDEN_TLD = re.compile(
    r"(?:com|net|org|edu|gov|io|co|in|de|uk|fr|es|it|ru|br|mx|me|us|info|dev|app|ai|ch|at|nl|pl|pt|ca|au|nz|jp|kr|cn|tw|hk|sg|vn|th"
    r"|za|ar|cl|pe|cz|sk|hu|ro|gr|se|fi|dk|ie|eu|tr|ua|il|ae|sa|pk|lk|np|xyz|biz|online|site|tech|gg|tv|ly|cc|cloud|email)",
    re.I,
)


def emails(text: str) -> Iterator[Span]:
    """Addresses, also with spaces around the sign or written as `name (at) host dot com`, and those of payments."""
    for sign, pattern in (("@", _EMAIL), ("@", _PAYMENT), ("%40", _ENCODED)):
        for match in pattern.finditer(text) if sign in text else ():
            start = match.start() + (match.group()[0] in ".'-%")
            yield Span(start, match.end(), "EMAIL")
    for at in _SIGN.finditer(text):
        end = _hidden_host(text, at)
        if end:
            local = _HIDDEN_LOCAL.search(text[max(0, at.start() - 80) : at.start()])
            if local:
                yield Span(at.start() - len(local.group()), end, "EMAIL")


def _hidden_host(text: str, sign: re.Match[str]) -> int:
    """Where the shortest host after the sign ends; 0 where there is none."""
    part = _HIDDEN_HOST.match(text, sign.end())
    for _ in range(4):
        part = part and _HIDDEN_LABEL.match(text, part.end())
        if part and _is_hidden_host(sign.group(), text[sign.end() : part.end()]):
            return part.end()
    return 0


def _is_hidden_host(sign: str, host: str) -> bool:
    labels = re.split(_HOST_DOT, host, flags=re.I)
    if not _HIDDEN_TLD.fullmatch(labels[-1]) or labels[0].lower() in ("the", "a", "this", "my"):
        return False
    provider = re.fullmatch(_PROVIDERS, labels[0], re.I) is not None
    if "," in host:
        return provider
    bracketed = any(c in sign for c in "[({<")
    rest = host[len(labels[0]) :]
    spelled = re.search(rf"\b{_DOT_WORD}\b|[\[({{<]", rest, re.I) is not None
    return provider or bracketed or spelled or ("@" in sign and not re.search(r"\.\s", rest))


_URL = re.compile(r"(?<![\w@])(?:[a-z][a-z+]{1,9}://[^\s<>\"'`]++|www\.[^\s<>\"'`]++)", re.I)
_TLD: Final = (
    "com|net|org|edu|gov|io|app|dev|info|biz|xyz|online|site|tech|gg|tv|ly|be|me|co\\.uk|co\\.in|com\\.br|"
    "de|fr|es|it|nl|ru|in|eu|ai|ee|gl|carrd\\.co|co"
)
_DOMAIN = re.compile(
    r"(?<![\w@./:-])(?<!%(?=40))(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)(?:[a-z0-9-]{1,63}\.){0,3}?"
    rf"(?P<tld>{_TLD})(?P<path>/[^\s<>\"'`]*+)?(?![\w@-]|\.\w)",
    re.I,
)
_OPEN_TLD = frozenset(
    ("com", "net", "org", "edu", "gov", "io", "info", "biz", "xyz", "co.uk", "co.in", "com.br", "carrd.co")
)
_SECRET = re.compile(
    r"[?&;#/](?:[\w-]*(?:token|secret|passw|pwd|auth|session|sess_?id|api_?key|signature|credential|otp|invite|reset)[\w-]*+"
    r"|key|sig|code|sid)[=/][^&\s]{4,}"
    r"|//[^/\s@]{1,128}:[^/\s@]{1,128}@",
    re.I,
)
_LONG_TOKEN = re.compile(r"[/=](?=[a-z]{0,99}\d)(?=\d{0,99}[a-z])[a-z0-9]{20,}(?![\w-])|[/=]eyJ[\w-]{10,}\.", re.I)


def urls(text: str) -> Iterator[Span]:
    """Links and bare domains; one that carries a credential or a long token is a URL_SECRET."""
    for match in _URL.finditer(text):
        link = match.group().rstrip(".,;:!?)]}»”\u2019*")
        if len(link) < 6 or ("." not in link and "://" not in link):
            continue
        secret = _SECRET.search(link[:4096]) or _LONG_TOKEN.search(link[:4096])
        yield Span(match.start(), match.start() + len(link), "URL_SECRET" if secret else "URL")
    for match in _DOMAIN.finditer(text):
        path = match["path"]
        if path is None and match["tld"].lower() not in _OPEN_TLD:
            continue
        link = match.group().rstrip(".,;:!?)]}")
        secret = _SECRET.search(link[:4096]) or _LONG_TOKEN.search(link[:4096])
        yield Span(match.start(), match.start() + len(link), "URL_SECRET" if secret else "URL")


_IPV4 = re.compile(r"(?<![\w.])(?<!v )(?:\d{1,3}\.){3}\d{1,3}(?:/\d{1,2}|:\d{2,5})?(?![\w]|\.\d)")
_IPV6 = re.compile(
    r"(?<![\w:.])[0-9a-f]{0,4}:[0-9a-f:]{1,40}+(?:\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3})?(?:%\w{1,15})?(?![\w:])", re.I
)
_VERSION = re.compile(r"\b(?:version|release|build|ver)\.?\s*$", re.I)


def ips(text: str) -> Iterator[Span]:
    """IPv4 and IPv6 addresses, with port or prefix; version numbers are not addresses."""
    for match in _IPV4.finditer(text):
        octets = re.split(r"[/:]", match.group())[0].split(".")
        if all(int(o) <= 255 for o in octets) and not _VERSION.search(text, max(0, match.start() - 12), match.start()):
            yield Span(match.start(), match.end(), "IP")
    if ":" not in text:
        return
    for match in _IPV6.finditer(text):
        candidate = match.group().split("%")[0].rstrip(":") if not match.group().endswith("::") else match.group()
        try:
            ipaddress.IPv6Address(candidate)
        except ValueError:
            continue
        if sum(c in "0123456789abcdefABCDEF" for c in candidate) >= 3:
            yield Span(match.start(), match.start() + len(match.group()), "IP")


_SEPARATOR: Final = r"[\s.,/_·•*|-]{1,3}"
_IBAN = re.compile(
    rf"(?:(?<![A-Za-z0-9])|(?<=iban))(?P<country>[A-Za-z]{{2}})(?P<apart>{_SEPARATOR})?\d{{2}}"
    rf"(?=(?:(?:{_SEPARATOR})?[A-Za-z0-9]){{11}})",
    re.I,
)


def ibans(text: str) -> Iterator[Span]:
    """IBANs of the country's length with a valid check number, with or without separators."""
    for match in _IBAN.finditer(text):
        length = IBAN_LENGTHS.get(match["country"].upper())
        if length is None:
            continue
        body = re.compile(rf"(?:[A-Za-z0-9](?:{_SEPARATOR})?+){{{length - 1}}}[A-Za-z0-9](?![A-Za-z0-9])").match(
            text, match.start()
        )
        if not body:
            continue
        code = re.sub(_SEPARATOR, "", body.group()).upper()
        # "is 26 years old …" is as long as an IBAN of Iceland, and one in 97 such texts has its check number.
        if mod97(code) and not (match["apart"] and 2 * sum(map(str.isdigit, code)) < length):
            yield Span(match.start(), body.end(), "IBAN")


_RUN = re.compile(rf"(?<!\d)(?<!\d\.)\d++(?:{_SEPARATOR}\d++)*+")
_GROUP = re.compile(r"\d++")
_CARD_START = re.compile(rf"[2-6]|1(?:{_SEPARATOR})?8|8(?:{_SEPARATOR})?1")
_CARD_LAYOUTS: Final = ((), (4, 4, 4), (4, 6), (4, 4, 4, 4))
"""Sizes of the groups of a printed card, but the last."""


def cards(text: str) -> Iterator[Span]:
    """Payment cards: a network's prefix and length, and a Luhn check, over consecutive groups of digits."""
    for run in _RUN.finditer(text):
        if run.end() - run.start() < 12:
            continue
        groups = [m.span() for m in _GROUP.finditer(text, run.start(), run.end())]
        first = 0
        while first < len(groups):
            digits, last = "", first
            found = None
            possible = _CARD_START.match(text, groups[first][0])
            while possible and last < len(groups) and len(digits) < 19:
                digits += text[groups[last][0] : groups[last][1]]
                last += 1
                if 12 <= len(digits) <= 19 and _is_card(digits) and _grouped(text, groups[first:last]):
                    found = last
            if found:
                yield Span(groups[first][0], groups[found - 1][1], "CARD")
            first = found or first + 1


def _is_card(digits: str) -> bool:
    return card_network(digits) and len(set(digits)) > 1 and luhn(digits)


def _grouped(text: str, groups: list[tuple[int, int]]) -> bool:
    """Cards are written digit by digit or in groups of three or more, with one kind of separator; one that also parts
    the numbers of a list (a comma, a new line, two marks) stands only between the groups of a printed card."""
    sizes = tuple(end - start for start, end in groups)
    separators = {text[end:start] for (_, end), (start, _) in pairwise(groups)}
    if len({"".join(separator.split()) for separator in separators}) > 1:
        return False
    if max(sizes) == 1 or sizes[:-1] in _CARD_LAYOUTS:
        return True
    return min(sizes[:-1]) >= 3 and len(separators) == 1 and separators <= {" ", ".", "-"}


_SSN = re.compile(r"(?<![\d-])(?!000|666)\d{3}(?P<sep>[ .-])(?!00)\d{2}(?P=sep)(?!0000)\d{4}(?![\d-])")
_SSN_PLAIN = re.compile(
    r"\b(?:ssn|social\s+security)\W{0,3}(?:(?:is|number|no|was)\W{1,3}){0,3}(?P<id>\d{9}|\d{3}-?\d{2}-?\d{4})(?!\d)",
    re.I,
)


def ssns(text: str) -> Iterator[Span]:
    """US social security numbers and ITINs: with separators, or plain after their name."""
    for match in _SSN.finditer(text):
        if match.group()[0] != "9" or match.group()[4] in "56789":
            yield Span(match.start(), match.end(), "SSN")
    for match in _SSN_PLAIN.finditer(text):
        yield Span(*match.span("id"), "SSN")


_AADHAAR = re.compile(r"(?<![\d-])[2-9]\d{3}([ -]?)\d{4}\1\d{4}(?![\d-])")


def aadhaars(text: str) -> Iterator[Span]:
    """Indian Aadhaar numbers with a valid Verhoeff digit."""
    for match in _AADHAAR.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if verhoeff(digits) and len(set(digits)) > 2:
            yield Span(match.start(), match.end(), "AADHAAR")


def phones(text: str) -> Iterator[Span]:
    """Telephone numbers."""
    for start, end in phone_numbers(text):
        yield Span(start, end, "PHONE")


STREET_SUFFIX: Final = (
    r"(?:street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|place|pl|squares?|sq|terrace|parkway|pkwy|"
    r"highway|hwy|close|crescent|cres|circle|trail|way|gardens|grove|mews|nagar|marg)"
)
STREET_UNIT: Final = r"(?:apt|apartment|suite|ste|flat|unit|po\s?box|p\.o\.\s?box|box|psc|floor)"
_STREET = re.compile(
    rf"(?<![\w.])\d{{1,6}}[a-z]?,?(?P<name>(?:\s++[^\W\d_][\w'\u2019.-]{{0,30}}){{1,4}}?)\s++(?P<suffix>{STREET_SUFFIX})\b\.?"
    rf"(?:,?\s++{STREET_UNIT}\.?\s*+(?:no\.?\s*+)?#?\d{{1,6}}[a-z]?\b)?",
    re.I,
)
_STREET_LAST = re.compile(
    r"(?<!\w)(?:[A-ZÀ-Þ][\w'\u2019-]{1,30}(?:straße|strasse|str\.|gasse|weg|platz|gatan|vägen|vej|veien|gata|katu|tie)"
    r"|(?:Rue|rue|Calle|calle|C/|Avenida|avenida|Av\.|Via|via|Viale|Piazza|Rua|rua|ulica|ul\.)\s++(?:[^\W\d_][\w'\u2019.-]{0,30}\s++){1,5}?"
    r"|(?:Rue|rue|Calle|calle|C/|Avenida|avenida|Av\.|Via|Viale|Piazza|Rua|rua)(?:\s++[^\W\d_][\w'\u2019.-]{0,30}){1,5}?"
    r"\s*+,(?:\s*+n[o.°]{0,2})?"
    r"|(?:[A-ZÀ-Þ][\w'\u2019-]{1,30}\s++){1,3}(?:utca|út|u\.|tér))\s*+(?:,\s*+)?\d{1,5}[a-z]?\b\.?"
)
_FRENCH = re.compile(
    r"(?<![\w.])\d{1,5}(?:\s?(?:bis|ter|[a-z]))?,?\s++"
    r"(?i:(?:rue|ruelle|all[ée]e|impasse|chemin|quai)\s++(?:(?:de|du|des|la|le|les)\s++)*+(?:[dl]['\u2019])?"
    r"|(?:avenue|av\.|boulevard|bd\.?|place|cours|route)\s++(?:(?:de|du|des|la|le|les)\s++|[dl]['\u2019])++)"
    r"[^\W\d_][\w'\u2019-]{0,30}(?:\s++[A-ZÀ-Þ][\w'\u2019-]{0,30}){0,3}"
)
_GERMAN = re.compile(
    r"(?<!\w)(?:[A-ZÀ-Þ][\w'\u2019.-]{0,30}\s++){1,3}(?:[Ss]tr\.|[Ss]tra(?:ß|ss)e|Weg|Platz|Allee|Gasse|Ufer|Damm)"
    r"\s*+\d{1,4}\s?[a-z]?\b"
)
_UNIT_ALONE = re.compile(rf"(?<!\w){STREET_UNIT}\.?\s*+(?:no\.?\s*+)?(?:#\s?)?\d{{1,6}}[a-z]?\b", re.I)
_NOT_STREET = re.compile(
    r"the|an?|of|in|on|to|and|or|at|for|from|with|is|was|per|more|other|min(?:utes?)?|hours?|days?|weeks?|months?|years?|miles?|km"
    r"|kilometers?|meters?|feet|foot|times?|mpg|mph|old|long|short|way|st|th|nd|rd|percent|people"
)
_PROPER_ONLY = re.compile(r"way|drive|place|close|court|square|circle|trail|st|dr|pl|ct|gardens|highway", re.I)


def addresses(text: str) -> Iterator[Span]:
    """Street addresses by house number and kind of street (English and common European forms), and unit numbers."""
    for match in _STREET.finditer(text):
        words = match["name"].split()
        proper = all(w[0].isupper() or not w[0].isalpha() for w in words) and not match["suffix"].islower()
        ordinary = any(_NOT_STREET.fullmatch(w.lower().strip(".,")) for w in words)
        if proper or not (ordinary or _PROPER_ONLY.fullmatch(match["suffix"])):
            yield Span(match.start(), match.end(), "ADDRESS")
    for pattern in (_STREET_LAST, _FRENCH, _GERMAN, _UNIT_ALONE):
        for match in pattern.finditer(text):
            yield Span(match.start(), match.end(), "ADDRESS")


_HANDLE = re.compile(r"(?<![\w@./])@[A-Za-z_][\w.]{1,29}(?<!\.)")
_HANDLE_NAMED = re.compile(
    r"\b(?:insta|instagram|ig|snap|snapchat|telegram|discord|twitter|tiktok|kik|wechat|skype|username|handle)\b"
    r"(?:\s++(?:is|id|handle|username|name|user|account)){0,3}\s*+(?:[:=-]\s*+)?(?=[\w.])",
    re.I,
)
_NAME = re.compile(r"[\w.]++(?:#\d{4})?")


def handles(text: str) -> Iterator[Span]:
    """Account names: @name, or a name with a digit or underscore after the service's name."""
    for match in _HANDLE.finditer(text):
        yield Span(match.start(), match.end(), "HANDLE")
    read = 0
    for match in _HANDLE_NAMED.finditer(text):
        # In "ig.ig.ig." the first name holds all others: to read on from each of them would be quadratic.
        if match.end() >= read and (name := _NAME.match(text, match.end())):
            read = name.end()
            if len(name.group()) >= 3 and re.search(r"[\d_]", name.group()) and not name.group().isdigit():
                yield Span(*name.span(), "HANDLE")


RECOGNIZERS: Final[tuple[Recognizer, ...]] = (
    urls, emails, ibans, cards, ssns, aadhaars, ips, addresses, phones, handles,
)  # fmt: skip
"""In order of precedence: where spans overlap, the first one names the mask."""


def find(text: str) -> list[Span]:
    """Every identifier of the folded text, in order of precedence; spans may overlap."""
    return [span for recognize in RECOGNIZERS for span in recognize(text)]


def merge(spans: list[Span]) -> list[Span]:
    """Disjoint spans that cover the same characters; where several overlap, the first in the list names the union."""
    unions: list[list[tuple[int, Span]]] = []
    reach = 0
    for ranked in sorted(enumerate(spans), key=lambda item: (item[1].start, item[1].end)):
        if unions and ranked[1].start < reach:
            unions[-1].append(ranked)
        else:
            unions.append([ranked])
        reach = max(reach, ranked[1].end)
    return [_union([span for _, span in sorted(union)]) for union in unions]


def _union(spans: list[Span]) -> Span:
    entities = tuple(dict.fromkeys(span.entity for span in spans))
    return Span(min(s.start for s in spans), max(s.end for s in spans), entities[0], entities)
