"""Floor 2: SFT, DPO and online RL, which turn a base model into a candidate (Sec. 2.4.2, 2.4.3)."""
