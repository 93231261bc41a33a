"""Floor 2: from traffic to prompts worth training on (Sec. 2.2.1, 2.6)."""
