"""One linear scan that says which texts could hold an identifier (Sec. 2.6): the recognizers run on those only.

The scan is RE2 over the Arrow buffer, without a Python string per row. It must flag a superset of what the recognizers
find; tests compare both on real and generated texts.
"""

from functools import cache
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.curation.identifiers import STREET_SUFFIX, STREET_UNIT
from flywheel_tasks.curation.normalise import IntArray, changed_characters
from flywheel_tasks.curation.phones import WORD_DIGIT

_PARTS: Final[tuple[str, ...]] = (
    r"[@\x{ff20}\x{fe6b}]|%40|\b(?:arroba|dot|punto|ponto)\b|[\[({<]\s{0,3}(?:at|dot|\.)\s{0,3}[\])}>]",
    r"\b(?:gmail|googlemail|yahoo|hotmail|outlook|icloud|proton|protonmail|aol|gmx|yandex|rediffmail)\b",
    r"\b(?:live|mail|qq|163)\s{0,3}[.,]\s{0,3}[a-z]",
    r"://|\bwww\.|[a-z0-9-]\.(?:com|net|org|edu|gov|io|info|biz|xyz|co\.uk|co\.in|com\.br|carrd\.co)\b|[a-z0-9-]\.[a-z.]{2,6}/",
    r"\d(?s:.{0,4}?\d){5}|\d\.\d{1,3}\.\d|[0-9a-f]{0,4}:[0-9a-f]{0,4}:",
    r"\b[a-z]{1,6}\d{2,}[a-z0-9]*[a-z]|(?:bc1|[13])[a-z0-9]{25}|(?:[0-9a-f]{2}-){5}|(?:[0-9a-f]{4}\.){2}",
    rf"\d(?s:.)*\b{STREET_SUFFIX}\b",
    r"\b(?:rue|calle|c/|avenida|av\.|via|viale|piazza|rua|ulica|ul\.)\s(?s:.)*\d",
    r"(?:stra\x{df}e|strasse|str\.|gasse|weg|platz|allee|ufer|damm|gatan|v\x{e4}gen|vej|veien|gata|katu|tie|utca|\x{fa}t|u\.|t\x{e9}r)[\s,]*\d",
    r"\d\s?(?:bis|ter|[a-z])?,?\s+(?:rue|ruelle|all[e\x{e9}]e|impasse|chemin|quai|avenue|av|boulevard|bd|place|cours|route)\b",
    rf"\b{STREET_UNIT}\.?\s*(?:no\.?\s*)?#?\s?\d",
    rf"(?:{WORD_DIGIT}[\s,.-]{{1,3}}(?:double\s|triple\s)?){{6}}",
    r"\b(?:insta|instagram|ig|snap|snapchat|telegram|discord|twitter|tiktok|kik|wechat|skype|username|handle)\b",
    r"\b(?:ssn|social\s+security)\b",
    r"[0-9a-z]\x{fe0f}",
)


@cache
def _pattern() -> str:
    return "|".join((*_PARTS, changed_characters()))


def candidate_rows(texts: pa.StringArray) -> IntArray:
    """Indices of the texts that may hold an identifier or that hide characters."""
    flagged = pc.match_substring_regex(texts, _pattern(), ignore_case=True)
    return np.flatnonzero(flagged.to_numpy(zero_copy_only=False))
