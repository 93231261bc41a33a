"""What people read: nothing in it commands their terminal, and tables break between words."""

from __future__ import annotations

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.terminal import Table, fitted, text_of, visible

HOSTILE = "a\x1b[31mb\x9b2J\r\n\u202ec"


def test_a_hostile_text_is_shown_and_not_obeyed() -> None:
    shown = r"a\x1b[31mb\x9b2J\r\n\u202ec"
    assert visible(HOSTILE) == shown == str(InputError(HOSTILE))
    assert visible("Zoë 🎉 [bold]") == "Zoë 🎉 [bold]"
    page = text_of([HOSTILE, Table((HOSTILE, "n"), [(HOSTILE, 12_000)], HOSTILE)], 80)
    assert page.count(shown) == 4
    assert "12,000" in page


def test_a_table_breaks_between_words_and_keeps_to_its_width() -> None:
    row = ("preference-pointwise", "Sec. 2.3.1, eq. 1, Table 8", "annotate-import, ingest", "model, steps, report")
    page = text_of([Table(("stage", "paper", "reads", "writes"), [row])], 60)
    assert max(map(len, page.splitlines())) <= 60
    words = page.split()
    assert [word for cell in row for word in cell.split() if word not in words] == []


def test_short_cells_stay_whole_while_long_ones_can_give_way() -> None:
    texts = [["2026-11-16"], ["[-5.14, +30.5]"], ["a long reason that can be broken anywhere"]]
    assert fitted(texts, 100) == [10, 14, 41]
    assert fitted(texts, 50) == [10, 14, 26]
    assert sum(fitted(texts, 12)) == 12
