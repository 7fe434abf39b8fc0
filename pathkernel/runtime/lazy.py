"""Names of a package, and modules of others, that are imported when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from pathkernel.runtime.interrupts import defer_interrupts


def imported(name: str) -> Any:
    """A module that takes its time to load, where it is first used.

    An interrupt within the initialisation of a compiled module comes out as an ImportError: it waits.
    """
    with defer_interrupts():
        return import_module(name)


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package, so that importing it loads none of its modules.

    Parameters
    ----------
    package
        Its ``__name__``.
    homes
        Public name → module of ``pathkernel`` that defines it, such as ``"trajectory.step"``; a name that stands for
        the module itself has it as ``"trajectory.step:"``.

    Returns
    -------
    The two functions (PEP 562).
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, is_module, _ = homes[name].partition(":")
        module = imported(f"pathkernel.{home}")
        value = module if is_module else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
