"""A network trained by gradient descent is a kernel machine; this library makes that true in practice.

The public nouns are loaded when they are first used, so that importing the package, or asking the command line for
help, does not wait for torch.
"""

from typing import TYPE_CHECKING

from pathkernel._version import __version__ as __version__
from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel import analysis as analysis
    from pathkernel import callbacks as callbacks
    from pathkernel import dynamics as dynamics
    from pathkernel import errors as errors
    from pathkernel import influence as influence
    from pathkernel import kernels as kernels
    from pathkernel import optimizers as optimizers
    from pathkernel import plotting as plotting
    from pathkernel import testing as testing
    from pathkernel.dynamics.game import GameRecorder as GameRecorder
    from pathkernel.errors import LabelLeakWarning as LabelLeakWarning
    from pathkernel.estimators.features import PathKernelFeatures as PathKernelFeatures
    from pathkernel.estimators.gaussian_process import GaussianProcessKernel as GaussianProcessKernel
    from pathkernel.estimators.gaussian_processes import PathKernelGP as PathKernelGP
    from pathkernel.estimators.gaussian_processes import PathKernelGPClassifier as PathKernelGPClassifier
    from pathkernel.estimators.kernel_machines import KernelMachineClassifier as KernelMachineClassifier
    from pathkernel.estimators.kernel_machines import KernelMachineRegressor as KernelMachineRegressor
    from pathkernel.estimators.ridge import PathKernelRidge as PathKernelRidge
    from pathkernel.estimators.ridge import PathKernelRidgeClassifier as PathKernelRidgeClassifier
    from pathkernel.estimators.support_vectors import PathKernelSVC as PathKernelSVC
    from pathkernel.estimators.support_vectors import PathKernelSVR as PathKernelSVR
    from pathkernel.estimators.transformer import PathKernelTransformer as PathKernelTransformer
    from pathkernel.gradients.layers.rules import layer_rule as layer_rule
    from pathkernel.influence.datamodels import Datamodel as Datamodel
    from pathkernel.influence.datamodels import datamodel as datamodel
    from pathkernel.influence.labels import LabelQuality as LabelQuality
    from pathkernel.influence.labels import label_quality as label_quality
    from pathkernel.kernel_machine.attributions import Attributions as Attributions
    from pathkernel.kernel_machine.kernel_machine import KernelMachine as KernelMachine
    from pathkernel.kernel_machine.streaming import StreamingShares as StreamingShares
    from pathkernel.path_kernel.path_kernel import PathKernel as PathKernel
    from pathkernel.path_kernel.streaming import StreamingFeatures as StreamingFeatures
    from pathkernel.path_kernel.streaming import StreamingGram as StreamingGram
    from pathkernel.quadrature import Adaptive as Adaptive
    from pathkernel.quadrature import DiscreteGradient as DiscreteGradient
    from pathkernel.quadrature import GaussLegendre as GaussLegendre
    from pathkernel.quadrature import LeftEndpoint as LeftEndpoint
    from pathkernel.quadrature import Midpoint as Midpoint
    from pathkernel.quadrature import Trapezoid as Trapezoid
    from pathkernel.recording.indexed import IndexedDataset as IndexedDataset
    from pathkernel.recording.indexed import indexed as indexed
    from pathkernel.recording.recorder import KernelRecorder as KernelRecorder
    from pathkernel.storage.disk import DiskStore as DiskStore
    from pathkernel.tangent_kernel.engines.projection import Projection as Projection
    from pathkernel.tangent_kernel.output_probes import OutputProbes as OutputProbes
    from pathkernel.tangent_kernel.tangent_kernel import TangentKernel as TangentKernel
    from pathkernel.trajectory.observer import StepObserver as StepObserver
    from pathkernel.trajectory.schedule import Every as Every
    from pathkernel.trajectory.schedule import Keyframes as Keyframes
    from pathkernel.trajectory.schedule import Nothing as Nothing
    from pathkernel.trajectory.schedule import Schedule as Schedule
    from pathkernel.trajectory.schedule import Streaming as Streaming
    from pathkernel.trajectory.schedule import WeightsOnly as WeightsOnly
    from pathkernel.trajectory.trajectory import Trajectory as Trajectory
    from pathkernel.update_rules.rule import UpdateRule as UpdateRule

_HOMES = {
    "Adaptive": "quadrature",
    "Attributions": "kernel_machine.attributions",
    "Datamodel": "influence.datamodels",
    "DiscreteGradient": "quadrature",
    "DiskStore": "storage.disk",
    "Every": "trajectory.schedule",
    "GameRecorder": "dynamics.game",
    "GaussLegendre": "quadrature",
    "GaussianProcessKernel": "estimators.gaussian_process",
    "IndexedDataset": "recording.indexed",
    "KernelMachine": "kernel_machine.kernel_machine",
    "KernelMachineClassifier": "estimators.kernel_machines",
    "KernelMachineRegressor": "estimators.kernel_machines",
    "KernelRecorder": "recording.recorder",
    "Keyframes": "trajectory.schedule",
    "LabelLeakWarning": "errors",
    "LabelQuality": "influence.labels",
    "LeftEndpoint": "quadrature",
    "Midpoint": "quadrature",
    "Nothing": "trajectory.schedule",
    "OutputProbes": "tangent_kernel.output_probes",
    "PathKernel": "path_kernel.path_kernel",
    "PathKernelFeatures": "estimators.features",
    "PathKernelGP": "estimators.gaussian_processes",
    "PathKernelGPClassifier": "estimators.gaussian_processes",
    "PathKernelRidge": "estimators.ridge",
    "PathKernelRidgeClassifier": "estimators.ridge",
    "PathKernelSVC": "estimators.support_vectors",
    "PathKernelSVR": "estimators.support_vectors",
    "PathKernelTransformer": "estimators.transformer",
    "Projection": "tangent_kernel.engines.projection",
    "Schedule": "trajectory.schedule",
    "StepObserver": "trajectory.observer",
    "Streaming": "trajectory.schedule",
    "StreamingFeatures": "path_kernel.streaming",
    "StreamingGram": "path_kernel.streaming",
    "StreamingShares": "kernel_machine.streaming",
    "TangentKernel": "tangent_kernel.tangent_kernel",
    "Trajectory": "trajectory.trajectory",
    "Trapezoid": "quadrature",
    "UpdateRule": "update_rules.rule",
    "WeightsOnly": "trajectory.schedule",
    "datamodel": "influence.datamodels",
    "indexed": "recording.indexed",
    "label_quality": "influence.labels",
    "layer_rule": "gradients.layers.rules",
}

_SUBMODULES = (
    "analysis",
    "callbacks",
    "dynamics",
    "errors",
    "influence",
    "kernels",
    "optimizers",
    "plotting",
    "testing",
)

__all__ = sorted([*_HOMES, *_SUBMODULES, "__version__"])
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, {**_HOMES, **{name: f"{name}:" for name in _SUBMODULES}})
