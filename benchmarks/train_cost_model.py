"""Trains the cost model that ships with the package, on all records that ship with it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tvm_lowrank.schedules.cuda.arch import ARCHITECTURES
from tvm_lowrank.schedules.x86 import isa as instruction_sets

from tvm_lowrank.cost.learned import train
from tvm_lowrank.cost.trees import FILE, signature
from tvm_lowrank.records import TuningRecords
from tvm_lowrank.shipped import shipped_records, survey_records

FOLDER = Path(__file__).resolve().parents[1] / "tuning_logs"
MACHINES = (instruction_sets.AVX512_BF16, instruction_sets.AVX2, ARCHITECTURES["sm_90"])
ISAS = {machine.name: machine for machine in MACHINES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("isa", nargs="?", choices=sorted(ISAS), default="avx512")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    isa = ISAS[args.isa]
    files = [*shipped_records(isa.name), *survey_records(isa.name)]
    trees = train(TuningRecords(None, isa.name, 1, shipped=files), isa, args.seed)
    if trees is None or trees.families != signature(isa):
        known = sorted(trees.families) if trees else []
        print(f"error: records of every kernel are needed, these have {known}", file=sys.stderr)
        return 2
    trees.save(FOLDER / isa.name / FILE)
    print(f"{FOLDER / isa.name / FILE}: {trees.rows} records, of them")
    for place, count in sorted(trees.counts.items()):
        print(f"  {count:5d}  {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
