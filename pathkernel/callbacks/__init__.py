"""Callbacks that record training inside the frameworks that run it."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.callbacks.lightning import LightningRecorder as LightningRecorder
    from pathkernel.callbacks.skorch import SkorchRecorder as SkorchRecorder
    from pathkernel.callbacks.trainer import TrainerRecorder as TrainerRecorder

_HOMES = {
    "LightningRecorder": "callbacks.lightning",
    "SkorchRecorder": "callbacks.skorch",
    "TrainerRecorder": "callbacks.trainer",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
