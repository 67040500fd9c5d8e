"""verl runs our losses on a Ray cluster: through its own registries and config targets, with no edit of verl."""
