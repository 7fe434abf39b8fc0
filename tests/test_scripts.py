"""Examples and benchmarks run, and say of themselves whether they came out right."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from script_processes import run_script

ROOT = Path(__file__).parent.parent
NEEDED = {"05_lightning": "lightning"}
"""Examples that need a framework, and which."""

EXAMPLES = [
    pytest.param(path, marks=pytest.mark.frameworks if path.stem in NEEDED else (), id=path.stem)
    for path in sorted((ROOT / "examples").glob("[0-9]*.py"))
]
KEYS = {
    "active_learning.py": {
        *("candidates", "criterion", "seeds", "accuracy_50", "accuracy_100", "mean", "beside_margin"),
        "standard_error_margin",
    },
    "added_samples.py": {
        *("network", "optimizer", "seed", "labels", "steps", "rank_correlation", "relative_error", "remainder"),
        "gradient_error",
    },
    "attribution.py": {
        *("data", "network", "optimizer", "seed", "method", "lds_1", "lds_10", "lds_50", "lds_fresh", "loo"),
        *("mislabel_auc", "precision", "seconds", "training_ratio", "peak_mb"),
    },
    "exactness.py": {
        *("optimizer", "network", "loss", "dtype", "quadrature", "residual", "quadrature_error"),
        *("split_error", "gradients_per_step", "seconds"),
    },
    "certificate.py": {
        *("network", "engine", "n", "refused", "split_error", "true_error", "residual", "quadrature_error"),
        *("shares_error", "covered", "seconds_of_check"),
    },
    "dynamics.py": {"quantity", "measured", "expected", "tolerance", "ok"},
    "orders.py": {"quadrature", "step_size", "residual", "order"},
    "compilation.py": {"network", "milliseconds_eager", "milliseconds_compiled", "ratio"},
    "coverage.py": {
        *("architecture", "dtype", "parameters", "covered", "plain_parameters", "reason", "error", "error_of_shares"),
    },
    "engines.py": {"workload", "method", "seconds", "floor_seconds", "peak_mb", "error"},
    "first_call.py": {
        *("network", "samples", "torch_seconds", "fresh_process_seconds", "new_network_seconds"),
        *("new_kernel_seconds", "second_call_seconds"),
    },
    "faults.py": {"fault", "trials", "survived", "lost", "silently_wrong"},
    "generalization.py": {
        *("network", "n", "gap", "bound", "by_kernel", "by_losses", "parameter_distance", "kernel_distance"),
        *("svm_initial", "svm_path", "svm_after", "accuracy"),
    },
    "labels.py": {
        *("data", "flips", "seed", "area_under_margin", "self_influence", "self_share", "final_loss"),
        *("combined", "precision", "seconds", "training_ratio"),
    },
    "loops.py": {
        *("loop", "lines", "recorded", "residual", "split_error", "agreement", "bit_identical_training"),
        *("overhead", "explain_ok", "path_kernel_ok"),
    },
    "near_duplicates.py": {
        *("kind", "place", "part", "kernel", "seed", "planted", "found", "precision", "recall", "by_gap", "by_cosine"),
    },
    "pruning.py": {"data", "criterion", "seeds", "accuracy_20", "difference_60", "standard_error_60"},
    "real_networks.py": {
        *("network", "optimizer", "task", "seconds", "training_seconds", "ratio", "peak_mb", "error"),
    },
    "recording.py": {"model", "optimizer", "level", "ratio", "milliseconds_per_step", "target"},
    "scikit_learn.py": {
        *("estimator", "data", "metric", "score", "peer", "peer_score", "fit_seconds", "predict_seconds"),
    },
    "structure.py": {"figure", "value"},
    "sgd_or_adam.py": {"optimizer", "rank_correlation", "residual_exact", "residual_as_sgd"},
}


PARTS = {
    "attribution.py": (
        *("--tiny", "--only", "digits MLP tanh"),
        *("--methods", "datamodel", "trak_scores", "tracin_scores", "label_quality"),
    ),
    "dynamics.py": ("--only", "norms", "noise"),
    "coverage.py": ("--only", "GPT-2", "ResNet", "ConvNeXt", "U-Net", "LSTM classifier", "MLP-Mixer"),
    "certificate.py": ("--parts", "coupled", "refused", "broken", "alarms"),
    "engines.py": (
        *("--only", "W1 trace", "W2 full", "W3 loss", "path Gram", "shares SGD", "memory", "scaling"),
        *("--methods", "pathkernel", "pathkernel-bfloat16", "torch-floor", "tutorial"),
    ),
    "real_networks.py": ("--steps", "3", "--tasks", "explain 8", "decision_function 8"),
    "loops.py": ("--only", "makemore", "gcn", "tabular", "truncated_bptt", "lbfgs"),
}
"""Of benchmarks whose other parts are tests by themselves (zoo, bars, threads, flows, architectures), take long, or
depend on the machine."""


def run(folder: Path, script: Path, *arguments: str) -> None:
    said = folder / "said.txt"
    status = run_script(script, arguments, ROOT, said)
    assert status == 0, f"{script.name} ended with {status}: {said.read_text('utf-8')[-6000:]}"


@pytest.mark.parametrize("ends", ["raise ValueError('broken')", "import sys; sys.exit('broken')"])
def test_a_script_that_fails_is_noticed(ends: str, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(ends)
    with pytest.raises(AssertionError, match="broken"):
        run(tmp_path, tmp_path / "failing.py")


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_check_themselves(example: Path, tmp_path: Path) -> None:
    if example.stem in NEEDED:
        pytest.importorskip(NEEDED[example.stem])
    run(tmp_path, example)


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_benchmarks_keep_their_limits_and_write_flat_rows(name: str, tmp_path: Path) -> None:
    run(tmp_path, ROOT / "benchmarks" / name, "--quick", "--json", str(tmp_path / "rows.json"), *PARTS.get(name, ()))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(row.keys() >= KEYS[name] for row in rows)
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())


def test_every_benchmark_is_tried() -> None:
    elsewhere = {"frameworks.py": "tests/callbacks/test_benchmark.py"}  # which runs where the frameworks are
    assert all(name in (ROOT / test).read_text("utf-8") for name, test in elsewhere.items())
    assert {path.name for path in (ROOT / "benchmarks").glob("[!_]*.py")} == {*KEYS, *elsewhere}


# -- benchmarks/loops.py -----------------------------------------------------------------------------------------------


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("benchmark_loops", ROOT / "benchmarks" / "loops.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_program_is_there_plain_and_recorded(loops: ModuleType) -> None:
    for version in ("plain", "recorded"):
        assert {path.stem for path in (loops.PLACE / version).glob("*.py")} == set(loops.PROGRAMS)
    for plain in (loops.PLACE / "plain").glob("*.py"):
        assert "https://" in plain.read_text("utf-8")  # what it was written in the manner of
        assert "pathkernel" not in plain.read_text("utf-8")
        assert "pk.KernelRecorder(" in (loops.PLACE / "recorded" / plain.name).read_text("utf-8")


PLAIN = """import torch

for x, y in loader:
    loss(model(x), y).backward()
    for p in parameters:
        p.add_(p.grad)
print("done")
"""


@pytest.mark.parametrize(
    "recorded, lines",
    [
        (PLAIN, 0),
        (PLAIN.replace("import torch\n", "import torch\nimport pathkernel as pk\nfrom a import b\n\n"), 0),
        (PLAIN.replace("in loader", "in recorder.track(loader)"), 1),
        (PLAIN.replace('print("done")\n', ""), 1),
        (PLAIN.replace("    for p in parameters:\n        p.add_(p.grad)\n", "    optimizer.step()\n"), 2),
        # A block around the loop moves it to the right, which changes none of its lines.
        (re.sub("^(for|    )", r"    \1", PLAIN, flags=re.MULTILINE).replace("    for x", "with a:\n    for x"), 1),
    ],
)
def test_lines_of_a_program_are_those_added_changed_or_lost(
    loops: ModuleType, tmp_path: Path, recorded: str, lines: int
) -> None:
    (tmp_path / "plain.py").write_text(PLAIN)
    (tmp_path / "recorded.py").write_text(recorded)
    from _programs import changed_lines  # the fixture has put its folder on the path

    assert changed_lines(tmp_path / "plain.py", tmp_path / "recorded.py") == lines


# -- benchmarks/scikit_learn.py ----------------------------------------------------------------------------------------


def test_calibration_error_is_that_of_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from _scikit_learn_processes import BINS, expected_calibration_error

    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(3), size=200)
    right = generator.random(200) < 0.6
    confidence = probabilities.max(axis=1)
    total = 0.0
    for b in range(BINS):
        inside = (b / BINS <= confidence) & (confidence < (b + 1) / BINS)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(probabilities, right) == pytest.approx(total, rel=1e-12)
    # A certain and right answer is in the last bin, a certain and wrong one is as far off as can be.
    assert expected_calibration_error(np.eye(2), np.array([True, True])) == 0.0
    assert expected_calibration_error(np.eye(2), np.array([False, False])) == 1.0


def test_no_sample_on_which_defaults_were_chosen_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from _scikit_learn_defaults import DATA, REGRESSIONS, development, splits

    for name, load in DATA.items():
        X, y = load(return_X_y=True)
        chosen_on, unseen = development(y, None if name in REGRESSIONS else y)
        assert sorted([*chosen_on, *unseen]) == list(range(len(y)))
        rows = {x.tobytes() for x in X[chosen_on]}
        for X_train, X_test, y_train, y_test in splits(name, 2):
            assert not rows & {x.tobytes() for x in X_test}
            assert not {x.tobytes() for x in X_train} & {x.tobytes() for x in X_test}
            assert len(X_train) + len(X_test) == len(y) and len(y_train) + len(y_test) == len(y)
