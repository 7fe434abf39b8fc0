"""Do loops that people have record as they stand? Training programs in the manner of public ones, one row each.

    python benchmarks/loops.py [--quick] [--json FILE] [--only NAME ...]

Every program is there twice: as it was, in `loops/plain`, and with the recorder's lines, in `loops/recorded`. A row
says what these lines are and whether the record is right:

lines                   added or changed in the recorded program (`git diff -w`); not counted are imports, and what
                        `main` returns to this benchmark
recorded                whether the loop ran to its end under the recorder
residual                largest of |output − Σ shares − Σ channels|, relative to the largest output that was explained
split_error             how far rows of gradients are from passes of the batches as they ran; None where not measured
agreement               part of the queries of which the machine predicts what the network does
bit_identical_training  whether weights and buffers end with the same bits as without the recorder
overhead                seconds with the recorder, relative to those without; these programs take a second or less, of
                        which the trial of the first step and the audits take most
explain_ok              whether shares and channels are finite and add up to the outputs, within the tolerance
path_kernel_ok          whether the path kernel of the queries is finite, symmetric, and positive semi-definite; None
                        for a network that has none, since it compares the samples of a batch with each other
error, warning          first lines of what went wrong, and of what the certificate doubts; the benchmark goes on

A program that cannot be recorded is to be refused by name before its first step. Exit status 1 where a loop was not
recorded, explained or refused as it should be, or where its training was changed by it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from _loops_programs import PROGRAMS
from _programs import Row, measure, shown

PLACE = Path(__file__).resolve().parent / "loops"
LINES_LIMIT = 3


def measure_loop(name: str, quick: bool) -> Row:
    program = PROGRAMS[name]
    length = (program.short,) if quick else ()
    figures = measure(program, name, PLACE, length, 1 if quick else 3, draws=False)
    return {"loop": name, "what": program.what} | figures


def verdict(row: Row) -> str:
    """What a row lacks; empty where nothing."""
    program = PROGRAMS[row["loop"]]
    if program.refused:
        refused = not row["recorded"] and program.refused in row["error"] and "Error: " in row["error"]
        return "" if refused else "not refused by name"
    if not row["recorded"]:
        return "not recorded"
    lacks = [
        ("other bits", row["bit_identical_training"]),
        ("not explained", row["explain_ok"]),
        ("residual", row["residual"] is None or row["residual"] <= program.tolerance),
        ("split error", row["split_error"] is None or row["split_error"] <= program.tolerance),
        ("agreement", row["agreement"] is None or row["agreement"] == 1),
        ("path kernel", row["path_kernel_ok"] or bool(program.part and row["explain_ok"])),
    ]
    return ", ".join(what for what, good in lacks if not good)


LINE = "{:<27} {:>5} {:>8} {:>9} {:>9} {:>6} {:>5} {:>8} {:>9} {:>6}  {}"


def print_row(row: Row) -> None:
    print(
        LINE.format(
            row["loop"],
            row["lines"],
            shown(row["recorded"]),
            shown(row["residual"], ".1e"),
            shown(row["split_error"], ".1e"),
            shown(row["agreement"], ".2f"),
            shown(row["bit_identical_training"]),
            shown(row["overhead"], ".2f"),
            shown(row["explain_ok"]),
            shown(row["path_kernel_ok"]),
            "; ".join(filter(None, (verdict(row), row["error"], row["warning"])))[:160],
        ),
        flush=True,
    )


def within_targets(rows: list[Row]) -> bool:
    """Print each target with what was measured."""
    lacking = [row["loop"] for row in rows if verdict(row)]
    long = [f"{row['loop']} {row['lines']}" for row in rows if row["lines"] > LINES_LIMIT]
    recorded = [row for row in rows if row["recorded"]]
    ratios = [row["overhead"] for row in recorded]
    print()
    print(
        f"recorded, explained and bit-identical, or refused by name: target all {len(rows)}; measured "
        f"{len(rows) - len(lacking)}{': not ' + ', '.join(lacking) if lacking else ''}"
    )
    print(
        f"lines: target ≤ {LINES_LIMIT} each; measured {len(rows) - len(long)} of {len(rows)}"
        f"{': not ' + ', '.join(long) if long else ''}"
    )
    for figure, limit in (("residual", 1e-5), ("split_error", 1e-5)):
        for low in (False, True):
            own = [row for row in recorded if (PROGRAMS[row["loop"]].tolerance > limit) is low]
            values = [(row[figure], row["loop"]) for row in own if row[figure] is not None]
            if values:
                bound = max(PROGRAMS[row["loop"]].tolerance for row in own)
                value, loop = max(values)
                name = f"{figure.replace('_', ' ')} in {'bfloat16' if low else 'float32'}"
                print(f"{name}: target ≤ {bound:g}; measured at worst {value:.1e} ({loop})")
    if ratios:
        more = [(row["overhead"] - 1) * row["seconds"] for row in recorded]
        print(
            f"overhead: median {np.median(ratios):.2f}, at worst {max(ratios):.2f}; in seconds, median "
            f"{np.median(more):.2f}, at worst {max(more):.2f}"
        )
    return not lacking


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and each program once")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(PROGRAMS), help="some of the programs")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # these networks are so small that threads would only wait for each other
    print(f"Loops as they stand{' (quick)' if arguments.quick else ''}")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {platform.machine()}, one thread, {time.strftime('%F')}")
    print(
        LINE.format(
            "loop", "lines", "recorded", "residual", "split", "agree", "bits", "overhead", "explained", "kernel", ""
        )
    )
    rows = []
    for name in arguments.only or PROGRAMS:
        rows.append(measure_loop(name, arguments.quick))
        print_row(rows[-1])
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0 if within_targets(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
