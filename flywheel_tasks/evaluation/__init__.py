"""Offline evaluation and the gate (Sec. 2.5.1, 3.1-3.3)."""
