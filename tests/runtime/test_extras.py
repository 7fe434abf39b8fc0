"""A library that an extra installs and that is not there is named, in whatever way it is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pathkernel as pk
from pathkernel.cli import demo
from pathkernel.runtime.extras import require_extra


class Refuses:
    """An importer that knows a library and does not give it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "not_given":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("module", ["not_there_at_all", "not_given", "set_to_none"])
def test_what_is_missing_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    monkeypatch.setitem(sys.modules, "set_to_none", None)  # type: ignore[arg-type]
    with pytest.raises(pk.errors.MissingExtraError, match=f"A picture needs `{module}`, which .* `\\[plot\\]`"):
        require_extra("plot", "A picture", "json", module)


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_demo_without_the_libraries_of_its_report_trains_nothing(
    library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # type: ignore[arg-type]
    monkeypatch.setattr(demo, "train", lambda *given: pytest.fail("trained before it looked"))
    with pytest.raises(pk.errors.MissingExtraError, match=rf"needs `{library}`.*`\[demo\]`"):
        demo.run(output=tmp_path)


def test_a_module_that_was_put_there_by_hand_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "by_hand", ModuleType("by_hand"))
    require_extra("plot", "A picture", "by_hand")
