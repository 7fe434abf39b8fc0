"""A network trained by gradient descent is a kernel machine; this library makes that true in practice.

The public nouns are loaded when they are first used, so that importing the package, or asking the command line for
help, does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pathkernel.attributions import Attributions as Attributions
    from pathkernel.estimators.gaussian_process import GaussianProcessKernel as GaussianProcessKernel
    from pathkernel.estimators.transformer import PathKernelTransformer as PathKernelTransformer
    from pathkernel.kernel_machine import KernelMachine as KernelMachine
    from pathkernel.layers.rules import layer_rule as layer_rule
    from pathkernel.path_features import StreamingFeatures as StreamingFeatures
    from pathkernel.path_kernel import PathKernel as PathKernel
    from pathkernel.quadrature import Adaptive as Adaptive
    from pathkernel.quadrature import DiscreteGradient as DiscreteGradient
    from pathkernel.quadrature import GaussLegendre as GaussLegendre
    from pathkernel.quadrature import LeftEndpoint as LeftEndpoint
    from pathkernel.quadrature import Midpoint as Midpoint
    from pathkernel.quadrature import Trapezoid as Trapezoid
    from pathkernel.recording.indexed import IndexedDataset as IndexedDataset
    from pathkernel.recording.recorder import KernelRecorder as KernelRecorder
    from pathkernel.streaming import StreamingGram as StreamingGram
    from pathkernel.streaming import StreamingShares as StreamingShares
    from pathkernel.tangent_kernel.output_probes import OutputProbes as OutputProbes
    from pathkernel.tangent_kernel.projection import Projection as Projection
    from pathkernel.tangent_kernel.tangent_kernel import TangentKernel as TangentKernel
    from pathkernel.trajectory.disk import DiskStore as DiskStore
    from pathkernel.trajectory.schedule import Schedule as Schedule
    from pathkernel.trajectory.schedule import StepObserver as StepObserver
    from pathkernel.trajectory.schedule import Streaming as Streaming
    from pathkernel.trajectory.trajectory import Trajectory as Trajectory
    from pathkernel.update_rules.rule import UpdateRule as UpdateRule

_HOMES = {
    "Adaptive": "quadrature",
    "Attributions": "attributions",
    "DiscreteGradient": "quadrature",
    "DiskStore": "trajectory.disk",
    "GaussLegendre": "quadrature",
    "GaussianProcessKernel": "estimators.gaussian_process",
    "IndexedDataset": "recording.indexed",
    "KernelMachine": "kernel_machine",
    "KernelRecorder": "recording.recorder",
    "LeftEndpoint": "quadrature",
    "Midpoint": "quadrature",
    "OutputProbes": "tangent_kernel.output_probes",
    "PathKernel": "path_kernel",
    "PathKernelTransformer": "estimators.transformer",
    "Projection": "tangent_kernel.projection",
    "Schedule": "trajectory.schedule",
    "StepObserver": "trajectory.schedule",
    "Streaming": "trajectory.schedule",
    "StreamingFeatures": "path_features",
    "StreamingGram": "streaming",
    "StreamingShares": "streaming",
    "TangentKernel": "tangent_kernel.tangent_kernel",
    "Trajectory": "trajectory.trajectory",
    "Trapezoid": "quadrature",
    "UpdateRule": "update_rules.rule",
    "layer_rule": "layers.rules",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"pathkernel.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pathkernel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
