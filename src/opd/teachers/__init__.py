"""Rollout → Target: the teacher's view of every response position. A new teacher is any object with the members of `base.Teacher`."""
