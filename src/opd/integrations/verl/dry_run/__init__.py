"""verl on a laptop: a platform without an accelerator, FSDP2 over gloo, and rollouts by transformers. For tests and dry runs."""

ROLLOUT_NAME = "transformers"
"""`rollout.name` of the rollouts by transformers."""
