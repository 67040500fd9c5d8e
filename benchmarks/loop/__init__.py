"""The training loop beside TRL's GKDTrainer: steps per second, and each phase's time."""
