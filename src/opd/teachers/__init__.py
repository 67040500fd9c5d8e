"""Rollout → Target: what the teacher would have said at every response position."""
