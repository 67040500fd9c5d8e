"""Hydra config groups: `+opd=default` for distillation, `+opd_device=cpu` for a machine without an accelerator."""
