"""Checks before a run: prompts, tokens, models, and what each model reads of a prompt. Nothing is trained here."""
