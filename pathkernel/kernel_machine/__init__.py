"""The exact machine: the trained network as a sum over its training samples, with a certificate."""

from pathkernel.runtime.lazy import lazy_names

_HOMES = {
    "Attributions": "kernel_machine.attributions",
    "AverageForm": "kernel_machine.forms",
    "ConstantForm": "kernel_machine.forms",
    "EnsembleForm": "kernel_machine.forms",
    "KernelMachine": "kernel_machine.kernel_machine",
    "StreamingShares": "kernel_machine.streaming",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
