"""A whole small cycle that users lived through: tracked, watched, with a model that learned from them."""

from __future__ import annotations

import json
from pathlib import Path

from flywheel_tasks.core.store import Store
from flywheel_tasks.simulation import faults
from flywheel_tasks.simulation.characters import character_table, demo_characters
from flywheel_tasks.simulation.traffic import write_event_log
from tests.drills import small_cycle, watched
from tests.drills.whole_loop import CROWDED

USERS = 140
STAGES = ("ingest", "filter", "diversify", "constrain", "signal-rm", "expose", "readout")
LEARNER = "signal-rm"


class Lived:
    """Every user says a word that nobody else says."""

    def __init__(self, folder: Path, tiny_model: Path) -> None:
        self.folder, self.listening = folder, set[str]()
        self.users = _speak(folder / "logs")
        cards = "\n".join(json.dumps(row) for row in character_table(demo_characters()).to_pylist())
        (folder / "characters.jsonl").write_text(cards)
        self._more = (
            f"ingest.characters={json.dumps([str(folder / 'characters.jsonl')])}", f"models.signal.path={tiny_model}",
            'signal-rm.train={"epochs": 1, "batch": 16}', 'signal-rm.lora={"rank": 4}', "signal-rm.most_responses=64",
        )  # fmt: skip
        self.store = Store(str(folder / "store"))
        self.live()

    def live(self, *more: str, **variables: str) -> None:
        """The cycle, from the logs to the readout."""
        logs = str(self.folder / "logs" / "*.jsonl")
        self.listening |= watched.run(self.folder, logs, STAGES, (*self._more, *more), **CROWDED, **variables)

    def everywhere(self) -> dict[str, str]:
        """Every file that the cycle left, in the store and in tracking, as text."""
        tracked = [self.folder / "mlflow.db", *sorted((self.folder / "mlflow-files").rglob("*"))]
        texts = {str(path): path.read_bytes().decode(errors="replace") for path in tracked if path.is_file()}
        if len(texts) < 2:
            raise AssertionError("tracking holds no files")
        return dict(small_cycle.texts(self.store)) | texts


def _speak(logs: Path) -> list[str]:
    write_event_log(
        logs, users=USERS, days=7, seed=9, start=small_cycle.MONDAY, faults=faults.NONE, endings=(".jsonl",)
    )  # fmt: skip
    users: set[str] = set()
    for file in sorted(logs.glob("*.jsonl")):
        events = [json.loads(line) for line in file.read_text().splitlines()]
        for event in events:
            if event.get("role") == "user":
                users.add(event["user_id"])
                event["content"] += f" says {word_of(event['user_id'])}"
        file.write_text("\n".join(map(json.dumps, events)) + "\n")
    return sorted(users)


def word_of(user: str) -> str:
    """A word that nobody else says."""
    number = int(user.rpartition("-")[2])
    return "zq" + "".join("abcdefghij"[int(digit)] for digit in f"{number:05d}") + "qz"
