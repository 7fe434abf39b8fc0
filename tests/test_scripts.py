"""Examples and benchmarks run, and say of themselves whether they came out right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
KEYS = {
    "exactness.py": {
        *("optimizer", "network", "loss", "dtype", "quadrature", "residual", "quadrature_error"),
        *("split_error", "gradients_per_step", "seconds"),
    },
    "certificate.py": {
        *("network", "engine", "n", "refused", "split_error", "true_error", "residual", "quadrature_error"),
        *("shares_error", "covered", "seconds_of_check"),
    },
    "orders.py": {"quadrature", "step_size", "residual", "order"},
    "compilation.py": {"network", "milliseconds_eager", "milliseconds_compiled", "ratio"},
    "engines.py": {"workload", "method", "seconds", "floor_seconds", "peak_mb", "error"},
    "faults.py": {"fault", "trials", "survived", "lost", "silently_wrong"},
    "recording.py": {"model", "optimizer", "level", "ratio", "milliseconds_per_step", "target"},
    "structure.py": {"figure", "value"},
    "sgd_or_adam.py": {"optimizer", "rank_correlation", "residual_exact", "residual_as_sgd"},
}


PARTS = {"certificate.py": ("--parts", "coupled", "refused", "broken", "alarms")}
"""Of benchmarks whose other parts are tests by themselves (zoo, bars, threads), or depend on the machine's speed."""


def run(script: Path, *arguments: str) -> None:
    environment = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script.name}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_check_themselves(example: Path) -> None:
    run(example)


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_benchmarks_keep_their_limits_and_write_flat_rows(name: str, tmp_path: Path) -> None:
    run(ROOT / "benchmarks" / name, "--quick", "--json", str(tmp_path / "rows.json"), *PARTS.get(name, ()))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(row.keys() >= KEYS[name] for row in rows)
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())


def test_every_benchmark_is_tried() -> None:
    assert {path.name for path in (ROOT / "benchmarks").glob("[!_]*.py")} == set(KEYS)
