"""The path kernel where scikit-learn wants something else than a callable."""

from pathkernel.runtime.lazy import lazy_names

_HOMES = {
    "GaussianProcessKernel": "estimators.gaussian_process",
    "PathKernelTransformer": "estimators.transformer",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
