"""Do optimizers move as the flows and games that they are read as? Each number beside the one that theory gives.

    python benchmarks/dynamics.py [--quick] [--json FILE] [--only WORD …] [--figures DIR]

flows   flows of a model on its data, steepest descent in a norm, finite steps and ledgers (`_dynamics_flows.py`)
games   two players, the Dirac GAN, a real small GAN (`_dynamics_games.py`)

WORD is one of these parts, a group of rows in one (`GROUPS`), or a word of the quantities to print.

quantity   what is measured
measured   in this run, float64 unless it says otherwise
expected   by theory; 0 where an error has to be small
tolerance  how far apart the two may be
ok         whether they are that close

Exit status 1 if a row is not. To add a number, add a row to one of the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these networks are so small that threads would wait for each other

import matplotlib
import torch
from _dynamics_rows import Row

PARTS = {"flows": "_dynamics_flows", "games": "_dynamics_games"}
LINE = "{:<100} {:>13} {:>13} {:>9}  {}"


def chosen(words: list[str], quick: bool) -> Iterator[Row]:
    """Rows of the parts, and with words those of the parts, groups and quantities that are named."""
    parts = [part for part in PARTS if part in words] or list(PARTS)
    words = [word for word in words if word not in PARTS]
    for part in parts:
        module = import_module(PARTS[part])
        groups = getattr(module, "GROUPS", {})
        others = [word.lower() for word in words if word not in groups]
        for group in (word for word in words if word in groups):
            yield from groups[group](quick)
        if others or not words:
            yield from (r for r in module.rows(quick) if not words or any(one in r.quantity.lower() for one in others))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and samples")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="of the parts, or of their quantities")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write the pictures of the documentation there")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    matplotlib.use("Agg")
    print(f"torch {torch.__version__}, {platform.machine()}, {time.strftime('%Y-%m-%d')}\n")
    print(LINE.format("quantity", "measured", "expected", "tolerance", "ok"), flush=True)
    found = []
    for row in chosen(arguments.only, arguments.quick):
        found.append(row)
        numbers = f"{row.measured:.7g}", f"{row.expected:.7g}", f"{row.tolerance:.1g}"
        print(LINE.format(row.quantity, *numbers, "ok" if row.ok else "MISSED"), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n", "utf-8")
    if arguments.figures:
        for part in PARTS.values():
            getattr(import_module(part), "draw", lambda folder: None)(arguments.figures)
    missed = [row.quantity for row in found if not row.ok]
    print(f"\n{len(found)} numbers, {len(missed)} not as expected{': ' if missed else ''}{'; '.join(missed)}")
    return 1 if missed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
