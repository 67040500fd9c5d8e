"""The `opd` command: one file per command, and `main`, which dispatches without importing torch."""
