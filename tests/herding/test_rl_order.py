"""In which order prompts come, and how a batch reaches every worker."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.herding.rollouts import Order


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31))
def test_every_prompt_comes_once_in_a_pass_and_never_twice_in_a_batch(prompts: int, batch: int, seed: int) -> None:
    order, cursor, seen = Order(prompts, seed), 0, []
    while cursor < 3 * prompts:
        places, cursor = order.take(cursor, batch)
        assert len(set(places)) == len(places) == min(batch, prompts)
        seen += places
    assert max(np.bincount(seen, minlength=prompts)) - min(np.bincount(seen, minlength=prompts)) <= 2


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31), st.integers(0, 200))
def test_the_cursor_alone_says_what_comes_next(prompts: int, batch: int, seed: int, cursor: int) -> None:
    """A resumed run asks a fresh process for the same batch."""
    running = Order(prompts, seed)
    for earlier in range(0, cursor, 7):
        running.take(earlier, batch)
    assert running.take(cursor, batch) == Order(prompts, seed).take(cursor, batch)
