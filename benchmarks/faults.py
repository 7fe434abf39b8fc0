"""Faults that a recording must survive, injected: what is lost, and is anything silently wrong?

    python benchmarks/faults.py [--quick] [--json FILE] [--only WORD …] [--seed N]

One row for each kind of fault:

trials          injected faults
survived        all that was promised is there to the last bit, or the user is told what is not and why
lost            more is gone than the stated bound
silently_wrong  something else than what was recorded was read, and nobody was told
failed          anything else: a crash, a hang, an error that names nothing
most_lost       the most steps that one fault cost, within the bound
user_gets       what the user sees

Exit status 1 unless every fault is survived. To add a fault, add an entry to a table FAULTS in `_faults_*.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these networks are so small that threads would wait for each other

import torch
from _faults_disk import FAULTS as DISK
from _faults_files import FAULTS as FILES
from _faults_hostile import FAULTS as HOSTILE
from _faults_killed import FAULTS as KILLED
from _faults_left_open import FAULTS as LEFT_OPEN
from _faults_loop import FAULTS as LOOP
from _faults_moments import FAULTS as MOMENTS
from _faults_names import FAULTS as NAMES
from _faults_table import Bench, Tally

FAULTS = [*KILLED, *MOMENTS, *DISK, *FILES, *HOSTILE, *NAMES, *LOOP, *LEFT_OPEN]
LINE = "{:<44} {:>7} {:>9} {:>5} {:>6} {:>7} {:>9} {:>8}  {}"


def print_row(tally: Tally) -> None:
    row = tally.row()
    keys = ("fault", "trials", "survived", "lost", "silently_wrong", "failed", "most_lost", "seconds", "user_gets")
    print(LINE.format(*(row[key] for key in keys)), flush=True)
    for problem in tally.problems():
        print(f"    {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of each, in less than a minute")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--only", metavar="WORD", nargs="+", default=[""], help="faults with such a word in the name")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of moments and places")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    print(f"Injected faults{' (quick)' if arguments.quick else ''}, seed {arguments.seed}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {time.strftime('%F')}")
    print(
        LINE.format("fault", "trials", "survived", "lost", "wrong", "failed", "most lost", "seconds", "the user gets")
    )
    tallies, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        for fault in FAULTS:
            if any(word.lower() in fault.name.lower() for word in arguments.only):
                bench = Bench(arguments.quick, random.Random(f"{fault.name} {arguments.seed}"), Path(folder))
                tallies.append(Tally.of(fault, bench))
                print_row(tallies[-1])
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([tally.row() for tally in tallies], file, indent=1)
    return verdict(tallies, time.perf_counter() - start)


def verdict(tallies: list[Tally], seconds: float) -> int:
    """Print the sums; the exit status."""
    rows = [tally.row() for tally in tallies]
    sums = {key: sum(row[key] for row in rows) for key in ("trials", "lost", "silently_wrong", "failed")}
    print(
        f"\n{sums['trials']} faults of {len(rows)} kinds in {seconds:.0f} s: {sums['lost']} lost more than stated, "
        f"{sums['silently_wrong']} silently wrong, {sums['failed']} failed otherwise"
    )
    return 0 if tallies and all(tally.good for tally in tallies) else 1


if __name__ == "__main__":
    sys.exit(main())
