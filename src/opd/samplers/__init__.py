"""Prompt → Rollout: the student's own samples, and off-policy ones mixed in. A new sampler is any object with the methods of `base.Sampler`."""
