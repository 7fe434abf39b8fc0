"""The path kernel as a covariance function of scikit-learn's Gaussian processes."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.gaussian_process.kernels import GenericKernelMixin, Hyperparameter, Kernel

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, is_number
from pathkernel.gradients.pytrees import copied_samples, same_samples
from pathkernel.kernels.kernel import kernel_diagonal, kernel_matrix


class GaussianProcessKernel(GenericKernelMixin, Kernel):
    r"""A path or tangent kernel as covariance, with its amplitude and the noise of the targets.

    .. math:: k(x_i, x_j) = \sigma^2 K(x_i, x_j) + \nu\, \delta_{ij}, \qquad
              \frac{\partial k}{\partial \log \sigma^2} = \sigma^2 K, \quad
              \frac{\partial k}{\partial \log \nu} = \nu\, I

    δ is 1 for one sample in both places, as in `sklearn.gaussian_process.kernels.WhiteKernel`: noise is part of k(X, X)
    and of the diagonal, not of k(X, Y). Composes with scikit-learn's own kernels.

    Parameters
    ----------
    kernel
        A `pathkernel.PathKernel` or `pathkernel.TangentKernel`, a combination of them, or a callable ``(X, Y=None)``.
    scale
        σ² > 0, found by maximum likelihood unless its bounds are ``"fixed"``.
    scale_bounds
        Lower and upper bound of σ², or ``"fixed"``.
    noise
        ν, the variance of independent noise; 0 (default) for none, which then is not searched for either.
    noise_bounds
        Lower and upper bound of ν, or ``"fixed"``.

    Raises
    ------
    InputError
        When it is called or its parameters are asked for, for a scale that is not positive, a negative noise, or bounds
        that are none.

    Notes
    -----
    The matrix of the last pair of sample sets is kept with a copy of the samples, because maximum likelihood asks for
    the same matrix at every trial value of σ² and ν. It is not saved with the kernel. K itself has no parameter to be
    searched for: it was learnt.

    References
    ----------
    Rasmussen and Williams 2006, "Gaussian processes for machine learning", section 2.3 and equation 5.9.

    Examples
    --------
    >>> import numpy, torch, pathkernel as pk
    >>> from sklearn.gaussian_process import GaussianProcessRegressor
    >>> kernel = pk.TangentKernel(torch.nn.Linear(2, 1))
    >>> X = numpy.random.default_rng(0).standard_normal((20, 2))
    >>> covariance = pk.GaussianProcessKernel(kernel, noise=0.1)
    >>> process = GaussianProcessRegressor(covariance).fit(X, X @ [1.0, -1.0])
    >>> bool(process.kernel_.noise < 1e-4)  # there is none
    True
    """

    def __init__(
        self,
        kernel: Any,
        scale: float = 1.0,
        scale_bounds: tuple[float, float] | str = (1e-10, 1e10),
        noise: float = 0.0,
        noise_bounds: tuple[float, float] | str = (1e-10, 1e10),
    ) -> None:
        self.kernel = kernel
        self.scale = scale
        self.scale_bounds = scale_bounds
        self.noise = noise
        self.noise_bounds = noise_bounds

    @property
    def hyperparameter_scale(self) -> Hyperparameter:
        """σ² on a logarithmic scale."""
        self._check()  # before a logarithm is taken, for `theta`
        return Hyperparameter("scale", "numeric", self.scale_bounds)

    @property
    def hyperparameter_noise(self) -> Hyperparameter:
        """ν on a logarithmic scale, on which no noise has no place."""
        return Hyperparameter("noise", "numeric", self.noise_bounds if self.noise else "fixed")

    def _matrix(self, X: PyTree, Y: PyTree | None) -> np.ndarray:
        """K(X, Y)."""
        held = getattr(self, "_held", None)
        if held is None or held[0] is not self.kernel or not same_samples(held[1], (X, Y)):
            # Copies: the same array may hold other samples when it comes again.
            self._held = held = (self.kernel, copied_samples((X, Y)), kernel_matrix(self.kernel, X, Y))
        return held[2]

    def __call__(self, X: PyTree, Y: PyTree | None = None, eval_gradient: bool = False) -> Any:
        """Covariance k(X, Y), (n, m), and where asked its derivatives in log ν and log σ², (n, n, free ones)."""
        self._check()
        signal = self.scale * self._matrix(X, Y)
        covariance = signal
        if Y is None and self.noise:
            covariance = signal.copy()
            covariance[np.diag_indices_from(covariance)] += self.noise
        if not eval_gradient:
            return covariance
        if Y is not None:
            raise InputError(
                "`GaussianProcessKernel` was asked for a gradient between two sets of samples",
                "The likelihood needs that of k(X, X) alone",
                "Write `covariance(X, eval_gradient=True)`",
            )
        derivatives = {"noise": lambda: self.noise * np.eye(len(signal)), "scale": lambda: signal}
        # In the order of scikit-learn's theta, which is that of the names.
        free = [derivatives[each.name]() for each in self.hyperparameters if not each.fixed]
        return covariance, np.stack(free, axis=2) if free else np.empty((*signal.shape, 0))

    def diag(self, X: PyTree) -> np.ndarray:
        """Variances σ² K(x, x) + ν, (n,)."""
        self._check()
        return self.scale * kernel_diagonal(self.kernel, X) + self.noise

    def _check(self) -> None:
        for name, value, least in (("scale", self.scale, "positive"), ("noise", self.noise, "not negative")):
            if not is_number(value) or value < 0 or (value == 0 and least == "positive"):
                raise InputError(
                    f"`GaussianProcessKernel({name}={value!r})` was given",
                    f"`{name}` is a number that is {least}: a variance",
                    "Write for example `GaussianProcessKernel(kernel, scale=1.0, noise=0.1)`",
                )
        for name, bounds in (("scale_bounds", self.scale_bounds), ("noise_bounds", self.noise_bounds)):
            if isinstance(bounds, str) and bounds == "fixed":
                continue
            pair = np.ravel(np.asarray(bounds))
            if pair.dtype.kind not in "iuf" or len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise InputError(
                    f"`GaussianProcessKernel({name}={bounds!r})` was given",
                    'Bounds are two positive numbers, the lower first, or `"fixed"`',
                    f"Write for example `{name}=(1e-5, 1e5)`",
                )

    def __repr__(self) -> str:
        noise = f", noise={self.noise:.3g}" if self.noise else ""
        return f"{type(self).__name__}({type(self.kernel).__name__}, scale={self.scale:.3g}{noise})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_held"}

    def is_stationary(self) -> bool:
        """False: it depends on where in input space two samples lie."""
        return False

    def clone_with_theta(self, theta: np.ndarray) -> GaussianProcessKernel:
        """Other values of log ν and log σ², the same kernel object and the same matrices in hand."""
        other = type(self)(**self.get_params(deep=False))
        other.theta = theta
        if hasattr(self, "_held"):
            other._held = self._held
        return other
