"""`KernelMachine`: the trained network itself, as an exact kernel machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, TrajectoryError, check
from pathkernel.gradients.gradient_source import GradientSource
from pathkernel.gradients.model_function import ModelFunction, OutputFunctional, load_transformations
from pathkernel.gradients.pytrees import blocks, count, memory_bytes, take
from pathkernel.gradients.sample_wise import check_sample_wise
from pathkernel.kernel_machine.accumulator import Account, account_of, arrays_of, joined
from pathkernel.kernel_machine.attributions import Attributions, warn_of_doubts
from pathkernel.kernel_machine.averaging_error import AveragingError, Noted
from pathkernel.kernel_machine.backward_sweep import backward_sweep
from pathkernel.kernel_machine.curves import AverageCurve, ChordCurve, Curve, PathCurve
from pathkernel.kernel_machine.forms import BUILDERS
from pathkernel.kernel_machine.forward_sweep import forward_sweep
from pathkernel.kernel_machine.memory_plan import AT_ONCE, Plan, outputs_at_once, plan_backward, plan_forward
from pathkernel.kernel_machine.queries import GradientStep, Queries, one_hot_context
from pathkernel.quadrature import Adaptive, DiscreteGradient, Quadrature, as_quadrature
from pathkernel.runtime.pickling import check_picklable
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.runtime.workspace import FreedMemory, give_back_freed_memory
from pathkernel.storage import question
from pathkernel.tangent_kernel.outputs import select_outputs
from pathkernel.tangent_kernel.tangent_kernel import learn_structure, no_samples, split_samples
from pathkernel.trajectory.batch_gradients import EngineReplaced, RecordedGradients
from pathkernel.trajectory.trajectory import Trajectory

FORMS = {
    "folded": "coefficients 1, the loss derivative inside the kernel",
    "average": "coefficients averaged over the path; they depend on the query and are ill-conditioned where K is small",
    "ensemble": "one kernel machine for each step; coefficients do not depend on the query",
    "constant": "coefficients -1 and 1; needs losses whose slope keeps its sign",
    "chord": "gradients along the straight line from start to end; nodes once, not for each step",
}
"""The forms of the same exact sum, and their properties."""

ENGINES = ("auto", "layerwise", "jacobian", "autograd")

T = TypeVar("T")

MADE = ("function", "_gradients", "_plans", "_sources")
"""What a machine makes of the rest, and is not saved."""

KEPT_QUERIES = 64
"""Samples in a block of a computation that is kept in a store: what an interruption may cost."""

ROUNDING_LIMIT = 0.1
"""Part of the change of the outputs beyond which differences between recorded and recomputed gradients are no rounding.

Each step's gradient is checked by itself, but the gradients of a step may be small beside the largest of the run and
still move the outputs. A bias before BatchNorm under Adam in float32 takes a few per cent.
"""

END = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Part of the outputs by which what is added up may miss them, beside what the recorded θ were rounded by.

Values of f telescope along the path. What is left are roundings of the optimizer's own arithmetic and of inner
products: 84 roundings in float32, and in float64 what a network that amplifies them may make of as many.
"""

ROUNDED = 16.0
"""How much further than in proportion to θ itself its rounding may have moved the outputs."""

SAFETY = 2.0
"""Times the error that a finer rule finds."""

SHORT = 1e-10
"""Part of the change of an output below which a tolerance that was not met is rounding inside the network."""

MATRICES = 8
"""Averages of the gradients of all queries, (Q, P), that are compared at once to find the error of one."""

ROUNDINGS = 32
"""Roundings of all shares together that their error is not below."""


@dataclass(frozen=True)
class Asked:
    """What an explanation is to hold beside the shares."""

    by: str | None = None
    verify: bool = False


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
        Floating type of gradients, by default the recorded one. Sums are float64.
    progress
        Show a progress bar over the steps.

    Notes
    -----
    The shares are not a kernel in the sense of scikit-learn (they are not symmetric in query and training sample);
    for an SVM use `PathKernel`.

    `predict` and `decision_function` add up Σ_i share_i(x) before contracting with the query's gradient, which
    linearity allows: they cost a few forward passes a step. `explain` computes every share.

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

    def __init__(
        self,
        trajectory: Trajectory,
        *,
        quadrature: str | Quadrature = "auto",
        form: str = "folded",
        average: str | None = None,
        unexplained: float = 0.01,
        engine: str = "auto",
        memory: int | str = "1GB",
        dtype: torch.dtype | None = None,
        progress: bool = False,
        weights: str | None = None,
    ) -> None:
        trajectory.require_steps("KernelMachine")
        average = weights if average is None else average
        self.trajectory, self.quadrature = trajectory, as_quadrature(quadrature)
        self.memory, self.progress = memory_bytes(memory), progress
        self.form, self.average, self.unexplained, self.engine = form, average, unexplained, engine
        check(
            form in FORMS,
            InputError,
            f"`form={form!r}` was given",
            f"Forms are {', '.join(map(repr, FORMS))}",
            'Write `form="folded"`',
        )
        check(
            engine in ENGINES,
            InputError,
            f"`engine={engine!r}` was given",
            f"Engines are {', '.join(map(repr, ENGINES))}",
            'Write `engine="auto"`',
        )
        check(
            average is None or average in trajectory.averages,
            InputError,
            f"`average={average!r}` was given",
            f"Averages on record are {', '.join(map(repr, trajectory.averages)) or 'none'}",
            'Record them with `KernelRecorder(..., averages={"ema": averaged_model})`',
        )
        check(
            average is None or form != "chord",
            InputError,
            '`form="chord"` was asked of an averaged network',
            "The chord joins the untrained network to the last weights",
            'Leave out `form` or `average`',
        )
        needed = self.quadrature.arithmetic
        check(
            dtype is None or needed is None or dtype == needed,
            InputError,
            f"`{self.quadrature!r}` was asked to work in {dtype}",
            f"It refines below that type's rounding and needs {needed}",
            "Leave `dtype` out, or use `DiscreteGradient()`",
        )
        self._dtype = dtype or needed
        self._make()

    def _make(self) -> None:
        """What is made of the rest, and is not saved."""
        load_transformations()  # is not a call's, whose memory has a budget
        self.function = self.trajectory.function(self._dtype)
        self._gradients: RecordedGradients | None = None
        self._plans: tuple[RecordedGradients | None, dict[Any, Any]] = None, {}
        self._sources: dict[str | None, GradientSource] = {}

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

    def predict(self, X: PyTree) -> np.ndarray:
        """Class indices (n,) for classifiers; outputs (n,) or (n, C) for regressors."""
        outputs = self.decision_function(X)
        if not self.is_classifier:
            return outputs
        return outputs.argmax(axis=1) if outputs.ndim == 2 else (outputs > 0).astype(np.int64)

    def predict_proba(self, X: PyTree) -> np.ndarray:
        """Class probabilities (n, C) under the loss that the network was trained with.

        Raises
        ------
        InputError
            For losses that define no probabilities.
        """
        loss = self.trajectory.objective.function("`predict_proba`")
        outputs = torch.from_numpy(self._reconstruct(X))
        if isinstance(loss, nn.CrossEntropyLoss):
            return outputs.softmax(dim=1).numpy()
        if isinstance(loss, nn.NLLLoss):
            return outputs.exp().numpy()
        if isinstance(loss, nn.BCEWithLogitsLoss) and outputs.shape[1] == 1:
            positive = outputs.sigmoid()
            return torch.cat([1 - positive, positive], dim=1).numpy()
        raise InputError(
            f"Probabilities were asked of a network trained with {type(loss).__name__}",
            "CrossEntropyLoss, NLLLoss and BCEWithLogitsLoss with one output define them",
            "Use `decision_function(X)` and turn outputs into probabilities as your loss does",
        )

    @property
    def is_classifier(self) -> bool:
        """Whether the training targets are classes."""
        loss, task = self.trajectory.loss, self.trajectory.task
        if task is not None:
            return task == "classification"
        if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss)):
            return True
        target = torch.utils._pytree.tree_leaves(self.trajectory.data.example[1])[0]
        return not target.is_floating_point() and target.dim() == 1

    @property
    def lock(self) -> Any:
        """Held by one thread at a time."""
        return self.trajectory.lock

    @one_at_a_time
    def _reconstruct(self, X: PyTree) -> np.ndarray:
        with FreedMemory(self.memory):
            queries = self._all_outputs(self._samples(X))
            account = self._settled(lambda: self._forward(queries))
            output = self._curve(queries).final().cpu()
            self._check_unexplained(account, output)
            self._check_end(account, output)
        return sum(account.channels.values(), torch.zeros(())).reshape(-1, queries.components).numpy()

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
        """How much each training sample moved each query output.

        Parameters
        ----------
        X
            n samples; pairs ``(X, y)`` for ``outputs="loss"``.
        outputs
            Which output of each: None for the predicted class of a classifier (and for every output of a
            regressor, sample by sample), an index for all samples, (n,) indices, ``"all"``, ``"loss"``, or a
            callable of one sample's outputs (C,) that returns a scalar. A module's name explains every unit of its
            output in place of the network's; ``(name, unit)`` or ``(name, callable)`` one function of them.
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
        check(
            by in (None, "module", "step"),
            InputError,
            f"`by={by!r}` was given",
            'Shares are split by "module" or by "step"',
            'Write `machine.explain(X, by="module")`',
        )
        if verify not in (None, "shares"):
            raise InputError(
                f"`verify={verify!r}` was given",
                'What can be verified are the "shares"',
                'Write `machine.explain(X, verify="shares")`, or leave it out',
            )
        asked = Asked(by, verify is not None)
        with FreedMemory(self.memory):
            queries, samples, indices = self._queries(X, outputs)
            account = self._settled(
                lambda: self._backward(queries, asked) if store is None else self._stored(store, queries, asked)
            )
            output = self._curve(queries).final().cpu()
            self._check_unexplained(account, output)
        moved = (output - account.channels["initial"]).abs().clamp_min(torch.finfo(torch.float64).tiny)
        assert account.shares is not None
        why = Attributions(
            shares=account.shares.numpy(),
            channels={name: value.numpy() for name, value in account.channels.items()},
            output=output.numpy(),
            query_index=samples,
            output_index=indices,
            quadrature_error=(account.missed / moved).numpy(),
            shares_error=None if account.shares_error is None else (account.shares_error / moved).numpy(),
            gradients_per_step=account.evaluations / len(self.trajectory),
            modules={name: value.numpy() for name, value in account.modules.items()},
            steps=None if account.steps is None else account.steps.numpy(),
            form=account.form,
            split_error=_largest(account.split_error),
            samples_checked=_least(account.samples_checked),
            engine=", ".join(sorted(self._recorded.certificate.engines)),
        )
        tolerance = self.quadrature.tolerance if isinstance(self.quadrature, Adaptive) else 0.0
        return why, (account.short > max(tolerance, SHORT) * moved).numpy()

    def _settled(self, compute: Callable[[], Account]) -> Account:
        """An account all of whose rows were formed in a way that was not found wrong at any batch."""
        while True:
            try:
                return compute()
            except EngineReplaced:  # at most once: rows of whole batches come next, and nothing after them
                continue

    def _queries(self, X: PyTree, outputs: Any) -> tuple[Queries, np.ndarray, np.ndarray]:
        """The query functions, and which sample and output each of them is."""
        if isinstance(outputs, str) and outputs == "loss":
            objective = self.trajectory.objective
            loss = objective.function('`outputs="loss"`')
            selection = select_outputs("loss", loss, objective.reduction)
            inputs, targets = split_samples(X, selection, self.trajectory.data.dtype, "KernelMachine")
            inputs = self._samples(inputs)
            learn_structure(selection, self.function, self.trajectory.initial, inputs)
            queries = self._query(self.function, inputs, selection.function, targets, None)
            return queries, np.arange(len(queries)), np.full(len(queries), -1)
        inputs = self._samples(X)
        n = count(inputs)
        function, outputs = self._tapped(outputs)
        if callable(outputs):
            queries = self._query(function, inputs, lambda z, _: outputs(z).reshape(()), torch.zeros(n, 0), None)
            return queries, np.arange(n), np.full(n, -1)
        everything = self._all_outputs(inputs, function)
        c = everything.components
        everything_asked = isinstance(outputs, str) and outputs == "all"
        if everything_asked or (outputs is None and not self.is_classifier):
            return everything, np.repeat(np.arange(n), c), np.tile(np.arange(c), n)
        chosen = self._chosen(inputs, outputs, n, c)
        context = one_hot_context(chosen, c)
        queries = self._query(function, inputs, lambda z, weight: z @ weight.to(z), context, None)
        return queries, np.arange(n), chosen.numpy()

    def _chosen(self, inputs: PyTree, outputs: Any, n: int, c: int) -> Tensor:
        """Index of the output to explain for each sample."""
        if outputs is None:
            return self._outputs(inputs).argmax(dim=1).cpu()
        try:
            chosen = torch.as_tensor(outputs).cpu()
        except (TypeError, ValueError, RuntimeError):
            chosen = torch.zeros(())
        fits = not chosen.is_floating_point() and chosen.dtype != torch.bool and chosen.shape in ((), (n,))
        check(
            fits and bool(((chosen >= -c) & (chosen < c)).all()),
            InputError,
            f"`outputs={outputs!r}` was given for {n} samples of a network with {c} outputs",
            'It must be None, an output index, one index for each sample, "all", "loss", or a callable of the outputs',
            "Write for example `machine.explain(X, outputs=0)`",
        )
        return chosen.expand(n).remainder(c)

    def _tapped(self, outputs: Any) -> tuple[ModelFunction, Any]:
        """The network, or one of its modules in place of it, and what is asked of its output."""
        if isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[0], str):
            name, outputs = outputs
        elif isinstance(outputs, str) and outputs != "all":
            name, outputs = outputs, "all"
        else:
            return self.function, outputs
        modules = [module for module, _ in self.trajectory.model.named_modules() if module]
        check(
            name in modules,
            InputError,
            f"`outputs` names the module {name!r}",
            f"The network's modules are {', '.join(map(repr, modules[:20]))}{' …' if len(modules) > 20 else ''}",
            'Write for example `machine.explain(X, outputs=("0", 3))` for unit 3 of module "0"',
        )
        return self.function.replaced(tap=name), outputs

    def _all_outputs(self, inputs: PyTree, function: ModelFunction | None = None) -> Queries:
        function = function or self.function
        c = self._outputs(take(inputs, slice(0, 1)), function).shape[1]
        return self._query(function, inputs, lambda z, _: z, torch.zeros(count(inputs), 0), c)

    def _query(
        self, function: ModelFunction, inputs: PyTree, functional: OutputFunctional, context: PyTree, k: int | None
    ) -> Queries:
        queries = Queries(self._source(function), inputs, functional, context, k)
        at_once = outputs_at_once(function, self.trajectory.final, inputs, self.memory)
        queries.forward = at_once if at_once < AT_ONCE else None
        return queries

    def _source(self, function: ModelFunction) -> GradientSource:
        """Of the network or of one of its modules; what was proved of it is kept."""
        if function.tap not in self._sources:
            self._sources[function.tap] = GradientSource(function, self.engine, self.memory // 4)
        return self._sources[function.tap]

    def _outputs(self, inputs: PyTree, function: ModelFunction | None = None) -> Tensor:
        """The explained network's own outputs, (n, C)."""
        trajectory, function = self.trajectory, function or self.function
        if self.average is None:
            function, theta = function.replaced(constants=trajectory.final_buffers), trajectory.final
        else:
            record = trajectory.averages[self.average]
            function = function.replaced(constants=record.constants(trajectory))
            theta = trajectory.layout.flatten(record.last)
        return function.outputs(theta, inputs, outputs_at_once(function, theta, inputs, self.memory))

    def _samples(self, X: PyTree) -> PyTree:
        inputs = self.trajectory.queries(X, "KernelMachine")
        if not count(inputs):
            raise no_samples("KernelMachine")
        check_sample_wise(self.function, self.trajectory.initial, inputs)
        return inputs

    # -- the sweeps, in blocks of queries ---------------------------------------------------------------------

    @property
    def _recorded(self) -> RecordedGradients:
        if self._gradients is None or self._gradients.discrepancies.length != len(self.trajectory):
            self._gradients = RecordedGradients(self.trajectory, self.function, self.memory // 4, self.engine)
        return self._gradients

    def _curve(self, queries: Queries) -> Curve:
        if self.average is not None:
            record = self.trajectory.averages[self.average]
            return AverageCurve(self.trajectory, queries, self.quadrature, record)
        kind = ChordCurve if self.form == "chord" else PathCurve
        return kind(self.trajectory, queries, self.quadrature)

    def _forward(self, queries: Queries) -> Account:
        recorded = self._recorded
        queries.forward, passes = self._planned(
            ("forward",), queries, lambda: plan_forward(queries, recorded, self.quadrature, self.memory)
        )
        return forward_sweep(self._curve(queries), recorded, self.progress, passes)

    def _backward(self, queries: Queries, asked: Asked) -> Account:
        """Blocks of queries that fit the budget."""
        plan = self._plan(queries, asked)
        cut = blocks(count(queries.inputs), plan.queries)
        return joined((self._swept(queries.block(piece), asked, plan) for piece in cut), len(queries))

    def _plan(self, queries: Queries, asked: Asked) -> Plan:
        dense, matrices, recorded = self.form in BUILDERS, MATRICES * asked.verify, self._recorded
        return self._planned(
            ("backward", asked.by, asked.verify),
            queries,
            lambda: plan_backward(self._curve, queries, recorded, self.memory, asked.by, dense, matrices),
        )

    def _planned(self, kind: tuple[Any, ...], queries: Queries, measure: Callable[[], T]) -> T:
        """What was planned for queries of the same number and shapes, which took passes to measure; or is now."""
        recorded, leaves = self._recorded, pytree.tree_leaves(queries.inputs)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor))
        key = (*kind, queries.components, queries.function.tap, recorded.coupled, shapes)
        known, plans = self._plans
        if known is not recorded:
            plans = {}
        if key not in plans:
            plans[key] = measure()
            give_back_freed_memory()
        self._plans = recorded, plans
        return plans[key]

    def _stored(self, store: str | os.PathLike[str], queries: Queries, asked: Asked) -> Account:
        """The same, block by block in a store."""
        from pathkernel.storage import (
            resumable as computations,
        )  # not before it is needed: what writes to disk takes a second to load

        check(
            self.form not in BUILDERS,
            InputError,
            f'An explanation in the form "{self.form}" was to be kept in a store',
            "What is kept are shares, channels and the certificate, of the forms folded and chord",
            'Write `KernelMachine(trajectory, form="folded")`, or leave `store` out',
        )
        # The same blocks whatever the budget, which another call may give otherwise: it cuts them further.
        pieces = list(blocks(len(queries) // queries.components, KEPT_QUERIES))
        sizes = [(piece.stop - piece.start) * queries.components for piece in pieces]
        kept = computations.resumable_blocks(
            store,
            self._identity(queries, asked),
            sizes,
            lambda index: arrays_of(self._backward(queries.block(pieces[index]), asked)),
        )
        named = {"missed": (), "short": (), "evaluations": (), "shares": (len(self.trajectory.data),)}
        computations.check_arrays(store, kept, len(queries), named, "an explanation")
        return account_of(kept)

    def _identity(self, queries: Queries, wanted: Asked) -> dict[str, Any]:
        """Everything that an explanation depends on; not the budget, and not what is only checked afterwards."""
        trajectory, function = self.trajectory, queries.function
        aside = question.nearby(trajectory)
        points = self._points(function, aside)
        asked = question.behaviour(queries.functional, points, queries.inputs, queries.context)
        if not question.is_ours(self.quadrature):
            curve, segment = self._curve(queries.block(slice(0, 1))), next(trajectory.segments(reverse=True))
            gradient = self.quadrature.average(GradientStep(curve.queries, segment)).gradient
            directions = [torch.nn.functional.normalize(v.double(), dim=0) for v in (segment.displacement, aside)]
            average = torch.stack([gradient @ direction for direction in directions])
            asked["averages"] = question.numbers([average], question.NETWORK_ROUNDING[function.dtype])
        return question.identity_of(
            trajectory,
            machine=f"{self.form}, {self.engine}, {function.dtype}, {wanted!r}",
            quadrature=question.described(self.quadrature, "quadrature"),
            weights=question.described(self.average and trajectory.averages[self.average], "weights"),
            module=function.tap,
            components=None if queries.scalar else queries.components,
            queries=question.samples_identity((queries.inputs, queries.context)),
            **asked,
        )

    def _points(self, function: ModelFunction, aside: Tensor) -> list[tuple[ModelFunction, Tensor]]:
        """The explained network at its start, at its end, and elsewhere."""
        trajectory = self.trajectory
        if self.average is None:
            trained = function.replaced(constants=trajectory.final_buffers)
            return [(function, trajectory.initial), (trained, trajectory.final), (trained, aside)]
        record = trajectory.averages[self.average]
        averaged = function.replaced(constants=record.constants(trajectory))
        first, last = (trajectory.layout.flatten(values) for values in (record.initial, record.last))
        return [(averaged, first), (averaged, last), (averaged, aside)]

    def _check_unexplained(self, account: Account, output: Tensor) -> None:
        """Fail loudly where too much of the account has no name."""
        moved = (output - account.channels["initial"]).norm().item()
        rounding = account.channels["rounding"].norm().item() if "rounding" in account.channels else 0.0
        if rounding > max(ROUNDING_LIMIT, self.unexplained) * moved:
            raise TrajectoryError(
                f"{rounding / max(moved, 1e-300):.1%} of what moved these outputs are differences between the recorded "
                "gradients and those of the recorded samples",
                f"They are rounding, and {ROUNDING_LIMIT:.0%} is more than rounding",
                "Record with `KernelRecorder(..., audit_every=1)`, which tells at which step ids, inputs or loss "
                "are not those of the loop, or in float64",
            )
        size = account.channels["unexplained"].norm().item() if "unexplained" in account.channels else 0.0
        if size <= self.unexplained * moved:
            return
        where, write = self._most_unexplained()
        raise TrajectoryError(
            f"{size / max(moved, 1e-300):.1%} of what moved these outputs is unexplained; most of it is {where}",
            f"No more than {self.unexplained:.1%} may come from changes that no sample and no named channel stands for",
            f"{write}, or allow more with `KernelMachine(..., unexplained=1.0)`",
        )

    def _most_unexplained(self) -> tuple[str, str]:
        """The largest change without a name, and how such changes get one."""
        trajectory, layout = self.trajectory, self.trajectory.layout
        size, step, name = self._recorded.discrepancies.largest()
        where = "where the gradient is zero and the optimizer moved all the same"
        write = 'Make such changes inside `with recorder.channel("projection"):`'
        if size:
            where = (
                f"at step {step}, which moved `{name}` by {size:.2g} otherwise than {trajectory.rule.name} does with "
                "the recorded gradients"
            )
            write = (
                "Make a new KernelRecorder where the optimizer's state was edited, from which on it is the channel "
                '"memory"; check a rule of your own with `pathkernel.testing.check_update_rule`'
            )
        changes = [s for s in trajectory.segments() if s.step is None and s.channel == "unexplained"]
        if changes:
            largest = max(changes, key=lambda change: change.displacement.norm().item())
            by_name = layout.unflatten(largest.displacement)
            worst = max(by_name, key=lambda name: by_name[name].norm().item())
            if by_name[worst].norm().item() >= size:
                following = [s.step.index for s in trajectory.segments() if s.step and s.start is largest.end]
                before = f"before step {following[0]}" if following else "after the last step"
                where = f"a change of `{worst}` by {by_name[worst].norm().item():.2g} {before}"
                write = 'Make such changes inside `with recorder.channel("projection"):`'
        return where, write

    def _check_end(self, account: Account, output: Tensor) -> None:
        """Compare what was added up with the network at the end of the record."""
        trajectory = self.trajectory
        known = output.isfinite()  # a network may return −∞ for what cannot be
        found, output = sum(account.channels.values(), torch.zeros(()))[known], output[known]
        missed = account.missed[known]
        if not len(output):
            return
        types = {trajectory.precision, self.function.dtype}
        moved = (output - account.channels["initial"][known]).abs().max().item()
        # What θ was rounded by in all its steps is on record, and moved the outputs about as far, in proportion.
        went = (trajectory.final.double() - trajectory.initial.double()).norm().item()
        rounded = self._recorded.discrepancies.rounding / max(went, torch.finfo(torch.float64).tiny)
        allowed = max(END[dtype] for dtype in types) * max(moved, output.abs().max().item())
        allowed += ROUNDED * rounded * moved
        off = found.sub(output).abs()
        if not isinstance(self.quadrature, DiscreteGradient):  # which makes up for what it missed
            off = off - missed
        worst = off.nan_to_num(nan=torch.inf).max().item()
        if worst > allowed:
            largest = output.abs().max().item()
            raise TrajectoryError(
                f"Samples and channels add up to outputs that are up to {worst:.2g} off those of the network at the "
                f"end of the record, the largest of which is {largest:.2g}",
                f"They are its outputs to rounding, here {allowed:.1g}: the steps on record are then what the update "
                "rule makes of the recorded samples",
                "Record with `KernelRecorder(..., audit_every=1)`, which tells at which step ids, inputs or loss are "
                "not those of the loop; check a rule of your own with `pathkernel.testing.check_update_rule`",
            )

    def _swept(self, queries: Queries, asked: Asked, plan: Plan) -> Account:
        queries.passes = plan.passes
        builder = BUILDERS[self.form](len(self.trajectory.data)) if self.form in BUILDERS else None
        curve = self._curve(queries)
        noted = Noted(curve.quadrature)
        if asked.verify:
            curve.quadrature = noted
        account = backward_sweep(curve, self._recorded, asked.by, builder, self.progress, plan.cuts)
        account.form = None if builder is None else builder.finish()
        certificate = self._recorded.certificate
        account.split_error = torch.full_like(account.missed, certificate.error)
        account.samples_checked = torch.full_like(account.missed, certificate.samples_checked)
        if asked.verify:
            curve.quadrature = AveragingError(noted)
            account.shares_error = self._shares_error(curve, account, plan)
        return account

    def _shares_error(self, curve: Curve, account: Account, plan: Plan) -> Tensor:
        """Σ_i of the sizes of the errors of the shares, (Q,): the sweep of what the averaged gradients are off by."""
        errors = backward_sweep(curve, self._recorded, progress=self.progress, cuts=plan.cuts)
        assert errors.shares is not None and account.shares is not None
        rounding = ROUNDINGS * torch.finfo(self.function.dtype).eps * account.shares.abs().sum(dim=1)
        return SAFETY * errors.shares.abs().sum(dim=1) + errors.missed + rounding

    def __repr__(self) -> str:
        average = "" if self.average is None else f", average={self.average!r}"
        return (
            f"KernelMachine({self.trajectory!r}, quadrature={self.quadrature!r}, form={self.form!r}{average}: exact "
            f"for every recorded step; {FORMS[self.form]}; not symmetric, so not a kernel for scikit-learn)"
        )


def _least(parts: Tensor | None) -> float:
    """The least of those that are known; NaN where none is."""
    return float("nan") if parts is None else -_largest(-parts)


def _largest(errors: Tensor | None) -> float:
    """The largest of those that were measured; NaN where none was."""
    known = torch.zeros(0) if errors is None else errors[~errors.isnan()]
    return known.max().item() if len(known) else float("nan")
