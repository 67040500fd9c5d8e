"""One training step of a real model, beside TRL's DistillationTrainer: seconds by phase, peak memory, and how near each phase is to
the machine's limit."""
