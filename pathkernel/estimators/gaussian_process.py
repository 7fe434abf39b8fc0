"""The path kernel as a covariance function of scikit-learn's Gaussian processes."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.gaussian_process.kernels import GenericKernelMixin, Hyperparameter, Kernel

from pathkernel._typing import PyTree
from pathkernel.gradients.pytrees import copied_samples, same_samples


class GaussianProcessKernel(GenericKernelMixin, Kernel):
    r"""A path or tangent kernel as covariance :math:`\sigma^2 K(x, x')`.

    Composes with scikit-learn's own kernels, for example ``GaussianProcessKernel(kernel) + WhiteKernel()``.

    Parameters
    ----------
    kernel
        A `pathkernel.PathKernel` or `pathkernel.TangentKernel`.
    scale
        σ², found by maximum likelihood unless its bounds are ``"fixed"``.
    scale_bounds
        Lower and upper bound of σ², or ``"fixed"``.

    Notes
    -----
    The matrix of the last pair of sample sets is kept with a copy of the samples, because maximum likelihood asks for
    the same matrix at every trial value of σ². It is not saved with the kernel.
    """

    def __init__(
        self, kernel: Any, scale: float = 1.0, scale_bounds: tuple[float, float] | str = (1e-10, 1e10)
    ) -> None:
        self.kernel, self.scale, self.scale_bounds = kernel, scale, scale_bounds

    @property
    def hyperparameter_scale(self) -> Hyperparameter:
        """σ² on a logarithmic scale."""
        return Hyperparameter("scale", "numeric", self.scale_bounds)

    def _matrix(self, X: PyTree, Y: PyTree | None) -> np.ndarray:
        held = getattr(self, "_held", None)
        if held is None or held[0] is not self.kernel or not same_samples(held[1], (X, Y)):
            # Copies: the same array may hold other samples when it comes again.
            self._held = held = (self.kernel, copied_samples((X, Y)), self.kernel(X, Y))
        return held[2]

    def __call__(self, X: PyTree, Y: PyTree | None = None, eval_gradient: bool = False) -> Any:
        """σ² K(X, Y), and its derivative in log σ² where asked."""
        matrix = self.scale * self._matrix(X, Y)
        if not eval_gradient:
            return matrix
        free = not self.hyperparameter_scale.fixed
        return matrix, matrix[:, :, None] if free else np.empty((*matrix.shape, 0))

    def diag(self, X: PyTree) -> np.ndarray:
        """σ² K(x, x), (n,)."""
        return self.scale * self.kernel.diagonal(X)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.kernel).__name__}, scale={self.scale:.3g})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_held"}

    def is_stationary(self) -> bool:
        """False: it depends on where in input space two samples lie."""
        return False

    def clone_with_theta(self, theta: np.ndarray) -> GaussianProcessKernel:
        """Another scale, the same kernel object and the same matrices in hand."""
        scale = float(np.exp(theta[0])) if len(theta) else self.scale
        other = GaussianProcessKernel(self.kernel, scale, self.scale_bounds)
        if hasattr(self, "_held"):
            other._held = self._held
        return other
