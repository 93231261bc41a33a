"""Floor 2: reward models, user-signal models and rejection sampling (Sec. 2.3, 2.4.1)."""
