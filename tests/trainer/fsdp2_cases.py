"""Run as a program: three steps of every case with weights that are divided over as many ranks as it is told; one rank has them whole.

usage: fsdp2_cases.py SCHOOL RESULTS 1 2 4
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rank_cases import CASES, as_rank, in_forks

LEFT_OUT = ("muon",)
DIVIDED = {name: {**case, "train__parallel": "fsdp2"} for name, case in CASES.items() if name not in LEFT_OUT}

if __name__ == "__main__":
    school, results = Path(sys.argv[1]), Path(sys.argv[2])
    work = partial(as_rank, school, cases=DIVIDED)
    sys.exit(not all(in_forks(int(world), results / f"{world}.pt", work) for world in sys.argv[3:]))
