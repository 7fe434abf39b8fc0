"""The exact machine: the trained network as a sum over its training samples, with a certificate."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.kernel_machine.attributions import Attributions as Attributions
    from pathkernel.kernel_machine.forms import AverageForm as AverageForm
    from pathkernel.kernel_machine.forms import ConstantForm as ConstantForm
    from pathkernel.kernel_machine.forms import EnsembleForm as EnsembleForm
    from pathkernel.kernel_machine.kernel_machine import KernelMachine as KernelMachine
    from pathkernel.kernel_machine.streaming import StreamingShares as StreamingShares

_HOMES = {
    "Attributions": "kernel_machine.attributions",
    "AverageForm": "kernel_machine.forms",
    "ConstantForm": "kernel_machine.forms",
    "EnsembleForm": "kernel_machine.forms",
    "KernelMachine": "kernel_machine.kernel_machine",
    "StreamingShares": "kernel_machine.streaming",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
