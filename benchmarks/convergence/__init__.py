"""Distillation beside reinforcement learning: updates to a share of the teacher's gain."""
