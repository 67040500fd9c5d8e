"""What the `verl.plugins` entry point imports inside `import verl`, in every process: keep it light.

Engines and config classes need no registration here: `+opd=default` names them as Hydra targets, and they register themselves
when verl resolves the target. A platform, though, must be known before anything else of verl asks for the device.
"""

from __future__ import annotations

import os

PLATFORM_VARIABLE = "VERL_PLATFORM"

if os.environ.get(PLATFORM_VARIABLE, "").strip().lower() == "cpu":
    import opd.integrations.verl.cpu.platform  # noqa: F401  # registers itself
