"""Models: where they come from, how they read a conversation, and how they score and answer it (Sec. 2.3, 2.4)."""
