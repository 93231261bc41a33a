"""Pure losses, batching and the one training loop (Sec. 2.3, 2.4)."""
