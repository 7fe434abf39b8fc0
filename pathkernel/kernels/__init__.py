"""Kernels as objects: the contract, and sums, products, multiples, cosines, centred and repaired kernels."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.kernels.centering import CenteredKernel as CenteredKernel
    from pathkernel.kernels.cosine import CosineKernel as CosineKernel
    from pathkernel.kernels.kernel import Kernel as Kernel
    from pathkernel.kernels.kernel import ProductKernel as ProductKernel
    from pathkernel.kernels.kernel import ScaledKernel as ScaledKernel
    from pathkernel.kernels.kernel import SumKernel as SumKernel
    from pathkernel.kernels.kernel import distance as distance
    from pathkernel.kernels.repair import RepairedKernel as RepairedKernel
    from pathkernel.kernels.repair import SpectrumChange as SpectrumChange

_HOMES = {
    "CenteredKernel": "kernels.centering",
    "CosineKernel": "kernels.cosine",
    "Kernel": "kernels.kernel",
    "ProductKernel": "kernels.kernel",
    "RepairedKernel": "kernels.repair",
    "ScaledKernel": "kernels.kernel",
    "SpectrumChange": "kernels.repair",
    "SumKernel": "kernels.kernel",
    "distance": "kernels.kernel",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
