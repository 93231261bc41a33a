"""Labelled public texts that train and measure the embedded classifiers (Sec. 2.6), read from a folder the user names.

Every set is cut in two by a hash of its group, so that variants of one sentence (a template, a translation pair, a
dialogue) stay on one side. `train` fits the weights; every reported number comes from `test`.
"""

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import emoji

from flywheel_tasks.core.errors import InputError

_WORDLESS = (
    "", "hi", "hey", "hello", "ok", "okay", "k", "kk", "yes", "no", "yep", "nope", "hmm", "hm", "oh", "ah", "lol",
    "haha", "hahaha", "wow", "thanks", "thank you", "please", "sure", "cool", "nice", "great", "why", "what", "who",
    "how", "when", "really", "good", "fine", "bye", "good night", "gn", "good morning", "gm", "sorry", "me too",
    "idk", "brb", "omg", "yay", "same", "true", "hola", "si", "gracias", "bien", "jaja", "ciao", "merci", "oui",
    "haan", "nahi", "accha", "theek hai", "kya", "namaste", "1", "2", "3", ".", "?", "!", "...",
)  # fmt: skip
_DECLINES = re.compile(
    r"\b(?:sorry|illegal|against the law|can['\u2019]?t help|cannot|won['\u2019]?t"
    r"|would ?n['\u2019]?t|should ?n['\u2019]?t"
    r"|not (?:okay|ok|a good idea|safe|right|going to)|do ?n['\u2019]?t (?:think|want)|why (?:would|do) you"
    r"|harm|dangerous"
    r"|hurt|inappropriate|offensive|unethical|wrong)\b",
    re.IGNORECASE,
)
Half = Literal["train", "test"]


class Labelled(NamedTuple):
    """One text with its label; `group` keeps related texts on one side of the split."""

    source: str
    text: str
    positive: bool
    group: str


def half_of(item: Labelled) -> Half:
    """The side of the split on which the item's group lies, whichever set the group occurs in."""
    return "train" if hashlib.sha256(item.group.encode()).digest()[0] % 2 else "test"


def safety(data: Path) -> Iterator[Labelled]:
    """Unsafe or safe, from moderation, toxicity and hate-speech sets, with ordinary chat as safe."""
    with gzip.open(_file(data, "openai_moderation/samples-1680.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = row.pop("prompt")
            yield Labelled("openai_moderation", text, any(row.values()), _shape(text))
    for row in _csv(data, "surge_toxicity/toxicity_en.csv"):
        yield Labelled("surge_toxicity", row["text"], row["is_toxic"] == "Toxic", _shape(row["text"]))
    for row in _csv(data, "hatecheck/test_suite_cases.csv"):
        yield Labelled("hatecheck", row["test_case"], row["label_gold"] == "hateful", f"hatecheck {row['templ_id']}")
    for language in ("hindi", "spanish"):
        for row in _csv(data, f"multilingual_hatecheck/hatecheck_cases_final_{language}.csv"):
            group = f"{language} {row['templ_id']}"
            yield Labelled(f"hatecheck_{language}", row["test_case"], row["label_gold"] == "hateful", group)
    for row in _csv(data, "davidson_hate/labeled_data.csv"):
        # Class 1, swearing without hate, is neither: a social chat may swear.
        if row["class"] != "1":
            yield Labelled("davidson_hate", row["tweet"], row["class"] == "0", _shape(row["tweet"]))
    yield from declined(data)
    yield from everyday(data)
    yield from nothing_said()


def declined(data: Path) -> Iterator[Labelled]:
    """Requests for harm: what opens a red-team dialogue, where the preferred first answer declines (a weak label)."""
    with gzip.open(_file(data, "hh_rlhf_harmless/test.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for line in lines:
            parts = re.split(r"\n\n(?:Human|Assistant): ", json.loads(line)["chosen"])
            if len(parts) > 2 and _DECLINES.search(parts[2]):
                yield Labelled("hh_harmless", parts[1].strip(), True, _shape(parts[1]))


def everyday(data: Path) -> Iterator[Labelled]:
    """Ordinary chat, requests and prose in the languages of the sets above: no language is unsafe by itself."""
    yield from chat(data)
    yield from (
        item._replace(positive=False)
        for item in romanised_hindi(data)
        if item.source.startswith(("hinglish", "lingua"))
    )
    # Questions and tasks: without them, everything put to an assistant looks like the red-team openings.
    for row in _csv(data, "truthfulqa/truthful_qa.csv"):
        question = row["prompt"].splitlines()[0]
        yield Labelled("truthfulqa", question, False, _shape(question))
    for line in _file(data, "ifeval/en_input_data.jsonl").read_text(encoding="utf-8").splitlines():
        yield Labelled("ifeval", json.loads(line)["prompt"], False, json.loads(line)["prompt"])
    for name, dialogue in json.loads(_file(data, "topical_chat/valid_freq.json").read_text(encoding="utf-8")).items():
        yield from (Labelled("topical_chat", turn["message"], False, name) for turn in dialogue["content"])


def nothing_said() -> Iterator[Labelled]:
    """Turns without content, as safe: an emoji, a sound, a mark. Without them the prior would decide."""
    for text in emoji.EMOJI_DATA:
        yield Labelled("wordless", text, False, text)
        yield Labelled("wordless", text * 3, False, text)
    for text in _WORDLESS:
        yield from (
            Labelled("wordless", form, False, text)
            for form in (text, text.upper(), f"{text}!", f"{text}...", f"{text}?")
        )


def chat(data: Path) -> Iterator[Labelled]:
    """Ordinary multilingual chat, taken as safe; split by dialogue."""
    for path in sorted((data / "xpersona").glob("*.json")):
        for dialogue in json.loads(path.read_text(encoding="utf-8")):
            turns = [text for exchange in dialogue["dialogue"] for text in exchange]
            group = f"{path.name[:2]} {' '.join(sorted(map(str, dialogue['persona'])))}"
            yield from (Labelled(f"xpersona_{path.name[:2].lower()}", text, False, group) for text in turns)


def unseen(data: Path) -> Iterator[Labelled]:
    """Sets that no weight was fitted on, not even a half of them."""
    for row in _csv(data, "xstest/xstest_prompts.csv"):
        yield Labelled("xstest", row["prompt"], row["label"] == "unsafe", row["prompt"])
    for tree in _file(data, "oasst_en100/en_100_tree.jsonl").read_text(encoding="utf-8").splitlines():
        yield Labelled("oasst_prompts", json.loads(tree)["prompt"]["text"], False, tree[:80])


def romanised_hindi(data: Path) -> Iterator[Labelled]:
    """Hindi in Latin letters against English and other languages in Latin letters."""
    for name in ("train", "validation"):
        for row in _csv(data, f"hinglish_top/{name}.tsv"):
            # A query and its translation share a group; so do queries that differ in numbers and case only.
            group = _shape(row["en_query"])
            yield Labelled("hinglish_top", row["cs_query"], True, group)
            yield Labelled("hinglish_top_en", row["en_query"], False, group)
    for row in _csv(data, "multilingual_hatecheck/hatecheck_cases_final_hindi.csv"):
        if not re.search(r"[\u0900-\u097f]", row["test_case"]):
            yield Labelled("hatecheck_hindi", row["test_case"], True, f"hindi {row['templ_id']}")
    for row in _csv(data, "multilingual_hatecheck/hatecheck_cases_final_spanish.csv"):
        yield Labelled("hatecheck_spanish", row["test_case"], False, f"spanish {row['templ_id']}")
    for row in _csv(data, "hatecheck/test_suite_cases.csv"):
        yield Labelled("hatecheck", row["test_case"], False, f"hatecheck {row['templ_id']}")
    yield from (item for item in chat(data) if not item.source.endswith("zh"))
    for language in ("en", "es", "fr", "pt"):
        for line in _file(data, f"lingua_testdata/{language}.txt").read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield Labelled(f"lingua_{language}", line, False, _shape(line))


def hindi_words(data: Path) -> Iterator[Labelled]:
    """Single words: of a Hindi sentence those that the English of the same set lacks are Hindi, the others are not."""
    for name in ("train", "validation"):
        for row in _csv(data, f"hinglish_top/{name}.tsv"):
            english = set(_words(row["en_query"]))
            group = _shape(row["en_query"])
            yield from (Labelled("hinglish_top", w, w not in english, group) for w in _words(row["cs_query"]))
            yield from (Labelled("hinglish_top", w, False, group) for w in sorted(english))
    cases = list(_csv(data, "hatecheck/test_suite_cases.csv"))
    known = {word for row in cases for word in _words(row["test_case"])}
    for row in cases:
        yield from (Labelled("hatecheck", w, False, f"hatecheck {row['templ_id']}") for w in _words(row["test_case"]))
    for row in _csv(data, "multilingual_hatecheck/hatecheck_cases_final_hindi.csv"):
        words = [w for w in _words(row["test_case"]) if w not in known]
        yield from (Labelled("hatecheck_hindi", w, True, f"hindi {row['templ_id']}") for w in words)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]{2,}", text.lower())


def _shape(text: str) -> str:
    """The letters of a text in lower case: texts that differ in digits and marks only are one group."""
    return re.sub(r"[\W\d_]+", " ", text.lower()).strip()


def _csv(data: Path, name: str) -> Iterator[dict[str, str]]:
    with _file(data, name).open(encoding="utf-8", newline="") as lines:
        if name.endswith(".tsv"):
            yield from csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            yield from csv.DictReader(lines)


def _file(data: Path, name: str) -> Path:
    path = data / name
    if not path.is_file():
        raise InputError(f"labelled data {path} is not there: name the folder that holds '{name}' with --data")
    return path
