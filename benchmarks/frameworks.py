"""Are programs written for Lightning, the Trainer, skorch and Accelerate recorded with a line or two, and rightly?

    python benchmarks/frameworks.py [--quick] [--json FILE] [--only NAME ...]

Needs what `pip install 'pathkernel[frameworks]' datasets` installs. Every program is there twice: as it was, in
`frameworks/plain`, and with the callback's lines, in `frameworks/recorded`. A row says what these lines are and whether
the record is right:

framework, case         a framework, or several, and the program
lines                   added or changed in the recorded program (`git diff -w`), without imports
steps                   steps of the optimizer that are explained
recorded                whether training ran to its end under the recorder
residual                largest of |output − Σ shares − Σ channels|, relative to the largest output that was explained
unexplained             largest part of an output that came from weights changed outside the optimizer, nobody said why
split_error             how far rows of gradients are from passes of the batches as they ran; None where not measured
agreement               part of the queries of which the machine predicts what the network does
bit_identical_training  whether weights, buffers, and the random states of torch, numpy and Python end with the same
                        bits as without the recorder
overhead                seconds with the recorder, relative to those without; these programs take a second or two, of
                        which the trial of the first step and the audits take most
explain_ok              whether shares and channels are finite and add up to the outputs, within the tolerance
path_kernel_ok          whether the path kernel of the queries is finite, symmetric, and positive semi-definite
error, warning          first lines of what went wrong, and of what the certificate doubts; the benchmark goes on

NAME is that of a program, or of a framework. Exit status 1 where a row lacks something: the targets are at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from _frameworks_programs import CASES, LINES_LIMIT, PROGRAMS
from _programs import Program, Row, measure, shown

PLACE = Path(__file__).resolve().parent / "frameworks"
FRAMEWORKS = {name: framework for framework, programs in PROGRAMS.items() for name in programs}
LIBRARIES = ("lightning", "transformers", "skorch", "accelerate")


def check_files(place: Path) -> None:
    """Refuse a table that is not the folders': a program that nobody runs, or one that is not there."""
    for version in ("plain", "recorded"):
        files = {path.stem for path in (place / version).glob("*.py")}
        if files != FRAMEWORKS.keys():
            missing, unknown = sorted(FRAMEWORKS.keys() - files), sorted(files - FRAMEWORKS.keys())
            raise FileNotFoundError(f"{place / version}: not there: {missing}; not in the table: {unknown}")


def program_of(name: str) -> Program:
    return PROGRAMS[FRAMEWORKS[name]][name]


def measure_case(name: str, quick: bool) -> Row:
    program = program_of(name)
    length = program.short if quick else program.length
    assert length is not None
    from accelerate.state import AcceleratorState

    # With its precision, it is one for all that a process does.
    AcceleratorState._reset_state(reset_partial_state=True)
    figures = measure(program, name, PLACE, (length,), 1 if quick else 3, draws=True)
    return {"framework": FRAMEWORKS[name], "case": name, "what": program.what} | figures


# -- judgement ---------------------------------------------------------------------------------------------------------

# Rows and passes of whole batches round differently. A value in bfloat16 is rounded by up to 2^-9 of it, and what a row
# is made of four times each way (two layers, there and back): by up to 8 · 2^-9 together.
SPLIT_LIMIT = {"float32": 1e-5, "bfloat16": 2**-6}


def type_of(row: Row) -> str:
    return "bfloat16" if program_of(row["case"]).tolerance > 1e-5 else "float32"


def verdict(row: Row) -> str:
    """What a row lacks; empty where nothing."""
    tolerance = program_of(row["case"]).tolerance
    if not row["recorded"]:
        return "not recorded"
    lacks = [
        ("lines", row["lines"] <= LINES_LIMIT[row["framework"]]),
        ("other bits", row["bit_identical_training"]),
        ("no steps", row["steps"]),
        ("not explained", row["explain_ok"]),
        ("residual", row["residual"] is not None and row["residual"] <= tolerance),
        ("unexplained changes", row["unexplained"] is not None and row["unexplained"] <= tolerance),
        ("split error", row["split_error"] is None or row["split_error"] <= SPLIT_LIMIT[type_of(row)]),
        ("agreement", row["agreement"] == 1),
        ("path kernel", row["path_kernel_ok"]),
    ]
    return ", ".join(what for what, good in lacks if not good)


LINE = "{:<11} {:<31} {:>5} {:>5} {:>9} {:>9} {:>6} {:>5} {:>8}  {}"


def print_row(row: Row) -> None:
    print(
        LINE.format(
            row["framework"],
            row["case"],
            row["lines"],
            shown(row["steps"]),
            shown(row["residual"], ".1e"),
            shown(row["split_error"], ".1e"),
            shown(row["agreement"], ".2f"),
            shown(row["bit_identical_training"]),
            shown(row["overhead"], ".2f"),
            "; ".join(filter(None, (verdict(row), row["error"], row["warning"])))[:160],
        ),
        flush=True,
    )


def within_targets(rows: list[Row], whole: bool) -> bool:
    """Print each target with what was measured."""
    lacking = [row["case"] for row in rows if verdict(row)]
    print()
    print(
        f"recorded and explained, in few lines and with the same bits: target all {len(rows)}; measured "
        f"{len(rows) - len(lacking)}{': not ' + ', '.join(lacking) if lacking else ''}"
    )
    for framework, limit in LINES_LIMIT.items():
        lines = [row["lines"] for row in rows if row["framework"] == framework]
        if lines:
            print(f"lines for {framework}: target ≤ {limit}; measured at most {max(lines)}")
    few = [framework for framework, least in CASES.items() if len(PROGRAMS[framework]) < least] if whole else []
    if whole:
        counts = (f"{framework} {len(PROGRAMS[framework])} of {least}" for framework, least in CASES.items())
        print(f"programs: {', '.join(counts)}")
    for figure in ("residual", "split_error"):
        for dtype in SPLIT_LIMIT:
            own = [row for row in rows if type_of(row) == dtype]
            values = [(row[figure], row["case"]) for row in own if row[figure] is not None]
            if values:
                tolerance = max(program_of(row["case"]).tolerance for row in own)
                bound = tolerance if figure == "residual" else SPLIT_LIMIT[dtype]
                value, case = max(values)
                name = f"{figure.replace('_', ' ')} in {dtype}"
                print(f"{name}: target ≤ {bound:.1g}; measured at worst {value:.1e} ({case})")
    recorded = [row for row in rows if row["recorded"]]
    if recorded:
        ratios = [row["overhead"] for row in recorded]
        more = [(row["overhead"] - 1) * row["seconds"] for row in recorded]
        print(
            f"overhead: median {np.median(ratios):.2f}, at worst {max(ratios):.2f}; in seconds, median "
            f"{np.median(more):.2f}, at worst {max(more):.2f}"
        )
    return not lacking and not few


def version_of(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "–"


def quieten() -> None:
    """Let the frameworks write neither bars nor advice, and ask nobody for models."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    logging.disable(logging.WARNING)  # lightning sets its own logger's level when it is imported
    for library in (*LIBRARIES, "torch"):
        warnings.filterwarnings("ignore", module=library)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and each program once")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    names = [*FRAMEWORKS, *PROGRAMS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="programs, or frameworks")
    arguments = parser.parse_args()

    check_files(PLACE)
    quieten()
    torch.set_num_threads(1)  # these networks are so small that threads would only wait for each other
    print(f"Programs of frameworks{' (quick)' if arguments.quick else ''}")
    versions = ", ".join(f"{library} {version_of(library)}" for library in ("torch", *LIBRARIES))
    print(f"python {platform.python_version()}, {versions}, {platform.machine()}, one thread, {time.strftime('%F')}")
    print(LINE.format("framework", "case", "lines", "steps", "residual", "split", "agree", "bits", "overhead", ""))
    wanted = arguments.only or list(PROGRAMS)
    rows = []
    for name, framework in FRAMEWORKS.items():
        if name in wanted or framework in wanted:
            rows.append(measure_case(name, arguments.quick))
            print_row(rows[-1])
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0 if within_targets(rows, whole=not arguments.only) else 1


if __name__ == "__main__":
    sys.exit(main())
