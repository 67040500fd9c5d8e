"""Prompt → Rollout: the student's own samples, and the off-policy ones mixed in on request."""
