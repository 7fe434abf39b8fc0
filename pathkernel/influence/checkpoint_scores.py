r"""Scores of training samples from one checkpoint alone, without a recording: what recording is compared with.

Each is (Q, N), a positive one for a sample whose presence raises the query's margin, or lowers its loss; see
`pathkernel.analysis.evaluation`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import hessian, vmap
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, Parameters, PyTree
from pathkernel.errors import InputError, PathKernelError, is_number, is_positive
from pathkernel.gradients.losses import batch_products, weighted_gradient
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import OutputFunctional, random_directions, sample_gradients, slopes_of
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.influence.datamodels import datamodel
from pathkernel.influence.linear_systems import conjugate_gradients
from pathkernel.tangent_kernel.filters import ParameterFilter
from pathkernel.tangent_kernel.tangent_kernel import TangentKernel

Samples = tuple[PyTree, PyTree]
"""Inputs and targets."""

BLOCK = 1024
"""Samples that go through the network at once."""

PROBES = 8
"""Random directions by which the mean eigenvalue of the Gauss–Newton matrix is found."""

DAMPING = 0.1
"""Part of the mean eigenvalue that is added to all, as in Grosse et al. 2023 (2308.03296), section 3.1."""

RESIDUAL = 1e-4
"""Relative residual at which conjugate gradients end: far below what the scores are good for."""


def tracin_scores(
    model: nn.Module,
    loss: Loss,
    samples: tuple[PyTree, PyTree],
    queries: tuple[PyTree, PyTree],
    *,
    learning_rate: float = 1.0,
    parameters: Parameters | ParameterFilter | None = None,
    memory: int | str = "1GB",
) -> np.ndarray:
    r"""TracIn at one checkpoint: inner products of the gradients of losses.

    .. math:: \mathrm{score}_{qi} = \eta\, \langle \nabla\ell_q(\theta), \nabla\ell_i(\theta) \rangle

    Parameters
    ----------
    model
        The trained network, in eval mode here.
    loss
        ``(output, target)`` that it was trained with.
    samples, queries
        ``(X, y)`` of the N training samples, and of the Q queries.
    learning_rate
        η.
    parameters, memory
        As for `pathkernel.TangentKernel`.

    Returns
    -------
    numpy.ndarray
        (Q, N) float64: by how much a step on sample i lowers the loss of query q, to first order.

    References
    ----------
    Pruthi et al. 2020 (2002.08484), equation 1 with one checkpoint. Along the path it is
    ``PathKernel(trajectory, outputs="loss")``.
    """
    if not is_number(learning_rate):
        raise InputError(
            f"`learning_rate={learning_rate!r}` was given",
            "It is a number, by which the inner products are multiplied",
            "Leave it out for the inner products themselves",
        )
    kernel = TangentKernel(model, parameters, outputs="loss", loss=loss, memory=memory)
    _checked(kernel, samples, queries)
    return float(learning_rate) * kernel(queries, samples)


def trak_scores(
    model: nn.Module,
    samples: tuple[PyTree, PyTree],
    queries: tuple[PyTree, PyTree],
    *,
    regularization: float | None = None,
    parameters: Parameters | ParameterFilter | None = None,
    memory: int | str = "1GB",
) -> np.ndarray:
    r"""TRAK at one checkpoint, without its random projection: ridge regression on the tangent kernel of margins.

    .. math:: \mathrm{score}_{qi} = \bigl[K_q (K + \lambda I)^{-1}\bigr]_i\, (1 - p_i), \qquad
              K_{ij} = \langle \nabla m_i(\theta), \nabla m_j(\theta) \rangle,\quad m = \log\frac{p}{1 - p}

    with p the probability of a sample's own label. A projection of the gradients to fewer numbers than samples, which
    the published method has, regularises as λ does.

    Parameters
    ----------
    model
        The trained classifier, in eval mode here.
    samples, queries
        ``(X, y)`` of the N training samples, and of the Q queries; labels are class indices.
    regularization
        λ; the mean of K_ii by default, which sees no network that was trained again.
    parameters, memory
        As for `pathkernel.TangentKernel`.

    Returns
    -------
    numpy.ndarray
        (Q, N) float64; for several networks, take the mean.

    Raises
    ------
    InputError
        For a λ that is not above 0.

    Notes
    -----
    It is `pathkernel.datamodel` with the kernel at one θ in place of that along the path. Memory: N² numbers. Time: the
    kernels, and O(N³).

    References
    ----------
    Park et al. 2023 (2303.14186), section 3.
    """
    kernel = TangentKernel(model, parameters, outputs="margin", memory=memory)
    if not (isinstance(samples, (tuple, list)) and len(samples) == 2):
        raise InputError(
            f"`samples` is {type(samples).__name__}",
            "The margin of a sample needs its label",
            "Pass `samples` and `queries` as pairs `(X, labels)`",
        )
    ridge = "mean_diagonal" if regularization is None else regularization
    return datamodel(kernel, *samples, queries, regularization=ridge, memory=memory).scores


def influence_function_scores(
    model: nn.Module,
    loss: Loss,
    samples: tuple[PyTree, PyTree],
    queries: tuple[PyTree, PyTree],
    *,
    damping: float | None = None,
    parameters: Parameters | ParameterFilter | None = None,
) -> np.ndarray:
    r"""Influence functions at one checkpoint, with the Gauss–Newton matrix in place of the Hessian.

    .. math:: \mathrm{score}_{qi} = \tfrac1N\, \nabla\ell_q^\top (G + \delta I)^{-1} \nabla\ell_i, \qquad
              G = \tfrac1N \sum_i J_i^\top\, \frac{\partial^2 \ell_i}{\partial z_i^2}\, J_i

    Parameters
    ----------
    model, loss, samples, queries
        As for `tracin_scores`; the loss is a mean over samples that do not see each other.
    damping
        δ; by default a tenth of the mean eigenvalue of G, estimated from 8 random directions, the same in every call.
    parameters
        As for `pathkernel.TangentKernel`.

    Returns
    -------
    numpy.ndarray
        (Q, N) float64: by how much the presence of sample i lowers the loss of query q, to first order in its weight,
        of a network that is trained to the end.

    Raises
    ------
    InputError
        For a δ that is not above 0.
    PathKernelError
        Where conjugate gradients do not converge.

    Notes
    -----
    Systems are solved to a relative residual of 1e-4 for every query, by conjugate gradients. Time: for each iteration
    and query a forward and a reverse sweep of all samples. Memory: some five vectors of the
    size of θ for each query.

    References
    ----------
    Koh and Liang 2017 (1703.04730), equation 2; Martens 2020 (1412.1193), section 8, for the generalised Gauss–Newton
    matrix.
    """
    if damping is not None and not is_positive(damping):
        raise InputError(
            f"`damping={damping!r}` was given",
            "It is a number above 0, in the units of the loss's curvature",
            "Leave it out for a tenth of the mean eigenvalue",
        )
    kernel = TangentKernel(model, parameters, outputs="loss", loss=loss)
    (x, y), (x_query, y_query) = _checked(kernel, samples, queries)
    function, theta, of_loss = kernel.function, kernel.theta, kernel.selection.function
    matrix = GaussNewton(function, theta, x, y, of_loss)
    rows = sample_gradients(function, theta, x_query, of_loss, y_query, scalar=True)
    gradients = torch.cat([rows[name].flatten(1) for name in function.layout.names], dim=1).double()
    added = DAMPING * matrix.mean_eigenvalue() if damping is None else float(damping)
    solved = _solved(matrix, added, gradients)
    scores = [
        torch.einsum("qnc,nc->qn", batch_products(function, theta, take(x, piece), solved), matrix.slopes[piece])
        for piece in blocks(count(x), BLOCK)
    ]
    return torch.cat(scores, dim=1).div(count(x)).cpu().numpy()


def _checked(kernel: TangentKernel, samples: PyTree, queries: PyTree) -> tuple[Samples, Samples]:
    """Training samples and queries as tensors, one or more of each, with targets that the loss takes."""
    return kernel._some_samples(samples), kernel._some_samples(queries)


class GaussNewton:
    """Generalised Gauss–Newton matrix of the mean loss of samples, by its products with vectors.

    Parameters
    ----------
    function, theta
        The network, and where.
    inputs, targets
        N samples.
    of_loss
        Loss of one sample's outputs (C,) and its target.

    Attributes
    ----------
    slopes
        ∂ℓ/∂z of each sample, (N, C) float64.
    curvatures
        ∂²ℓ/∂z² of each sample, (N, C, C) float64.
    """

    def __init__(
        self, function: ModelFunction, theta: Tensor, inputs: PyTree, targets: PyTree, of_loss: OutputFunctional
    ) -> None:
        self.function, self.theta, self.inputs = function, theta, inputs
        outputs, context = function.outputs(theta, inputs), _wide(function.cast(targets))
        self.slopes = slopes_of(of_loss, outputs, context)[:, 0].double()
        self.curvatures = vmap(hessian(lambda z, own: of_loss(z, own).reshape(())))(outputs, context).double()

    def __matmul__(self, directions: Tensor) -> Tensor:
        """G v of several v, (Q, P) float64."""
        total = torch.zeros_like(directions)
        for piece in blocks(len(self.slopes), BLOCK):
            inputs = take(self.inputs, piece)
            pushed = batch_products(self.function, self.theta, inputs, directions)
            curved = torch.einsum("qnc,ncd->qnd", pushed, self.curvatures[piece])
            for q, cotangents in enumerate(curved):
                total[q] += weighted_gradient(self.function, self.theta, inputs, cotangents).double()
        return total / len(self.slopes)

    def mean_eigenvalue(self) -> float:
        """Estimate of tr G / P from random directions."""
        v = random_directions(len(self.theta), PROBES).to(self.slopes.device)
        return float(((self @ v) * v).sum() / v.square().sum())


def _wide(targets: PyTree) -> PyTree:
    """Class labels in the integer type that derivatives of losses take."""
    narrow = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return pytree.tree_map(lambda leaf: leaf.long() if leaf.dtype in narrow else leaf, targets)


def _solved(matrix: GaussNewton, damping: float, gradients: Tensor) -> Tensor:
    """(G + δI)⁻¹ g of several g, (Q, P)."""
    device = gradients.device

    def product(v: np.ndarray) -> np.ndarray:
        own = torch.from_numpy(v).to(device)
        return (matrix @ own + damping * own).cpu().numpy()

    most = 10 * min(len(matrix.slopes), gradients.shape[1])
    found = conjugate_gradients(product, gradients.cpu().numpy(), residual=RESIDUAL, most=most)
    if found is None:
        raise PathKernelError(
            f"Conjugate gradients did not come to a relative residual of {RESIDUAL} in {most} products",
            f"With `damping={damping:.3g}` the Gauss–Newton matrix is too ill-conditioned",
            "Write a larger `damping`",
        )
    return torch.from_numpy(found).to(device)
