"""The linter knows the language of SFT data: an answer in another language than the question is not learned."""

from __future__ import annotations

import pyarrow as pa

from flywheel_tasks.core import schemas
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.herding.sft import languages
from flywheel_tasks.style import linter

ASKED = "What should I cook for my sister and her children tonight?"
ENGLISH = "Make a big pan of tomato pasta, the little ones will love it and it is done in twenty minutes."
SPANISH = "Prepara una gran olla de pasta con tomate, a los niños les encanta y está lista en veinte minutos."


def example(name: str, answer: str) -> dict[str, object]:
    said = [("user", ASKED, False), ("assistant", answer, True)]
    messages = [{"role": role, "content": content, "trained": trained} for role, content, trained in said]
    return {
        "example_id": name,
        "user": None,
        "source": "user_rjs",
        "character_id": None,
        "locale": None,
        "messages": messages,
    }


def test_an_answer_in_another_language_is_left_out_with_a_count() -> None:
    table = pa.Table.from_pylist([example("same", ENGLISH), example("other", SPANISH)], schemas.EXAMPLE)
    cleaned = linter.clean_examples(table, languages(LanguageConfig()))
    assert cleaned.table["example_id"].to_pylist() == ["same"]
    assert cleaned.rejected["row_id"].to_pylist() == ["other"]
    assert sum(n for (_, what), n in cleaned.counts.items() if what == "dropped") == 1
