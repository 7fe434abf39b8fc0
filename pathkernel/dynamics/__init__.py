"""Older name of `pathkernel.optimizers`, whose optimizers are forwarded."""

from typing import Any

from pathkernel import optimizers

__all__ = optimizers.__all__


def __getattr__(name: str) -> Any:
    return getattr(optimizers, name)


def __dir__() -> list[str]:
    return dir(optimizers)
