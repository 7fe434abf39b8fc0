"""`KernelMachine`: the trained network itself, as an exact kernel machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from pathkernel._typing import PyTree
from pathkernel.gradients.forward_derivatives import load_transformations
from pathkernel.gradients.gradient_source import check_engine
from pathkernel.gradients.pytrees import blocks, count, memory_bytes
from pathkernel.kernel_machine.accumulator import Accumulator, attributions_of, concatenate
from pathkernel.kernel_machine.added_samples import add_samples
from pathkernel.kernel_machine.arithmetic import asked_type, unrounded_type
from pathkernel.kernel_machine.attributions import Attributions, warn_of_doubts, warn_of_split_error
from pathkernel.kernel_machine.averaging_error import AveragingError, Noted, shares_error
from pathkernel.kernel_machine.backward_sweep import backward_sweep
from pathkernel.kernel_machine.classification import is_classifier, predictions, probabilities
from pathkernel.kernel_machine.completeness import check_end, check_unexplained
from pathkernel.kernel_machine.curves import Curve, check_average, curve_to
from pathkernel.kernel_machine.description import described
from pathkernel.kernel_machine.explanation_identity import Asked, explanation_identity
from pathkernel.kernel_machine.forms import BUILDERS, FORMS, check_form, check_kept
from pathkernel.kernel_machine.forward_plan import plan_forward
from pathkernel.kernel_machine.forward_sweep import forward_sweep
from pathkernel.kernel_machine.kept_displacements import KeptDisplacements
from pathkernel.kernel_machine.kept_explanation import kept_explanation
from pathkernel.kernel_machine.kept_plans import KeptPlans
from pathkernel.kernel_machine.memory_plan import plan_backward
from pathkernel.kernel_machine.queries import Queries
from pathkernel.kernel_machine.query_selection import QuerySelection
from pathkernel.kernel_machine.self_shares import at_once, check_own, own_shares
from pathkernel.kernel_machine.sweep_plan import Plan
from pathkernel.kernel_machine.sweeps_in_step import sweep_in_step
from pathkernel.quadrature import Adaptive, Quadrature, as_quadrature
from pathkernel.runtime.pickling import check_picklable
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.runtime.workspace import FreedMemory
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.required import required_path
from pathkernel.trajectory.split_certificate import EngineReplaced
from pathkernel.trajectory.trajectory import Trajectory

T = TypeVar("T")

MADE = ("function", "_gradients", "_plans", "_selection", "_kept")
"""Attributes that a machine makes of the others, and does not save."""

SHORT = 1e-10
"""Part of the change of an output below which a tolerance that was not met is rounding inside the network."""

MATRICES = 8
"""Averages of the gradients of all queries, (Q, P), that are compared at once to find the error of one."""


class KernelMachine:
    r"""The exact equivalent of a trained network, sample by sample.

    .. math:: f(x; \theta_S) = f(x; \theta_0) + \sum_{i=1}^N \mathrm{share}_i(x) + \sum_{\text{channels}}
              \mathrm{channel}(x),\qquad
              \mathrm{share}_i(x) = \sum_{r : i \in B_r} c_{r,i}\, \langle u_r(x), \nabla_\theta \ell_i(\theta_r)\rangle

    where u_r(x) is the query's gradient, averaged over every later step and pulled back through the optimizer's
    adjoint. No limit is taken: it holds for the finite steps, mini-batches and optimizer that were recorded.

    Parameters
    ----------
    trajectory
        The recorded path, every step of it.
    quadrature
        How query gradients are averaged over a step: ``"auto"`` (the discrete gradient: the sum is exact for every
        network with one gradient a step), ``GaussLegendre(4)`` for smooth networks, ``Adaptive(1e-9)`` for networks
        with kinks, or any other of `pathkernel.quadrature`.
    form
        How the sum is written: ``"folded"`` (default), ``"average"``, ``"ensemble"``, ``"constant"``, ``"chord"``; see
        `pathkernel.kernel_machine.forms`. All are exact; the certificate and the shares come with each.
    average
        Name of a recorded average (EMA, SWA): explains the averaged network. ``weights=`` is its older name.
    at
        After how many optimizer steps: explains the network as it was then, the checkpoint that was kept, whatever the
        model holds now; see `Trajectory.until`. None (default) is the end of the record, with what was changed after
        the last step.
    unexplained
        Largest part of the change of the outputs that may come from unnamed changes before it is an error.
    engine
        How gradients are taken: ``"auto"`` or ``"layerwise"`` (from activations and back-propagated signals; parameters
        that these do not account for as rows), ``"jacobian"`` (all as rows by `torch.func`, plain and slow), or
        ``"autograd"`` (one sample after the other, slower still). Rows are checked against the batch as it ran, and
        where they are not its samples', those of the next of these engines are taken; the result names them.
    memory
        Budget for all that is held beside the trajectory, the inputs and the result, as bytes or text. Queries are
        taken in blocks, and batches in passes, that fit it (`pathkernel.kernel_machine.memory_plan`); a budget too
        small for the least of them is refused, with one that is not.
    dtype
        Floating type of gradients, by default the recorded one, and float64 for a network that enters autocast in its
        own ``forward``, which rounds nothing then. Sums are float64.
    progress
        Show a progress bar over the steps.
    keep
        Whether the first prediction keeps the displacements that samples and channels made, (S, P) float64, where that
        takes at most a quarter of ``memory``: later ones train no step once more, and say the same to the last bit.

    Notes
    -----
    The shares are not a kernel in the sense of scikit-learn (they are not symmetric in query and training sample);
    for an SVM use `PathKernel`.

    `predict` and `decision_function` add up all samples and channels before contracting with the query's gradient,
    which linearity allows: a step costs its training once more, and a forward pass or two of the queries. `explain`
    computes every share.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(32, 4), torch.randint(2, (32,))
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> optimizer, loss = torch.optim.Adam(model.parameters()), torch.nn.CrossEntropyLoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for x, target in recorder.batches(batch_size=8):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> machine = pk.KernelMachine(recorder.trajectory)
    >>> bool((machine.predict(X) == model(X).argmax(1).numpy()).all())
    True
    >>> why = machine.explain(X[:3])
    >>> bool(abs(why.shares.sum(1) + sum(why.channels.values()) - why.output).max() < 1e-5)
    True

    References
    ----------
    Domingos 2020 (2012.00152), Theorem 1, without its limit; Bell et al. 2023 (2308.00824); Gonzalez 1996 for the
    discrete gradient.
    """

    keep: bool = False  # where a pickle of an earlier version does not say
    _largest_gradient: float = 0.0
    """Norm of the largest gradient before this path, which is then part of a run; see `RecordedGradients`."""

    def __init__(
        self,
        trajectory: Trajectory,
        *,
        quadrature: str | Quadrature = "auto",
        form: str = "folded",
        average: str | None = None,
        at: int | None = None,
        unexplained: float = 0.01,
        engine: str = "auto",
        memory: int | str = "1GB",
        dtype: torch.dtype | None = None,
        progress: bool = False,
        weights: str | None = None,
        keep: bool = False,
    ) -> None:
        trajectory = required_path(trajectory, "KernelMachine", at)
        average = weights if average is None else average
        self.trajectory = trajectory
        self.quadrature = as_quadrature(quadrature)
        self.memory = memory_bytes(memory)
        self.progress = progress
        self.form = check_form(form)
        self.average = average
        self.unexplained = unexplained
        self.engine = check_engine(engine)
        self.keep = keep
        check_average(average, trajectory, form)
        self._dtype = asked_type(dtype, self.quadrature, self.trajectory)
        self._make()

    def _make(self) -> None:
        """Make the attributes that are not saved."""
        load_transformations()  # is not a call's, whose memory has a budget
        self.function = self.trajectory.function(self._dtype or unrounded_type(self.trajectory))
        self._gradients: RecordedGradients | None = None
        self._plans = KeptPlans()
        self._kept = KeptDisplacements(self.memory // 4) if self.keep else None
        self._selection = QuerySelection(self.trajectory, self.function, self.average, self.engine, self.memory)

    def __getstate__(self) -> dict[str, Any]:
        check_picklable(quadrature=self.quadrature)
        return {name: value for name, value in vars(self).items() if name not in MADE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make()

    # -- what the network says -------------------------------------------------------------------------------

    def decision_function(self, X: PyTree) -> np.ndarray:
        """The network's outputs, reconstructed.

        Parameters
        ----------
        X
            n samples.

        Returns
        -------
        numpy.ndarray
            float64 (n, C), or (n,) for a network with one output.

        Raises
        ------
        TrajectoryError
            Where the sum over samples and channels is not, to rounding, what the network at the end of the record
            returns; and where too much of it is unexplained.
        """
        outputs = self._reconstruct(X)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def __call__(self, X: PyTree) -> np.ndarray:
        """The network's outputs, reconstructed: `decision_function`."""
        return self.decision_function(X)

    def predict(self, X: PyTree) -> np.ndarray:
        """Class indices (n,) for classifiers; outputs (n,) or (n, C) for regressors."""
        return predictions(self.trajectory, self.decision_function(X))

    def predict_proba(self, X: PyTree) -> np.ndarray:
        """Class probabilities (n, C) under the loss that the network was trained with.

        Raises
        ------
        InputError
            For losses that define no probabilities.
        """
        loss = self.trajectory.objective.function("`predict_proba`")
        outputs = torch.from_numpy(self._reconstruct(X))
        return probabilities(loss, outputs).numpy()

    @property
    def is_classifier(self) -> bool:
        """True where the training targets are classes."""
        return is_classifier(self.trajectory)

    @property
    def lock(self) -> Any:
        """Held by one thread at a time."""
        return self.trajectory.lock

    @one_at_a_time
    def _reconstruct(self, X: PyTree) -> np.ndarray:
        with FreedMemory(self.memory):
            curve = self._curve(self._selection.every_output(X))
            accumulator = self._settled(lambda: self._forward(curve))
            output = curve.final.cpu()
            check_unexplained(accumulator, output, self._recorded, self.unexplained)
            check_end(accumulator, curve, output, self._recorded.discrepancies)
        return sum(accumulator.channels.values(), torch.zeros(())).reshape(-1, curve.queries.components).numpy()

    # -- why it says so ---------------------------------------------------------------------------------------

    @one_at_a_time
    def explain(
        self,
        X: PyTree,
        outputs: Any = None,
        by: str | None = None,
        store: str | os.PathLike[str] | None = None,
        verify: str | None = None,
    ) -> Attributions:
        """Shares: by how much each training sample moved each query output.

        Parameters
        ----------
        X
            n samples; pairs ``(X, y)`` for ``outputs="loss"`` and ``outputs="margin"``.
        outputs
            Which output of each: None for the predicted class of a classifier (and for every output of a
            regressor, sample by sample), an index for all samples, (n,) indices, ``"all"``, ``"loss"``, ``"margin"``
            (log p/(1 − p) of the label), or a callable of one sample's outputs (C,) that returns a scalar. A module's
            name explains every unit of its output in place of the network's; ``(name, unit)`` or ``(name, callable)``
            one function of them.
        by
            ``"module"`` splits the shares by module as well, ``"step"`` adds each step's total.
        store
            A folder in which finished blocks of queries are kept: the same call goes on from there after an
            interruption, and another question is refused, by what ``outputs`` does. For the forms folded and chord.
        verify
            ``"shares"`` measures the error of the shares of each query by laying the quadrature on ever more pieces
            of the steps, for ``why.shares_error``. It takes 6 to some 50 gradients of each step that is checked (for
            quadratures of one node): all steps of a run of up to 64, then about 64 for each query.

        Returns
        -------
        Attributions
            Shares (Q, N), channels, and the certificate.

        Warns
        -----
        CertificateWarning
            Where the residual is 1e-3 or more, where the median quadrature error exceeds 0.3, where `Adaptive` had to
            stop above its tolerance, and where the split error is more than rounding.
        """
        why, short = self._explained(X, outputs, by, store, verify)
        warn_of_doubts(why, short, self._recorded.certificate.limit, stacklevel=4)  # past `one_at_a_time`
        return why

    def _explained(
        self,
        X: PyTree,
        outputs: Any = None,
        by: str | None = None,
        store: str | os.PathLike[str] | None = None,
        verify: str | None = None,
    ) -> tuple[Attributions, np.ndarray]:
        """The explanation, and for each query whether its quadrature had to stop above its tolerance, (Q,)."""
        asked = Asked.of(by, verify)
        with FreedMemory(self.memory):
            queries, samples, indices = self._selection.select(X, outputs)
            curve = self._curve(queries)
            accumulator = self._settled(
                lambda: self._backward(curve, asked) if store is None else self._stored(store, curve, asked)
            )
            output = curve.final.cpu()
            check_unexplained(accumulator, output, self._recorded, self.unexplained)
        recorded = self._recorded
        engines, sources = recorded.certificate.engines, recorded.columns.slices
        why = attributions_of(accumulator, output, (samples, indices), len(self.trajectory), engines, sources)
        tolerance = self.quadrature.tolerance if isinstance(self.quadrature, Adaptive) else 0.0
        moved = torch.from_numpy(why._moved)
        return why, (accumulator.short > max(tolerance, SHORT) * moved).numpy()

    add_samples = add_samples

    @one_at_a_time
    def self_shares(self, outputs: str = "loss") -> np.ndarray:
        """Shares of the training samples in their own losses: the diagonal of N × N shares that are never formed.

        A sample that lowered its own loss far more than others do was learnt by heart.

        Parameters
        ----------
        outputs
            ``"loss"`` (default), or ``"margin"``: how much each sample raised the margin of its own label.

        Returns
        -------
        numpy.ndarray
            (N,) float64: what ``explain((X_train, y_train), outputs=outputs)`` has on its diagonal.

        Raises
        ------
        InputError
            Where training samples are known from the batches on record alone, and for other ``outputs``.

        Notes
        -----
        Memory O(N) beside a block of queries. Time of an optimizer without memory: some four passes of each batch; with
        memory (momentum, Adam), where a sample goes on moving its own loss long after its batch: the gradients of all N
        samples at every step, S N. `pathkernel.label_quality` estimates it from a few points of the path.
        """
        check_own(outputs)
        with FreedMemory(self.memory):
            queries, _, _ = self._selection.select(self.trajectory.data.everything(), outputs)
            curve, recorded = self._curve(queries), self._recorded
            plan = self._plan(at_once(curve, recorded), Asked("module"))  # which takes rows of samples, too
            own = self._settled(lambda: own_shares(curve, recorded, plan, self.progress))
        warn_of_split_error(recorded.certificate.error, recorded.certificate.limit, stacklevel=4)  # past the lock
        return own.numpy()

    def _settled(self, compute: Callable[[], T]) -> T:
        """An accumulator all of whose rows were formed in a way that was not found wrong at any batch."""
        while True:
            try:
                found = compute()
            except EngineReplaced:  # at most once: rows of whole batches come next, and nothing after them
                continue
            for source in (self._recorded.batches.source, *self._selection.sources.values()):
                source.warn()
            return found

    # -- the sweeps, in blocks of queries ---------------------------------------------------------------------

    @property
    def _recorded(self) -> RecordedGradients:
        if self._gradients is None or self._gradients.discrepancies.length != len(self.trajectory):
            self._gradients = RecordedGradients(
                self.trajectory, self.function, self.memory // 4, self.engine, largest_gradient=self._largest_gradient
            )
        return self._gradients

    def _curve(self, queries: Queries) -> Curve:
        return curve_to(self.trajectory, queries, self.quadrature, self.average, self.form)

    def _forward(self, curve: Curve) -> Accumulator:
        queries, recorded = curve.queries, self._recorded
        memory = self.memory if self._kept is None else self.memory - self._kept.memory
        queries.forward, passes = self._plans.of(
            ("forward",), queries, recorded, lambda: plan_forward(queries, recorded, self.quadrature, memory)
        )
        return forward_sweep(curve, recorded, self.progress, passes, self._kept)

    def _backward(self, curve: Curve, asked: Asked) -> Accumulator:
        plan = self._plan(curve, asked)  # blocks of queries that fit the budget
        pieces = map(curve.block, blocks(count(curve.queries.inputs), plan.queries))
        return concatenate((self._swept(piece, asked, plan) for piece in pieces), len(curve.queries))

    def _plan(self, curve: Curve, asked: Asked) -> Plan:
        dense, matrices, recorded = self.form in BUILDERS, MATRICES * asked.verify, self._recorded
        return self._plans.of(
            ("backward", asked.by, asked.verify),
            curve.queries,
            recorded,
            lambda: plan_backward(curve, recorded, self.memory, asked.by, dense, matrices),
        )

    def _stored(self, store: str | os.PathLike[str], curve: Curve, asked: Asked) -> Accumulator:
        """The same, block by block in a store."""
        check_kept(self.form)
        identity = explanation_identity(curve, self.quadrature, self.form, self.engine, self.average, asked)
        columns = len(self._recorded.columns)
        return kept_explanation(store, identity, curve, columns, lambda block: self._backward(block, asked))

    def _swept(self, curve: Curve, asked: Asked, plan: Plan) -> Accumulator:
        curve.queries.passes = plan.passes
        builder = BUILDERS[self.form](len(self._recorded.columns)) if self.form in BUILDERS else None
        noted = Noted(curve.quadrature)
        if asked.verify:
            curve.quadrature = noted
        sweep = partial(backward_sweep, builder=builder) if plan.cuts.part is None else sweep_in_step
        accumulator = sweep(curve, self._recorded, by=asked.by, progress=self.progress, cuts=plan.cuts)
        accumulator.form = None if builder is None else builder.finish()
        certificate = self._recorded.certificate
        accumulator.split_error = torch.full_like(accumulator.quadrature_error, certificate.error)
        accumulator.samples_checked = torch.full_like(accumulator.quadrature_error, certificate.samples_checked)
        if asked.verify:
            curve.quadrature = AveragingError(noted)
            errors = backward_sweep(curve, self._recorded, progress=self.progress, cuts=plan.cuts)
            accumulator.shares_error = shares_error(errors, accumulator, self.function.dtype)
        return accumulator

    @one_at_a_time
    def describe(self) -> str:
        """Description of the sum, and of how gradients are taken: which parameters no layer accounts for, and why."""
        return f"{self!r}\n{described(self.trajectory, self.function, self.engine)}"

    def __repr__(self) -> str:
        average = "" if self.average is None else f", average={self.average!r}"
        return (
            f"KernelMachine({self.trajectory!r}, quadrature={self.quadrature!r}, form={self.form!r}{average}: exact "
            f"for every recorded step; {FORMS[self.form]}; not symmetric, so not a kernel for scikit-learn)"
        )
