"""The git patch that puts on-policy distillation into verl's own tree, made from the losses of this package."""
