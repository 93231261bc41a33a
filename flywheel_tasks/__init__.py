"""CharacterFlywheel: the loop of arXiv 2603.01973 as stages that a scheduler can run."""
