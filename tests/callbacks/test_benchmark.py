"""benchmarks/frameworks.py records programs of each framework, and says of itself whether they came out right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "frameworks.py"
KEYS = {
    *("framework", "case", "lines", "steps", "recorded", "residual", "split_error", "agreement"),
    *("bit_identical_training", "overhead", "error", "warning"),
}
LEAST = {"Lightning": 6, "Trainer": 5, "skorch": 3, "Accelerate": 3}
LIBRARIES = {"Lightning": "lightning", "Trainer": "transformers", "skorch": "skorch", "Accelerate": "accelerate"}


@pytest.mark.frameworks
@pytest.mark.parametrize("framework", LEAST)
def test_programs_of_a_framework_keep_the_limits(framework: str, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[framework])
    command = [sys.executable, str(BENCHMARK), "--quick", "--only", framework, "--json", str(tmp_path / "rows.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) >= LEAST[framework] and all(row.keys() >= KEYS for row in rows)
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())


# -- what needs no framework -------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    spec = importlib.util.spec_from_file_location("benchmark_frameworks", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_program_is_there_plain_and_recorded(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.check_files(benchmark.PLACE)
    for plain in (benchmark.PLACE / "plain").glob("*.py"):
        assert "pathkernel" not in plain.read_text("utf-8")
        assert "pathkernel" in (benchmark.PLACE / "recorded" / plain.name).read_text("utf-8")
    for version in ("plain", "recorded"):
        (tmp_path / version).mkdir()
    with pytest.raises(FileNotFoundError, match="accelerate_"):
        benchmark.check_files(tmp_path)


def test_the_framework_is_in_the_name(benchmark: ModuleType) -> None:
    begins = {"Lightning": "lightning_", "Trainer": "trainer_", "skorch": "skorch_", "Accelerate": "accelerate_"}
    for name, framework in benchmark.FRAMEWORKS.items():
        assert name.startswith((begins[framework], "fabric_")) and (framework == "Accelerate" or "fabric" not in name)


def good_row(benchmark: ModuleType) -> dict[str, Any]:
    name, framework = next(iter(benchmark.FRAMEWORKS.items()))
    figures = {"residual": 1e-7, "split_error": 1e-7, "unexplained": 0.0, "agreement": 1.0, "lines": 2, "steps": 9}
    flags = dict.fromkeys(("recorded", "bit_identical_training", "explain_ok", "path_kernel_ok"), True)
    rest = {"overhead": 3.0, "seconds": 1.0, "error": "", "warning": ""}
    return {"framework": framework, "case": name} | figures | flags | rest


FAULTS = {
    "recorded": (False, "not recorded"),
    "lines": (4, "lines"),
    "bit_identical_training": (False, "other bits"),
    "steps": (0, "no steps"),
    "explain_ok": (False, "not explained"),
    "residual": (1.1e-2, "residual"),
    "unexplained": (1.1e-2, "unexplained changes"),
    "split_error": (1.1e-2, "split error"),
    "agreement": (0.75, "agreement"),
    "path_kernel_ok": (False, "path kernel"),
}


def test_a_good_row_lacks_nothing(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    row = good_row(benchmark)
    assert benchmark.verdict(row) == "" and benchmark.within_targets([row], whole=False)
    assert "measured 1" in capsys.readouterr().out


@pytest.mark.parametrize("figure", FAULTS)
def test_what_a_row_lacks_is_named(benchmark: ModuleType, figure: str, capsys: pytest.CaptureFixture[str]) -> None:
    value, said = FAULTS[figure]
    row = good_row(benchmark) | {figure: value}
    assert benchmark.verdict(row) == said and not benchmark.within_targets([row], whole=False)
    assert f"not {row['case']}" in capsys.readouterr().out


def test_bits_of_generators_count(benchmark: ModuleType, tmp_path: Path) -> None:
    # A program that draws one number more under the recorder, from each generator in turn.
    plain = "import random, numpy, torch\ndef main(steps):\n    return {torch.nn.Linear(1, 1): torch.zeros(2, 1)}\n"
    program = benchmark.Program("", 1, length=1)
    for version in ("plain", "recorded"):
        (tmp_path / version).mkdir()
    for number, draw in enumerate(("pass", "torch.rand(1)", "numpy.random.rand()", "random.random()")):
        (tmp_path / "plain" / f"p{number}.py").write_text(plain)
        changed = plain.replace("    return", f"    model = torch.nn.Linear(1, 1); {draw}\n    return")
        changed = changed.replace("{torch.nn.Linear(1, 1):", "{model:")
        (tmp_path / "recorded" / f"p{number}.py").write_text(changed)
        row = benchmark.measure(program, f"p{number}", tmp_path, (1,), 1, draws=True)
        assert row["bit_identical_training"] is (draw == "pass")
        assert row["error"].startswith("RuntimeError: 0 of 1 networks")
