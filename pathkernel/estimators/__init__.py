"""scikit-learn: estimators that train a network in ``fit``, and the path kernel where a callable is not taken."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
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

_HOMES = {
    "GaussianProcessKernel": "estimators.gaussian_process",
    "KernelMachineClassifier": "estimators.kernel_machines",
    "KernelMachineRegressor": "estimators.kernel_machines",
    "PathKernelFeatures": "estimators.features",
    "PathKernelGP": "estimators.gaussian_processes",
    "PathKernelGPClassifier": "estimators.gaussian_processes",
    "PathKernelRidge": "estimators.ridge",
    "PathKernelRidgeClassifier": "estimators.ridge",
    "PathKernelSVC": "estimators.support_vectors",
    "PathKernelSVR": "estimators.support_vectors",
    "PathKernelTransformer": "estimators.transformer",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
