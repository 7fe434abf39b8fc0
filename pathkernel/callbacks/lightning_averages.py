"""Averages of the weights that callbacks of Lightning keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pathkernel.errors import RecordingError


class BeforeAverages:
    """The place of a callback before those that average, until it is removed.

    When training ends these copy the average into the network, which is then at the end of no step.

    Parameters
    ----------
    trainer, callback
        The trainer, and one of its callbacks.
    """

    def __init__(self, trainer: Any, callback: Any) -> None:
        self._trainer, self._given = trainer, trainer.callbacks
        others = [one for one in trainer.callbacks if one is not callback]
        first = next((place for place, one in enumerate(others) if _averages(one)), len(others))
        if first < trainer.callbacks.index(callback):
            # Another list: the trainer is going through this one.
            trainer.callbacks = [*others[:first], callback, *others[first:]]
        self._made = trainer.callbacks

    def remove(self) -> None:
        """Put the callbacks back into their order, unless somebody else has changed it."""
        if self._trainer.callbacks is self._made:
            self._trainer.callbacks = self._given


def averages_of(trainer: Any, module: nn.Module, network: nn.Module) -> dict[str, nn.Module]:
    """Averages of a part of a module, by the names of the callbacks' classes."""
    name = next((name for name, child in module.named_modules() if child is network), None)
    found: dict[str, nn.Module] = {}
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module) and name is not None:
            inner: Any = average.module if isinstance(average, torch.optim.swa_utils.AveragedModel) else average
            found[type(callback).__name__] = inner.get_submodule(name)
    return found


def refuse_averages(trainer: Any, module: nn.Module) -> None:
    """Refuse an average whose running statistics are found anew when training has ended.

    Raises
    ------
    RecordingError
        With the name of the callback.
    """
    for callback in trainer.callbacks:
        if _averages(callback) and getattr(callback, "_model_contains_batch_norm", False):
            raise RecordingError(
                f"{type(callback).__name__} averages a {type(module).__name__} that has BatchNorm",
                "It finds the running statistics anew in a further pass over the data, which takes no steps: the "
                "network that it makes is at the end of no path",
                "Average with `EMAWeightAveraging` or `WeightAveraging`, which keep statistics with the weights; or "
                "leave out one of the two callbacks",
            )


def _averages(callback: Any) -> bool:
    return hasattr(callback, "_average_model")
