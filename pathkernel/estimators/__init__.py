"""The path kernel where scikit-learn wants something else than a callable."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.estimators.gaussian_process import GaussianProcessKernel as GaussianProcessKernel
    from pathkernel.estimators.transformer import PathKernelTransformer as PathKernelTransformer

_HOMES = {
    "GaussianProcessKernel": "estimators.gaussian_process",
    "PathKernelTransformer": "estimators.transformer",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
