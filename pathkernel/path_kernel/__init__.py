"""The kernel along the path: tangent kernels integrated over training, their nodes, features and streaming."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.path_kernel.path_kernel import PathKernel as PathKernel
    from pathkernel.path_kernel.streaming import StreamingFeatures as StreamingFeatures
    from pathkernel.path_kernel.streaming import StreamingGram as StreamingGram

_HOMES = {
    "PathKernel": "path_kernel.path_kernel",
    "StreamingFeatures": "path_kernel.streaming",
    "StreamingGram": "path_kernel.streaming",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
