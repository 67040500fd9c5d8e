"""Memory of a run: estimated and measured."""
