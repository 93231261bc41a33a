"""Texts that the style tests read: made from fragments that matter to the rules, and real chat from the data folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

FRAGMENTS = (
    "OMG",
    "omg",
    "LOL",
    "lol,",
    "Mind blown!",
    "Great question!",
    "That is a great question",
    "hello there",
    "I walked home.",
    " ",
    "  ",
    "\n",
    "\n\n",
    "*",
    "**",
    "_",
    "`",
    "```",
    "~~~",
    "> ",
    "- item\n",
    "1. one\n",
    "# Title\n",
    "a",
    "I",
    "don't",
    "😀",
    "👨‍👩‍👧",
    "🇮🇳",
    "❤️",
    "1️⃣",
    "!",
    "?",
    ".",
    ",",
    "...",
    ":)",
    "(",
    ")",
    "#lol",
    "@omg",
    "f*ck",
    "snake_case",
    "5 * 3",
    "नमस्ते",
    "आप कैसे हैं?",
    "(How are you doing today?)",
    "Translation: hello there friend",
    "(in English: hello friend)",
    "你好,今天怎么样?",
    "¿Cómo estás?",
    "مرحبا",
    "สวัสดีครับ",
    "I'm sorry, but I can't help with that.",
    "blah " * 40,
    "la " * 20,
    "\\",
    "\t",
    "[link](http://x.y)",
    "|a|b|",
    "\u200d",
    "\ufe0f",
    "é",
    "word. " * 30,
)

TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join) | st.text(max_size=60)


def chat(data: Path) -> dict[str, list[str]]:
    """Real responses by source: persona chat in four languages, topical chat, assistant replies."""
    found: dict[str, list[str]] = {}
    for path in sorted((data / "xpersona").glob("*.json")):
        dialogues = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(path.name[:2], []).extend(t for d in dialogues for pair in d["dialogue"] for t in pair)
    topical = json.loads((data / "topical_chat/valid_freq.json").read_text(encoding="utf-8"))
    found["topical"] = [turn["message"] for dialogue in topical.values() for turn in dialogue["content"]]
    found["oasst"] = []

    def walk(node: dict[str, Any]) -> None:
        if node["role"] == "assistant":
            found["oasst"].append(node["text"])
        for reply in node["replies"]:
            walk(reply)

    for line in (data / "oasst_en100/en_100_tree.jsonl").read_text(encoding="utf-8").splitlines():
        walk(json.loads(line)["prompt"])
    return found
