"""The kernel along the path: tangent kernels integrated over training, their nodes, features and streaming."""

from pathkernel.runtime.lazy import lazy_names

_HOMES = {
    "PathKernel": "path_kernel.path_kernel",
    "StreamingFeatures": "path_kernel.streaming",
    "StreamingGram": "path_kernel.streaming",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
