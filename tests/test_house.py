"""The house is in order: lint, types, who imports whom, documentation, and commands that do what the README says."""

from __future__ import annotations

import ast
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
    "zarr": "storage/format/groups.py",
    "lightning": "callbacks",
    "transformers": "callbacks",
    "skorch": "callbacks",
    "accelerate": "callbacks",
}


def passes(*command: str) -> None:
    """Run this interpreter at the root; fail with all it printed unless it exits with 0."""
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)


def test_ruff() -> None:
    passes("-m", "ruff", "check", ".")


@pytest.mark.slow
def test_mypy() -> None:
    passes("-m", "mypy")


def test_imports() -> None:
    # `python -m importlinter` does not exist, and `python -m importlinter.cli` does nothing, successfully.
    passes("-c", "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache', '--no-logo'])")


def imported_modules(source: str) -> set[str]:
    """Return the dotted names that a module imports, ``from a import b`` counting as both ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
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
        and any(name == library or name.startswith(library + ".") for name in imported_modules(file.read_text("utf-8")))
    ]
    assert not intruders, f"{library} may be imported only in pathkernel/{place}, but is in {intruders}"


@pytest.mark.slow
def test_docs_build(tmp_path: Path) -> None:
    # Built from a copy, so that nothing generated lands in the tree; the gallery's examples are shown, not run.
    for folder in ("docs", "examples"):
        generated = shutil.ignore_patterns("_build", "auto_examples", "generated", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=generated)
    source, html = tmp_path / "docs", tmp_path / "html"
    passes("-m", "sphinx", "-q", "-W", "--keep-going", str(source), str(html))
    assert (html / "index.html").is_file()


def blocks_of(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["tutorials/quick_start", "how_to/long_runs", "how_to/real_training_loops"])
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
    names: dict[str, object] = {"X_train": X[:50], "y_train": y[:50], "X_test": X[50:]}
    for block in blocks_of("README.md", "python"):
        exec(block, names)


def test_readme_opens_with_two_commands_of_one_line() -> None:
    blocks = blocks_of("README.md", "sh")
    assert all(block.count("\n") == 1 and not block.endswith("\\\n") for block in blocks[:2])
    main_job, tests = blocks[:2]
    assert main_job.rstrip().endswith("pathkernel demo")
    assert "pytest" in tests


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8").rstrip().splitlines()
    assert script[-1] + "\n" == blocks_of("README.md", "sh")[1]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_constraints_pin_every_declared_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.match(r"[A-Za-z0-9_.-]+", requirement)[0] for requirement in declared}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not names - pinned.keys()
    assert not [name for name, version in pinned.items() if "+" in version], "local versions exist on one index only"


def test_version_is_stated_once_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f'__version__ = "{version}"' in (PACKAGE / "_version.py").read_text("utf-8")
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
