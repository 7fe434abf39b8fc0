"""The result of an explanation: how much every training sample moved every query output, and the certificate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pathkernel.errors import CertificateWarning, InputError, is_whole
from pathkernel.kernel_machine.forms import Form
from pathkernel.runtime.extras import require_extra

if TYPE_CHECKING:
    import pandas

DOUBTFUL = 0.3
"""Median quadrature error beyond which a user is warned."""

INCOMPLETE = 1e-3
"""Residual, over all queries together, from which on a user is warned."""

NOISE = 1e-5
"""Part of the outputs below which what is left over is rounding, however little they moved."""


@dataclass(frozen=True)
class Ranking:
    """The samples that raised each query output most, and those that lowered it most.

    Attributes
    ----------
    proponents, opponents
        Sample ids, (Q, k), the strongest first.
    proponent_shares, opponent_shares
        Their shares, (Q, k): positive ones raise the output.
    """

    proponents: np.ndarray
    proponent_shares: np.ndarray
    opponents: np.ndarray
    opponent_shares: np.ndarray

    @classmethod
    def of(cls, shares: np.ndarray, k: int) -> Ranking:
        """Rank samples by their shares, (Q, N): k on either side.

        Raises
        ------
        InputError
            For other numbers than 1 … N.
        """
        n = shares.shape[1]
        if not (is_whole(k) and 1 <= k <= n):
            raise InputError(
                f"`top({k!r})` was asked of {n} training samples",
                f"k lies between 1 and {n}",
                f"Write `top({min(5, n)})`",
            )
        order = np.argsort(shares, axis=1, kind="stable")
        # Copies: torch refuses views with negative strides as indices.
        opponents, proponents = order[:, :k].copy(), order[:, ::-1][:, :k].copy()
        return cls(
            proponents,
            np.take_along_axis(shares, proponents, axis=1),
            opponents,
            np.take_along_axis(shares, opponents, axis=1),
        )

    def __repr__(self) -> str:
        def line(ids: np.ndarray, shares: np.ndarray) -> str:
            return ", ".join(f"{i} ({s:+.3g})" for i, s in zip(ids, shares, strict=True))

        rows = []
        for q in range(len(self.proponents)):
            rows.append(f"query {q}")
            rows.append(f"  raised by  {line(self.proponents[q], self.proponent_shares[q])}")
            rows.append(f"  lowered by {line(self.opponents[q], self.opponent_shares[q])}")
        return "\n".join(rows)


@dataclass(frozen=True)
class Attributions:
    r"""How a trained network's outputs came about, sample by sample.

    .. math:: f(x_q; \theta_S) = \sum_{i=1}^N \mathrm{share}_{qi} + \sum_{\text{channels}} \mathrm{channel}_q

    up to ``residual``. A positive share raised the output. A share says how much a sample *moved* the output in this
    training run, not what would have happened without the sample.

    Attributes
    ----------
    shares
        (Q, N) float64, columns in the order of sample ids; behind them those of ``sources``.
    channels
        What is not a training sample, by name, (Q,) each: ``"initial"`` (the untrained network),
        ``"rounding"`` (what recomputed gradients differ by from those that the optimizer received, within their
        rounding), and, where they occur, ``"weight_decay"``, ``"buffers"`` (running statistics), ``"memory"``
        (momentum from before the recording), regularisers, named changes, and ``"unexplained"`` (changes of the weights
        and of the optimizer's memory without a name, see `pathkernel.trajectory.discrepancies`).
    output
        (Q,) the network's own outputs at the end of the trajectory.
    query_index, output_index
        (Q,) which of the given samples, and which of its outputs, each query is (-1 where a functional was asked).
    quadrature_error
        (Q,) the error along the steps: the sum over steps of what the uncorrected quadrature missed of the change of
        f, in absolute value, relative to ``abs(f(θ_S) − f(θ_0))``. It costs nothing, since that change is known. It
        is no error bar of single shares: those are products with the gradients of samples, which point in other
        directions than the step does, and the averaged gradient may be wrong in these where it is right along the step.
    shares_error
        (Q,) the error bar of the shares, where ``verify="shares"`` was asked, else None: an estimate from above of
        Σ_i abs(share_i − exact share_i), relative to ``abs(f(θ_S) − f(θ_0))`` as well, and so of what any single
        share is off by. Exact is the integral of the query's gradient over each step. The bar is twice the error that
        ever finer quadratures find, and more where those disagree or do not meet the change of f either.
    modules
        Shares by module name, (Q, N) each, where ``by="module"`` was asked.
    steps
        (Q, S) shares summed over the samples of each step, where ``by="step"`` was asked.
    gradients_per_step
        Query gradients taken per step and query.
    split_error
        How well the gradients of the training samples belong to them: rows of some batches against forward passes of
        the batches as they ran, see `pathkernel.trajectory.split_certificate.SplitCertificate`. At rounding where they
        do, of the order of 1 where a network's samples get each other's; NaN where it could not be measured.
    samples_checked
        In what part of the steps a wrong training sample would have been noticed, by comparing the recorded gradient
        with that of its samples: 1 but where clipping leaves too little to compare, as clipping by value below every
        entry leaves signs alone, and a single parameter its sign; and where samples came by a backward pass in a
        channel alone, which takes what they do not explain. NaN where gradients are not on record for comparison
        (optimizers that take several in one step).
    engine
        How the gradients of the training samples were formed: ``"layerwise"``, ``"jacobian"``, ``"autograd"``.
    sources
        Columns of samples that are not of the training data, by the name of their source: slices of the second axis of
        ``shares``; see `pathkernel.KernelRecorder.source`.
    form
        The same sum in the form that the machine was asked for: `pathkernel.kernel_machine.forms.AverageForm`,
        `ConstantForm` or `EnsembleForm`; None for ``"folded"`` and ``"chord"``.
    """

    shares: np.ndarray
    channels: dict[str, np.ndarray]
    output: np.ndarray
    query_index: np.ndarray
    output_index: np.ndarray
    quadrature_error: np.ndarray
    shares_error: np.ndarray | None = None
    gradients_per_step: float = 0.0
    modules: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    steps: np.ndarray | None = field(default=None, repr=False)
    form: Form | None = field(default=None, repr=False)
    split_error: float = float("nan")
    samples_checked: float = float("nan")
    engine: str = ""
    sources: dict[str, slice] = field(default_factory=dict)

    @property
    def samples(self) -> np.ndarray:
        """Older name of `query_index`."""
        return self.query_index

    @property
    def outputs(self) -> np.ndarray:
        """Older name of `output_index`."""
        return self.output_index

    @property
    def initial(self) -> np.ndarray:
        """(Q,) the untrained network's outputs."""
        return self.channels["initial"]

    @cached_property
    def reconstruction(self) -> np.ndarray:
        """(Q,) Σ shares + Σ channels: what the kernel machine says."""
        return np.asarray(self.shares.sum(axis=1) + sum(self.channels.values()))

    @property
    def left_over(self) -> np.ndarray:
        """(Q,) output − reconstruction, in the units of the output."""
        return self.output - self.reconstruction

    @property
    def residual(self) -> np.ndarray:
        """(Q,) size of what is left over, relative to ``abs(f(θ_S) − f(θ_0))``."""
        return np.abs(self.left_over) / self._moved

    @property
    def relative_residual(self) -> float:
        """‖left over‖ / ‖f_S − f_0‖ over all queries: one number for a whole test set."""
        moved = np.linalg.norm(self.output - self.initial)
        return float(np.linalg.norm(self.left_over) / max(moved, np.finfo(float).tiny))

    @property
    def _moved(self) -> np.ndarray:
        return np.maximum(np.abs(self.output - self.initial), np.finfo(float).tiny)

    def top(self, k: int = 5) -> Ranking:
        """Rank the training samples of every query.

        Parameters
        ----------
        k
            How many on either side, at most N.

        Returns
        -------
        Ranking
            Proponents (raised the output) and opponents (lowered it).
        """
        return Ranking.of(self.shares, k)

    def by_class(self, y: np.ndarray) -> dict[object, np.ndarray]:
        """Sum the shares over the training samples of each class: ``{label: (Q,)}``."""
        y, n = np.asarray(y), min([where.start for where in self.sources.values()], default=self.shares.shape[1])
        if y.shape != (n,):
            raise InputError(
                f"Labels of shape {y.shape} were given",
                f"One label for each of the {n} training samples is needed, in id order",
                "Write `why.by_class(y_train)`",
            )
        return {label: self.shares[:, :n][:, y == label].sum(axis=1) for label in np.unique(y)}

    def to_frame(self) -> pandas.DataFrame:
        """One row for each query and training sample: ``query, sample, output, training_sample, share``.

        Where there are ``sources``, also ``source``, and ``training_sample`` is counted within it.

        Where ``verify="shares"`` was asked, also ``share_error``: what the query's shares may be off by in sum, and
        each of them at most, in the units of the output.
        """
        require_extra("pandas", "`to_frame`", "pandas")
        import pandas

        q, n = self.shares.shape
        columns = {
            "query": np.repeat(np.arange(q), n),
            "sample": np.repeat(self.query_index, n),
            "output": np.repeat(self.output_index, n),
            "training_sample": np.tile(np.arange(n), q),
            "share": self.shares.ravel(),
        }
        if self.sources:
            names, ids = np.full(n, "", dtype=object), np.arange(n)
            for name, where in self.sources.items():
                names[where], ids[where] = name, ids[where] - where.start
            columns |= {"training_sample": np.tile(ids, q), "source": np.tile(names, q)}
        if self.shares_error is not None:
            columns["share_error"] = np.repeat(self.shares_error * self._moved, n)
        return pandas.DataFrame(columns)

    def __repr__(self) -> str:
        q, n = self.shares.shape
        errors = f"quadrature error {np.median(self.quadrature_error):.1e}"
        if self.shares_error is not None:
            errors += f", shares error {np.median(self.shares_error):.1e}"
        told = np.isnan(self.samples_checked) or self.samples_checked == 1
        checked = "" if told else f", samples checked in {self.samples_checked:.0%} of the steps"
        others = "".join(f", {where.stop - where.start} {name}" for name, where in self.sources.items())
        n -= sum(where.stop - where.start for where in self.sources.values())
        return (
            f"Attributions({q} queries × {n} training samples{others}, channels: {', '.join(self.channels)}; "
            f"residual {self.relative_residual:.1e}, {errors} (median), "
            f"split error {'not checked' if np.isnan(self.split_error) else format(self.split_error, '.1e')}{checked})"
        )


def warn_of_split_error(error: float, limit: float, stacklevel: int = 3) -> None:
    """Warn where rows of gradients are not, to rounding, those of their samples.

    Parameters
    ----------
    error
        As measured; NaN where it could not be.
    limit
        Up to which it is rounding.
    stacklevel
        Of the user's line, as `warnings.warn` counts.
    """
    if error > limit:
        warnings.warn(
            CertificateWarning(
                f"The split error is {error:.1e}: rows of gradients and the batch run forward differ by more "
                f"than rounding ({limit:.0e})",
                "Every row belongs to its sample where they agree. A gradient that is not the derivative of what "
                "`forward` computes, or ill-conditioned arithmetic, makes them differ",
                "Compare with `KernelMachine(..., dtype=torch.float64)`",
            ),
            stacklevel=stacklevel,
        )


def warn_of_doubts(why: Attributions, short: np.ndarray, limit: float, stacklevel: int = 3) -> None:
    """Warn of what the certificate says against trusting the split; to be called by what the user calls.

    Parameters
    ----------
    why
        An explanation.
    short
        (Q,) whether a quadrature with a tolerance had to stop above it.
    limit
        Split error up to which it is rounding.
    stacklevel
        Of the user's line, as `warnings.warn` counts.
    """
    warn_of_split_error(why.split_error, limit, stacklevel + 1)
    if why.samples_checked == 0:
        warnings.warn(
            CertificateWarning(
                "In no step would a wrong training sample have been noticed: clipping left too little of the gradients "
                "to compare, or all of them came in channels",
                "A recorded gradient is compared with that of its samples in direction, and in size where it was not "
                "clipped; clipping by value below every entry leaves signs alone, and a single parameter its sign; "
                "what samples do not explain of a backward pass in a channel is the channel's",
                "Check the sample ids yourself; or clip by norm, and leave the backward pass of the loss outside of "
                "the channel: `loss.backward(retain_graph=True)`",
            ),
            stacklevel=stacklevel,
        )
    left, noise = np.linalg.norm(why.left_over), NOISE * np.linalg.norm(why.output)
    if not (why.relative_residual < INCOMPLETE or left <= noise):
        warnings.warn(
            CertificateWarning(
                f"The residual is {why.relative_residual:.1e}: so much of what moved the outputs is neither in shares "
                "nor in channels",
                f"Below {INCOMPLETE:.0e} it is rounding, or what a quadrature misses. Usual causes of more are an "
                "update rule that is not the optimizer's, and steps that are long for a quadrature with fixed nodes",
                'Write `KernelMachine(..., quadrature="auto")`, which meets every step; check a rule of your own with '
                "`pathkernel.testing.check_update_rule`",
            ),
            stacklevel=stacklevel,
        )
    error = float(np.median(why.quadrature_error)) if len(why.quadrature_error) else 0.0
    if error > DOUBTFUL:
        warnings.warn(
            CertificateWarning(
                f"The median quadrature error of {len(why.quadrature_error)} explained outputs is {error:.2g}",
                f"Above {DOUBTFUL} the averaged gradients say little about how the outputs moved, and the split "
                "between samples is not to be trusted. Usual causes are an autograd gradient that is not the "
                "derivative of what `forward` computes (straight-through estimators, gradient reversal), which no "
                "quadrature mends, and steps that are long for the quadrature",
                'For long steps write `KernelMachine(..., quadrature="adaptive")`; `machine.explain(X, '
                'verify="shares").shares_error` is the error bar of the shares',
            ),
            stacklevel=stacklevel,
        )
    if short.any():
        warnings.warn(
            CertificateWarning(
                f"`Adaptive` stopped above its tolerance for {int(short.sum())} of {len(short)} explained outputs",
                "Bisection meets the change of an output wherever the gradient is its derivative: not with "
                "straight-through estimators or gradient reversal, and not across jumps of the output itself",
                "Read `why.quadrature_error` for what is left, or allow more with `Adaptive(tolerance, "
                "max_intervals=256)`",
            ),
            stacklevel=stacklevel,
        )
