r"""Datamodels: what training again without some samples would say, predicted from one recorded run.

The response of training with a kernel to the weight of a sample:

.. math:: \mathrm{score}_{qi} = \bigl[K_q (H K + \lambda I)^{-1}\bigr]_i\, r_i

with K the kernel of the training samples, K_q that of queries with them, r the slope of a sample's loss and H the
curvatures, averaged over the same points of the path as the kernel is. Without the slope a sample would have had, all
others change theirs in answer, which is what H is for; 1/λ is how long training goes on. With H = I and another λ it is
ridge regression, and by the push-through identity TRAK without its projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg

from pathkernel._typing import PyTree
from pathkernel.analysis.gram_matrix import as_kernel_matrix
from pathkernel.errors import InputError, PathKernelError, check_choice, check_number, is_positive
from pathkernel.gradients.pytrees import memory_bytes
from pathkernel.influence.linear_systems import conjugate_gradients
from pathkernel.influence.residuals import Explained, Kernel, explained
from pathkernel.kernel_machine.attributions import Ranking
from pathkernel.runtime.extras import require_extra

if TYPE_CHECKING:
    import pandas

SOLVERS = ("gram", "features", "conjugate_gradients")
"""Ways to apply (K + λI)⁻¹."""

RULES = ("training_time", "mean_diagonal", "generalized_cross_validation")
"""Rules for λ, which see the kernel and the outputs of the training samples along the recorded path alone."""

GRID = np.logspace(-4, 3, 57)
"""Multiples of the mean diagonal among which generalised cross-validation chooses: eight a decade."""

RESIDUAL = 1e-8
"""Relative residual at which conjugate gradients end."""


@dataclass(frozen=True)
class Datamodel:
    r"""Linear predictions of the outputs of networks that are trained again without some samples.

    .. math:: f_q(\text{without } G) \approx f_q - \sum_{i \in G} \mathrm{score}_{qi}

    A positive score raises the output. It says what training *again* does, with another initialisation and order, not
    what a sample did in the recorded run; that is what shares say. Sizes are not calibrated: they are of a linear
    response, and smaller than what training again does. Compare queries and groups by them.

    Attributes
    ----------
    scores
        (Q, N) float64, columns in the order of the training samples.
    output
        (Q,) what the recorded network says of the queries now.
    residuals
        (N,) r for margins; (N, C) for kernels of outputs.
    regularization
        λ that was used.
    regularizations
        λ by each rule: ``"training_time"``, ``"mean_diagonal"``, ``"generalized_cross_validation"``; None where a rule
        was out of reach.
    rule
        Which of them was used, or ``"given"``.
    solver
        How (HK + λI)⁻¹ was applied.
    """

    scores: np.ndarray
    output: np.ndarray
    residuals: np.ndarray
    regularization: float
    regularizations: dict[str, float | None]
    rule: str
    solver: str

    def without(self, ids: Any) -> np.ndarray:
        """Predicted outputs after training again without some samples.

        Parameters
        ----------
        ids
            Ids of the samples that are left out, each once; or a sequence of such groups.

        Returns
        -------
        numpy.ndarray
            (Q,), or (groups, Q) for a sequence of groups.

        Raises
        ------
        InputError
            For other ids, and for an id twice in one group.
        """
        groups = isinstance(ids, Sequence) and len(ids) > 0 and all(np.ndim(group) == 1 for group in ids)
        # Numbers and groups side by side are refused as they are.
        found = np.stack([self._without(_ids(group)) for group in (ids if groups else [ids])])
        return found if groups else found[0]

    def _without(self, ids: np.ndarray) -> np.ndarray:
        n = self.scores.shape[1]
        ids = ids.astype(np.int64) if ids.size == 0 else ids
        fits = ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer) and len(np.unique(ids)) == len(ids)
        if not fits or not ((ids >= 0) & (ids < n)).all():
            raise InputError(
                f"`without` was given {np.array2string(ids, threshold=8)}",
                f"A group is of different sample ids, integers from 0 to {n - 1}",
                "Write for example `model.without([3, 17])`, or a list of such groups",
            )
        return np.asarray(self.output - self.scores[:, ids].sum(axis=1))

    def top(self, k: int = 5) -> Ranking:
        """Rank the training samples of every query: those whose absence would lower it most, and raise it most.

        Parameters
        ----------
        k
            How many on either side, at most N.
        """
        return Ranking.of(self.scores, k)

    def to_frame(self) -> pandas.DataFrame:
        """One row for each query and training sample: ``query, training_sample, score``."""
        require_extra("pandas", "`to_frame`", "pandas")
        import pandas

        q, n = self.scores.shape
        return pandas.DataFrame(
            {
                "query": np.repeat(np.arange(q), n),
                "training_sample": np.tile(np.arange(n), q),
                "score": self.scores.ravel(),
            }
        )

    def __repr__(self) -> str:
        q, n = self.scores.shape
        rules = ", ".join(
            f"{name} {'not known' if value is None else format(value, '.3g')}"
            for name, value in self.regularizations.items()
        )
        return f"Datamodel({q} queries × {n} training samples, λ = {self.regularization:.3g} ({rules}), {self.solver})"


def datamodel(
    kernel: Kernel,
    X: PyTree,
    y: PyTree,
    X_query: PyTree,
    *,
    outputs: Any = None,
    regularization: str | float = "auto",
    solver: str = "auto",
    dim: int = 4096,
    memory: int | str = "1GB",
) -> Datamodel:
    r"""What training again without some samples would say, from a kernel of one recorded run.

    .. math:: \mathrm{score}_{qi} = \bigl[K_q (H K + \lambda I)^{-1}\bigr]_i\, r_i,\qquad
              r_i = w_i \overline{1 - p_i},\qquad H = \operatorname{diag} w_i \overline{p_i (1 - p_i)}

    with p the probability of a sample's label, w the weight of its class in the loss (of mean 1; all 1 without class
    weights) and bars for averages along the path, for margins; for outputs r is minus the slope of the loss, and H = I.

    Parameters
    ----------
    kernel
        A `PathKernel`, of outputs (``"trace"``, the default, ``"mean"`` or an index) or of margins
        (``outputs="margin"``); a `TangentKernel` for its one θ, whose scores are those of TRAK. The path kernel of some
        20 steps does: ``PathKernel(trajectory, outputs="margin", measure="uniform", steps=20)``.
    X, y
        The N training samples, and their targets as the loss takes them.
    X_query
        The Q queries: inputs for a kernel of outputs, pairs ``(X, labels)`` for one of margins, all of them in this
        call.
    outputs
        Which output of each query the scores are for, where the kernel is of several: None for the predicted class of a
        classifier (and the only output of a network with one), an index, or (Q,) indices.
    regularization
        λ, by a rule that sees no network that was trained again: ``"training_time"`` for
        :math:`\langle K r, m_S - m_0 \rangle / \lVert m_S - m_0 \rVert^2`, with which λ times what training did to the
        margins m of the training samples is K r (least squares), of kernels of margins along a path;
        ``"mean_diagonal"`` for the mean of K_ii, ``"generalized_cross_validation"`` for the multiple of it that
        predicts the residuals best, or a number, all three with H = I, as TRAK has it. ``"auto"`` (default) is the
        first that is known.
    solver
        How (HK + λI)⁻¹ is applied: ``"gram"`` by a factorisation of K, which takes N² numbers; ``"features"`` by random
        features φ with φφᵀ near K, N · ``dim``; ``"conjugate_gradients"`` by products with the kernel as an operator,
        N Q; ``"auto"`` (default) by the first of the first and the last that fits ``memory``.
    dim
        Length of the random features.
    memory
        Bytes for matrices, which the choice of a solver keeps to, as a number or text.

    Returns
    -------
    Datamodel

    Raises
    ------
    InputError
        For kernels of other functions of the outputs, whose residuals have no meaning, and what does not fit together.

    Notes
    -----
    Time beside the kernels K (N, N) and K_q (Q, N): a forward pass of the training samples at each node, O(N³) by a
    factorisation (and as much again for the eigenvalues that generalised cross-validation needs), O(N dim²) by
    features, and with conjugate gradients one product of the kernel with Q vectors for each iteration, of which there
    are some √N where λ is as large as the mean diagonal.

    Where the slopes are −r + h m, training by gradient flow in a fixed kernel answers the weight of a sample with
    :math:`K_q \varphi(HK/\lambda)\, r/\lambda`, :math:`\varphi(z) = (1 - e^{-z})/z`: ridge regression,
    :math:`1/(1 + z)`, is its well-known neighbour, with a time of training for 1/λ.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(40, 4), torch.randint(3, (40,))
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.nn.CrossEntropyLoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for epoch in range(3):
    ...         for x, target in recorder.batches(batch_size=8):
    ...             optimizer.zero_grad()
    ...             loss(model(x), target).backward()
    ...             optimizer.step()
    >>> kernel = pk.PathKernel(recorder.trajectory, outputs="margin", measure="uniform", steps=10)
    >>> model = pk.datamodel(kernel, X, y, (X[:2], y[:2]))
    >>> model.scores.shape, model.without([0, 1, 2]).shape
    ((2, 40), (2,))

    References
    ----------
    Park et al. 2023 (2303.14186), TRAK; Ilyas et al. 2022 (2202.00622) for datamodels; Ali, Kolter and Tibshirani 2019
    (1810.10082) for ridge regression and the time of training; Golub, Heath and Wahba 1979 for generalised
    cross-validation.
    """
    _check(regularization, solver, dim)
    budget = memory_bytes(memory)
    of = explained(kernel, X, y, X_query, outputs)
    n, q = of.residuals.shape[0], len(of.output)
    if solver == "auto":
        solver = "gram" if 24 * n * n <= budget else "conjugate_gradients"
    weights, chosen = _SOLVE[solver](kernel, of, regularization, dim)
    assert weights.shape == (q, n)
    return Datamodel(weights * of.of_query, of.output, of.residuals, chosen.value, chosen.by_rule, chosen.rule, solver)


def _ids(group: Any) -> np.ndarray:
    """Array of ids; of objects where rows of different lengths make none."""
    try:
        return np.asarray(group)
    except ValueError:
        return np.array(group, dtype=object)


def _check(regularization: str | float, solver: str, dim: int) -> None:
    """Refuse other rules, numbers and solvers, before anything is computed."""
    named = isinstance(regularization, str) and regularization in ("auto", *RULES)
    if not named and not is_positive(regularization):
        raise InputError(
            f"`regularization={regularization!r}` was given",
            f"It is 'auto', one of {', '.join(map(repr, RULES))}, or a number above 0",
            'Write `regularization="auto"`',
        )
    check_choice("solver", solver, ("auto", *SOLVERS), "Solvers")
    check_number("dim", dim, positive=True, whole=True, example=4096)


@dataclass(frozen=True)
class Regularization:
    """λ that is used, the rule that it is by, and what every rule says."""

    value: float
    rule: str
    by_rule: dict[str, float | None]


Found = tuple[np.ndarray, Regularization]
"""K_q (HK + λI)⁻¹, and λ."""


def _by_gram(kernel: Kernel, of: Explained, asked: str | float, _: int) -> Found:
    """Solve by a Cholesky factorisation; eigenvalues for generalised cross-validation."""
    K = as_kernel_matrix(kernel(of.samples), "kernel(X)")
    K_query = as_kernel_matrix(kernel(of.queries, of.samples), "kernel(X_query, X)")
    mean = float(K.diagonal().mean())
    values, vectors = scipy.linalg.eigh(K)
    cross_validated = _cross_validated(mean, values, vectors.T @ of.residuals, 0.0)
    chosen = _chosen(asked, mean, cross_validated, _of_training_time(of, lambda r: K @ r))
    root = _root_of_curvature(of, chosen)
    system = root[:, None] * K * root + chosen.value * np.eye(len(K))
    factor = scipy.linalg.cho_factor(system, lower=True, overwrite_a=True)
    solved = scipy.linalg.cho_solve(factor, (K_query * root).T).T
    return _response(K_query, solved, root, chosen, lambda v: v @ K), chosen


def _by_features(kernel: Kernel, of: Explained, asked: str | float, dim: int) -> Found:
    r"""Solve by features: :math:`\phi_q (\phi^\top H \phi + \lambda I)^{-1} \phi^\top`, the push-through identity."""
    phi, phi_query = (np.asarray(kernel.features(samples, dim)) for samples in (of.samples, of.queries))
    phi, phi_query = as_kernel_matrix(phi, "features(X)"), as_kernel_matrix(phi_query, "features(X_query)")
    left, singular, _ = scipy.linalg.svd(phi, full_matrices=False)
    mean, projected = float((phi**2).sum() / len(phi)), left.T @ of.residuals
    rest = float((of.residuals**2).sum() - (projected**2).sum())
    cross_validated = _cross_validated(mean, singular**2, projected, max(0.0, rest), len(phi))
    chosen = _chosen(asked, mean, cross_validated, _of_training_time(of, lambda r: phi @ (phi.T @ r)))
    root = _root_of_curvature(of, chosen)
    _, singular, right = scipy.linalg.svd(root[:, None] * phi, full_matrices=False)
    # (A + λI)⁻¹ by the singular vectors of √H φ = U S Vᵀ, which leave out directions that it divides by λ alone.
    kept = singular**2 / (singular**2 + chosen.value)
    return (phi_query - (phi_query @ right.T * kept) @ right) @ phi.T / chosen.value, chosen


def _by_conjugate_gradients(kernel: Kernel, of: Explained, asked: str | float, _: int) -> Found:
    """Solve by products with the kernel as an operator, all queries in one system."""
    if asked == "generalized_cross_validation":
        raise InputError(
            "Generalised cross-validation was asked of conjugate gradients",
            "It needs the eigenvalues of K, which products with vectors do not give",
            'Write `regularization="auto"`, a number, or `solver="features"`',
        )
    operator = kernel.operator(of.samples)
    mean = float(np.asarray(kernel.diagonal(of.samples)).mean())
    chosen = _chosen(asked, mean, None, _of_training_time(of, lambda r: operator @ r))
    root = _root_of_curvature(of, chosen)
    K_query = np.asarray(kernel(of.samples, of.queries)).T  # (Q, N)
    times = lambda v: (operator @ np.ascontiguousarray(v.T)).T  # noqa: E731

    most = 10 * K_query.shape[1]
    solved = conjugate_gradients(
        lambda v: root * times(root * v) + chosen.value * v, K_query * root, residual=RESIDUAL, most=most
    )
    if solved is None:
        condition = 1 + mean * K_query.shape[1] / chosen.value
        raise PathKernelError(
            f"Conjugate gradients did not come to a relative residual of {RESIDUAL} in {most} products",
            f"With λ = {chosen.value:.3g} the system has the condition number {condition:.3g} at most",
            "Write a larger `regularization`",
        )
    return _response(K_query, solved, root, chosen, times), chosen


_SOLVE = {"gram": _by_gram, "features": _by_features, "conjugate_gradients": _by_conjugate_gradients}


def _response(
    K_query: np.ndarray,
    solved: np.ndarray,
    root: np.ndarray,
    chosen: Regularization,
    times: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    r"""K_q (HK + λI)⁻¹ from :math:`K_q \sqrt H (\sqrt H K \sqrt H + \lambda I)^{-1}`.

    By :math:`(K_q - K_q \sqrt H (\dots)^{-1} \sqrt H K) / \lambda`, which does not divide by curvatures, that are next
    to nothing for samples learnt long ago.
    """
    return solved if chosen.rule != "training_time" else (K_query - times(solved * root)) / chosen.value


def _root_of_curvature(of: Explained, chosen: Regularization) -> np.ndarray:
    """√h of every training sample where it is part of the rule, else ones: (N,)."""
    if chosen.rule == "training_time":
        assert of.curvatures is not None
        return np.sqrt(of.curvatures)
    return np.ones(len(of.residuals))


def _of_training_time(of: Explained, times: Callable[[np.ndarray], np.ndarray]) -> float | None:
    """λ with which Kr / λ is what training did to the margins of the training samples; None where Kr points elsewhere.

    Of the two, Kr is the approximation, so it is what least squares fit: the other way round its errors shorten the
    time of training.
    """
    if of.moved is None:
        return None
    along, squares = float(times(of.residuals) @ of.moved), float(of.moved @ of.moved)
    return along / squares if along > 0 else None


def _chosen(
    asked: str | float, mean: float, cross_validated: float | None, training_time: float | None
) -> Regularization:
    """λ as asked for, and by each rule."""
    if not mean > 0:
        raise InputError(
            "The kernel is zero on all training samples",
            "Ridge regression needs a direction in which outputs can move",
            "Look for parameters that are frozen, and for a path without length",
        )
    by_rule: dict[str, float | None] = dict(zip(RULES, (training_time, mean, cross_validated), strict=True))
    if not isinstance(asked, str):
        return Regularization(float(asked), "given", by_rule)
    rule = asked if asked != "auto" else "mean_diagonal" if training_time is None else "training_time"
    value = by_rule[rule]
    if value is None:
        raise InputError(
            f"`regularization={rule!r}` was given, and no time of training is known",
            "It is how far margins moved along a path, in the direction in which the kernel moves them",
            'Pass `PathKernel(trajectory, outputs="margin", measure="uniform", steps=20)`, or write '
            '`regularization="mean_diagonal"`',
        )
    return Regularization(value, rule, by_rule)


def _cross_validated(
    mean: float, values: np.ndarray, projected: np.ndarray, rest: float, n: int | None = None
) -> float:
    r"""λ by generalised cross-validation.

    .. math:: \min_\lambda \frac{\lVert (I - H) t \rVert^2}{(n - \operatorname{tr} H)^2},\qquad
              H = K (K + \lambda I)^{-1}

    Parameters
    ----------
    mean
        Mean diagonal of K, of which λ is a multiple in `GRID`.
    values, projected
        Eigenvalues of K, (m,), and the targets along its eigenvectors, (m,) or (m, C).
    rest
        Squared length of the targets outside of these.
    n
        Number of samples, m by default: eigenvalues beyond the m-th are zero.
    """
    n = len(values) if n is None else n
    squares = projected.reshape(len(values), -1) ** 2
    best = (np.inf, mean)
    for multiple in GRID:
        left = multiple * mean / (np.maximum(values, 0.0) + multiple * mean)  # of I − H
        error = (left[:, None] ** 2 * squares).sum() + rest
        best = min(best, (error / (left.sum() + n - len(values)) ** 2, multiple * mean))
    return float(best[1])
