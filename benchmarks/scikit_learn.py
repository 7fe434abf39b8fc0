"""Estimators whose kernel is learnt, beside tuned ones whose kernel is given.

    python benchmarks/scikit_learn.py [--quick] [--json FILE] [--only PART …]

digits, breast-cancer, wine, diabetes    with defaults, beside what is tuned (`_scikit_learn_defaults.py`)
irrelevant-features, shifted-digits      where a learnt kernel should win (`_scikit_learn_learnt.py`)
gp-digits, gp-diabetes                   likelihood and calibration of Gaussian processes (`_scikit_learn_processes.py`)
coin-flips                               cross-validation on random labels (`_scikit_learn_leaks.py`)
leak-warnings                            who is warned of a leak, rightly and wrongly (`_label_leak.py`)
two-sample                               do two sets of images differ? (`_two_sample.py`)

estimator, data, metric   what was measured on held-out samples, mean over splits: accuracy, R², an error, …
score, peer, peer_score   of the estimator and of what it is compared with, on the same splits
points, error             hundredths by which the estimator is better, and the standard error of their mean over splits
fit, predict              CPU seconds, one thread
ok                        whether what has a limit keeps it: `at_least` points, times on digits, chance on coin flips,
                          warnings, the size of two-sample tests

Exit status 1 if a row does not. Quick rows are held to no points and no times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # seconds are of one thread

import _label_leak
import _scikit_learn_defaults
import _scikit_learn_leaks
import _scikit_learn_learnt
import _scikit_learn_processes
import _two_sample
import sklearn
import torch
from _scikit_learn_rows import Row

PARTS: dict[str, Callable[[bool], Iterable[Row]]] = {
    **{name.replace(" ", "-"): partial(_scikit_learn_defaults.rows, name) for name in _scikit_learn_defaults.DATA},
    "irrelevant-features": _scikit_learn_learnt.irrelevant_features,
    "shifted-digits": _scikit_learn_learnt.shifted,
    "gp-digits": _scikit_learn_processes.classification,
    "gp-diabetes": _scikit_learn_processes.regression,
    "coin-flips": _scikit_learn_leaks.rows,
    "leak-warnings": lambda quick: leak_warning_rows(quick),
    "two-sample": lambda quick: two_sample_rows(quick),
}
LINE = "{:<45} {:<40} {:<36} {:>7} {:<30} {:>7} {:>7} {:>6} {:>7} {:>8}  {}"
HEADINGS = ("estimator", "data", "metric", "score", "peer", "its", "points", "error", "fit", "predict", "ok")


def two_sample_rows(quick: bool) -> Iterator[Row]:
    """Power of the two-sample test under each kernel, beside that of the RBF kernel at as many samples."""
    found = _two_sample.rows(quick)
    others = {row["samples"]: row["power"] for row in found if row["kernel"].startswith("RBF")}
    for row in found:
        peer_score = others[row["samples"]]
        yield row | {
            "estimator": f"two-sample test, {row['kernel']}",
            "data": f"{row['data']}, {row['samples']} of each, {row['share']:.0%} 8s",
            "metric": "power at 5 %",
            "score": row["power"],
            "peer": "RBF, median distance",
            "peer_score": peer_score,
            "points": 100 * (row["power"] - peer_score),
            "fit_seconds": None,
            "predict_seconds": None,
            "ok": row["size_ok"],
        }


def leak_warning_rows(quick: bool) -> Iterator[Row]:
    """How often each use of a kernel of all labels is warned of, beside how often it leaks."""
    for row in _label_leak.rows(quick):
        if "use" not in row:  # the cost
            yield row | {
                "estimator": "PathKernel",
                "data": f"{row['samples']} digits",
                "metric": "share of time that looking out takes",
                "score": row["share"],
                "peer": "PathKernel that does not look",
                "peer_score": 0.0,
                "fit_seconds": row["kernel_seconds"],
                "predict_seconds": None,
                "ok": True,
            }
            continue
        warned, expected = row["warned"] / row["trials"], float(row["leaks"] and row["leak"] == "warn")
        yield row | {
            "estimator": row["use"],
            "data": f'digits, leak="{row["leak"]}"',
            "metric": "part of the trials warned",
            "score": warned,
            "peer": "leaks and is to be warned",
            "peer_score": expected,
            "fit_seconds": None,
            "predict_seconds": None,
            # A false alarm is no miss: whoever means the part that is fitted says `leak="allow"`.
            "ok": warned == expected or (row["leak"] == "warn" and not row["leaks"]),
        }


def line(row: Row) -> str:
    """A row as it is printed."""
    numbers = (row.get("points"), row.get("points_error"), row["fit_seconds"], row["predict_seconds"])
    points, error, fit, predict = (
        form.format(number) if number is not None else ""
        for form, number in zip(("{:+.2f}", "{:.2f}", "{:.2f}", "{:.2f}"), numbers, strict=True)
    )
    names = row["estimator"], row["data"], row["metric"], f"{row['score']:.4f}", row["peer"], f"{row['peer_score']:.4f}"
    return LINE.format(*names, points, error, fit, predict, "ok" if row["ok"] else "MISSED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples, one split, one or three epochs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="of the parts")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {platform.machine()}, {time.strftime('%F')}\n"
    )
    print(LINE.format(*HEADINGS), flush=True)
    found: list[Row] = []
    for part in (part for part in PARTS if part in arguments.only):
        for row in PARTS[part](arguments.quick):
            found.append(row)
            print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    missed = [f"{row['estimator']} on {row['data']}" for row in found if not row["ok"]]
    print(f"\n{len(found)} rows, {len(missed)} missed{': ' if missed else ''}{'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
