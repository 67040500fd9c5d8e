"""Optimizers: AdamW, Muon and the natural gradient. Nothing here imports the trainer."""
