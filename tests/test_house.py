"""The house is in order: lint, types, who imports whom, documentation, and commands that do what the README says."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pathkernel"

# A third-party library is imported in one place. import-linter sees only top-level packages, so submodules such as
# torch.distributed, and places that do not exist yet, are checked here.
IMPORTED_ONLY_IN = {
    "torch.distributed": "distributed",
    "dask": "distributed",
    "matplotlib": "plotting",
    "jinja2": "plotting",
    "zarr": "nowhere: its format is written and read without it",
    "numcodecs": "storage/format",
    "safetensors": "cli",
    "lightning": "callbacks",
    "transformers": "callbacks",
    "skorch": "callbacks",
    "accelerate": "callbacks",
}


def passes(*command: str, **variables: str) -> None:
    """Run this interpreter at the root; fail with all it printed unless it exits with 0."""
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "120"} | variables
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)


def test_ruff() -> None:
    passes("-m", "ruff", "check", ".")
    passes("-m", "ruff", "format", "--check", ".")


def test_shapes_are_checked_wherever_they_are_written() -> None:
    imports = re.compile(r"^from pathkernel\._typing import .*\b(?:Float|Int)\b", flags=re.MULTILINE)
    written = {
        f"pathkernel.{file.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}"
        for file in PACKAGE.rglob("*.py")
        if imports.search(file.read_text("utf-8"))
    }
    assert "pathkernel.path_kernel.nodes" in written
    shaped = set(re.findall(r'^    "(pathkernel\.[\w.]+)",$', (ROOT / "tests/conftest.py").read_text(), re.MULTILINE))
    assert shaped == written


SHAPES = {
    "tests/path_kernel/test_features.py": (
        "test_streamed_features_are_those_of_the_record[rates-trapezoid]",
        "test_streamed_features_are_those_of_the_record[statistics-left]",
        "test_the_kernel_as_a_linear_operator",
        "test_unbiased_and_the_reported_error_is_true[{'outputs': 'loss', 'steps': 2}]",
        "test_unbiased_and_the_reported_error_is_true[{'preconditioner': 'optimizer'}]",
        "test_unbiased_and_the_reported_error_is_true[{'tolerance': 0.01}]",
        "test_unbiased_and_the_reported_error_is_true[{}]",
    ),
    "tests/tangent_kernel/test_projection.py": (
        "test_a_sample_has_one_feature_vector[layer_norm-rademacher]",
        "test_a_sample_has_one_feature_vector[shared-tensor]",
        "test_as_the_engine_of_a_tangent_kernel",
        "test_convolved_sketches_are_those_of_the_gradients",
    ),
    "tests/test_mission.py": (
        "test_the_mission[coefficients_and_offset]",
        "test_the_mission[exponential_average]",
        "test_the_mission[gradient_flow]",
        "test_the_mission[kernel_in_gaussian_process]",
        "test_the_mission[langevin]",
        "test_the_mission[soft_batches]",
    ),
}
"""Tests that lead through the modules that write shapes; the others in these files call no function of these modules
that they do not call (as a profile of each showed)."""


@pytest.mark.slow
def test_all_shapes_that_are_written_hold() -> None:
    chosen = [f"{file}::{name}" for file, names in SHAPES.items() for name in names]
    passes("-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", *chosen, PATHKERNEL_CHECK_SHAPES="all")


@pytest.mark.slow
def test_mypy() -> None:
    passes("-m", "mypy")


def test_imports() -> None:
    # `python -m importlinter` does not exist, and `python -m importlinter.cli` does nothing, successfully.
    passes("-c", "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache', '--no-logo'])")


@functools.cache
def imported_modules(file: Path) -> set[str]:
    """Return the dotted names that a module imports, ``from a import b`` counting as both ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("library", "place"), IMPORTED_ONLY_IN.items())
def test_libraries_are_imported_in_one_place(library: str, place: str) -> None:
    intruders = [
        file.relative_to(PACKAGE).as_posix()
        for file in sorted(PACKAGE.rglob("*.py"))
        if not file.relative_to(PACKAGE).is_relative_to(place)
        and any(name == library or name.startswith(library + ".") for name in imported_modules(file))
    ]
    assert not intruders, f"{library} may be imported only in pathkernel/{place}, but is in {intruders}"


USERS_FILE = """
import torch
import pathkernel as pk

model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.zeros(4, 3), torch.zeros(4, 1)
recorder = pk.KernelRecorder(model, optimizer, torch.nn.MSELoss(), data=data, schedule=pk.Keyframes(8))
pk.Schedule(every=3).bytes_per_step
pk.errors.InputError
machine = pk.KernelMachine(recorder.trajectory, average="ema")
"""
MISTAKES = {
    "pk.KernelRecorder(model, optimizer, date=data)": 'Unexpected keyword argument "date" for "KernelRecorder"',
    'pk.KernelRecorder(model, optimizer, data=data, audit_every="often")': 'incompatible type "str"',
    "pk.KernelRecorder(optimizer, model, data=data)": 'has incompatible type "Linear"; expected "Optimizer |',
    "pk.KernelRecordre(model, optimizer, data=data)": 'Module has no attribute "KernelRecordre"',
    'pk.Keyframes("8")': 'Argument 1 to "Keyframes" has incompatible type "str"; expected "int"',
    "recorder.announce()": 'Missing positional argument "ids"',
    "machine.explain(data[0]).share": '"Attributions" has no attribute "share"',
}


@pytest.mark.slow
def test_types_reach_users(tmp_path: Path) -> None:
    # A copy as a wheel would install it: mypy takes types from a package in site-packages only if it has py.typed.
    passes("-m", "venv", "--without-pip", str(tmp_path / "venv"))
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    shutil.copytree(PACKAGE, site / "pathkernel", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "others.pth").write_text("\n".join({str(Path(torch.__file__).parents[1])}))
    user = tmp_path / "user.py"
    user.write_text(USERS_FILE + "\n".join(MISTAKES))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(tmp_path / "venv" / "bin" / "python"), str(user)],
        cwd=tmp_path, text=True, capture_output=True, check=False,
    )  # fmt: skip
    first = USERS_FILE.count("\n") + 1
    found = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if ": error: " in line}
    assert set(found) == set(range(first, first + len(MISTAKES))), done.stdout
    for number, said in enumerate(MISTAKES.values(), first):
        assert said in found[number]


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["as it is", pytest.param("with frameworks", marks=pytest.mark.frameworks)])
def test_docs_build(installed: str, tmp_path: Path) -> None:
    if installed == "with frameworks":
        for needed in ("sphinx", "lightning", "transformers", "skorch"):
            pytest.importorskip(needed)
    # Built from a copy, so that nothing generated lands in the tree; the gallery's examples are shown, not run.
    for folder in ("docs", "examples"):
        generated = shutil.ignore_patterns("_build", "auto_examples", "generated", "__pycache__", "sg_*.rst")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=generated)
    source, html = tmp_path / "docs", tmp_path / "html"
    passes("-m", "sphinx", "-q", "-W", "--keep-going", str(source), str(html))
    assert (html / "index.html").is_file()
    # Whole without a network: no page loads a script, a style or a picture from elsewhere.
    loaded = re.compile(r"""<(?:script|img|link)[^>]+(?:src|href)=["'](?:https?:)?//[^"']+""")
    assert not [found for page in html.rglob("*.html") for found in loaded.findall(page.read_text("utf-8"))]
    # Callbacks have pages whether their frameworks are installed or not, with the callbacks' own docstrings.
    for name in ("LightningRecorder", "TrainerRecorder", "SkorchRecorder"):
        page = (html / "reference" / "generated" / f"pathkernel.callbacks.{name}.html").read_text("utf-8")
        described = page[page.index("<dt ") : page.index("</article>")]
        assert re.search(r"<p>[^<]*\brecord", described)
    page = (html / "explanation" / "mathematics.html").read_text("utf-8")
    script = re.search(r'src="([^"?]*mathjax[^"?]*)', page)
    assert script and (html / "explanation" / script[1]).resolve().is_file()
    header = re.search(r"<header .*?</header>", (html / "index.html").read_text("utf-8"), flags=re.DOTALL)
    assert header is not None and "More" not in header[0]
    assert all(name in header[0] for name in ("Tutorials", "How to", "Explanation", "Reference"))


def blocks_of(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "tutorials/quick_start",
        "how_to/long_runs",
        "how_to/real_training_loops",
        "how_to/models_that",
        "how_to/kernels_as_objects",
        "how_to/attribution",
        "how_to/scikit_learn",
        "how_to/find_wrong_labels",
        "how_to/near_duplicates",
        "how_to/prune_a_training_set",
        "how_to/what_to_label_next",
        "explanation/two_players",
    ],
)
def test_pages_run_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks_of(f"docs/{page}.md", "python"):
        exec(block, names)


@pytest.mark.slow
def test_readme_code_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(60, 64, generator=generator), torch.randint(10, (60,), generator=generator)
    names: dict[str, object] = {"X_train": X[:50], "y_train": y[:50], "X_test": X[50:], "y_test": y[50:]}
    names |= {"X_new": X[50:55], "y_new": y[50:55]}
    for block in blocks_of("README.md", "python"):
        exec(block, names)


def test_readme_opens_with_two_commands_of_one_line() -> None:
    blocks = blocks_of("README.md", "sh")
    assert all(block.count("\n") == 1 and not block.endswith("\\\n") for block in blocks[:2])
    main_job, tests = blocks[:2]
    assert main_job.rstrip().endswith("pathkernel demo") and "-e '.[demo]'" in main_job
    assert "pytest" in tests


def test_ci_runs_the_test_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    commands = re.findall(r"^\(\n(.*\n)\)$", script, re.MULTILINE)
    assert commands == blocks_of("README.md", "sh")[1:3]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_constraints_pin_every_declared_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.match(r"[A-Za-z0-9_.-]+", requirement)[0] for requirement in declared}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not names - pinned.keys() - {"pathkernel"}  # extras are made of extras
    assert not [name for name, version in pinned.items() if "+" in version], "local versions exist on one index only"


def test_version_is_stated_once_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f'__version__ = "{version}"' in (PACKAGE / "_version.py").read_text("utf-8")
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
