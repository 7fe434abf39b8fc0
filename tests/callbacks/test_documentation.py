"""What the documentation says of the callbacks runs as printed: pages, examples in docstrings, the numbered example."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "lightning": "lightning",
    "transformers": "transformers",
    "skorch": "skorch",
    "accelerate_and_fabric": "accelerate",
}
"""Page in docs/how_to → what it needs."""

CALLBACKS = {"lightning": "lightning", "trainer": "transformers", "skorch": "skorch"}
"""Module in pathkernel/callbacks → what it needs."""


@pytest.mark.parametrize("page", PAGES)
def test_pages_run_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(PAGES[page])
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "how_to" / f"{page}.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    # A module of its own: classes in it are pickled and copied by name.
    (tmp_path / "as_printed.py").write_text("\n\n".join(blocks), "utf-8")
    command = [sys.executable, "as_printed.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("module", CALLBACKS)
def test_examples_in_docstrings(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(CALLBACKS[module])
    monkeypatch.chdir(tmp_path)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    found = doctest.testmod(importlib.import_module(f"pathkernel.callbacks.{module}"), optionflags=options)
    assert found.attempted and not found.failed


def test_modules_whose_examples_run_are_those_that_there_are() -> None:
    # The others need no framework: their examples, if any, would run nowhere.
    others = {"__init__", "recording", "versions"}
    files = {path.stem for path in (ROOT / "pathkernel" / "callbacks").glob("*.py")}
    assert files >= {*CALLBACKS, *others}
    for name in files - set(CALLBACKS):
        assert ">>> " not in (ROOT / "pathkernel" / "callbacks" / f"{name}.py").read_text("utf-8")
