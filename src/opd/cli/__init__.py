"""The `opd` command. `main` parses and dispatches without importing torch; every command has its own file."""
