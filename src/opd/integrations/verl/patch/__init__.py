"""verl with on-policy distillation inside: a git patch for its own tree, made from the losses of this package."""
