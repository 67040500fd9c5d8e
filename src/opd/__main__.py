"""`python -m opd`, and `torchrun -m opd`: the command line."""

from __future__ import annotations

import sys

from opd.cli.main import main

if __name__ == "__main__":
    sys.argv[0] = "opd"  # as a run's about.json and its advice show it
    sys.exit(main())
