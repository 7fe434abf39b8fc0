r"""`Flow`: a network's way in continuous time, and what is asked of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.dynamics.integration import Integration, Solver
from pathkernel.dynamics.system import System
from pathkernel.dynamics.times import points_of, shown, time_weights, times_of
from pathkernel.errors import InputError, is_whole
from pathkernel.gradients.losses import output_cotangents
from pathkernel.gradients.per_sample import output_products
from pathkernel.gradients.pytrees import count
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.quadrature import LeftEndpoint
from pathkernel.tangent_kernel.engines.auto import EngineValue
from pathkernel.tangent_kernel.engines.engine import Engine
from pathkernel.tangent_kernel.tangent_kernel import no_samples
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.run import End
from pathkernel.trajectory.step import Step
from pathkernel.trajectory.trajectory import Trajectory


class KernelOptions(TypedDict, total=False):
    """Options of a flow's path kernel, whose nodes and weights are those of the flow.

    Attributes
    ----------
    outputs, engine, memory, dtype, progress
        As of `pathkernel.PathKernel`.
    """

    outputs: Any
    engine: str | EngineValue | type[Engine]
    memory: int | str
    dtype: torch.dtype | None
    progress: bool


def check_options(options: Mapping[str, Any], kind: type, asked: str) -> None:
    """Refuse options that a TypedDict does not name."""
    known = kind.__annotations__  # with those of its bases
    if unknown := sorted(set(options) - known.keys()):
        raise InputError(
            f"`{unknown[0]}=` was given to {asked}",
            f"Its options are {', '.join(f'`{name}`' for name in sorted(known))}",
            f"Leave `{unknown[0]}` out",
        )


class Flow:
    r"""The way θ(t) of a network under a flow :math:`\dot y = F(t, y)`, kept at some points of time.

    Made by `gradient_flow` and the other functions of `pathkernel.dynamics`.

    Parameters
    ----------
    system
        F, with the loss.
    times
        Points of time that are kept, (T,).
    states
        y there, (T, Y).
    solver
        How the flow was followed; None for one that draws random numbers.

    Attributes
    ----------
    system, times, states, solver
        As given, times as a numpy array.
    theta
        θ there, (T, P).
    losses
        L there, (T,) float64.
    """

    def __init__(self, system: System, times: Sequence[float], states: Tensor, solver: Solver | None) -> None:
        self.system, self.states, self.solver = system, states, solver
        self.times = np.asarray(times, dtype=np.float64)
        self.theta = self.part("theta")
        with system.loss.held():
            self.losses = np.array([float(system.loss.value(theta)) for theta in self.theta])

    def __len__(self) -> int:
        """T."""
        return len(self.times)

    def __repr__(self) -> str:
        return (
            f"Flow({self.system.name}, t = 0 to {self.times[-1]:.4g}, {len(self)} points, P = {self.theta.shape[1]}, "
            f"L = {self.losses[0]:.4g} to {self.losses[-1]:.4g})"
        )

    def part(self, name: str) -> Tensor:
        """A part of y at the points that are kept, such as ``"theta"`` or ``"velocity"``: (T, its length).

        Raises
        ------
        InputError
            For a name that the flow's state has no part of.
        """
        if name not in self.system.parts:
            raise InputError(
                f"The part {name!r} of a flow's state was asked for",
                f"The state of {self.system.name} has the parts {', '.join(map(repr, self.system.parts))}",
                'Write for example `flow.part("theta")`',
            )
        return self.system.split(self.states)[self.system.parts.index(name)]

    def parameters(self, point: int) -> dict[str, Tensor]:
        """θ at one of the points that are kept, by parameter name: copies, for ``model.load_state_dict``."""
        if not (is_whole(point) and -len(self) <= point < len(self)):
            raise InputError(
                f"`parameters({point!r})` was asked for",
                f"The flow keeps the points 0 to {len(self) - 1}",
                "Write `flow.parameters(-1)` for its end",
            )
        return self.system.loss.run.layout.unflatten(self.theta[point].clone())

    def outputs(self, X: PyTree) -> np.ndarray:
        """The network's outputs along the flow, in the modes that the model was in.

        Parameters
        ----------
        X
            n samples.

        Returns
        -------
        numpy.ndarray
            float64 (T, n, C).

        Raises
        ------
        InputError
            For no samples, and for samples of another shape.
        """
        loss, inputs = self.system.loss, self._queries(X, "Flow.outputs")
        found = [loss.function.outputs(theta, inputs, loss.block) for theta in self.theta]
        return torch.stack(found).double().cpu().numpy()

    def _queries(self, X: PyTree, asker: str) -> PyTree:
        """Samples, one or more, shaped as those of the training loss."""
        inputs = self.system.loss.run.data.queries(X, asker)
        if not count(inputs):
            raise no_samples(asker)
        return inputs

    # -- the kernel along the flow ---------------------------------------------------------------------------

    def kernel(self, **options: Unpack[KernelOptions]) -> PathKernel:
        r"""The path kernel of the flow, Domingos' object: the tangent kernel integrated over time.

        .. math:: K(x, x') = \int_0^T \langle \nabla f(x; \theta(t)), \nabla f(x'; \theta(t))\rangle\, dt

        By Simpson's rule over the points that are kept (an odd number, evenly spaced: an error of order 4 in their
        distance), else by the trapezoid rule (order 2). Weights are positive, so that it is positive semi-definite.

        Parameters
        ----------
        **options
            See `pathkernel.dynamics.flow.KernelOptions`.

        Returns
        -------
        PathKernel
            A kernel for scikit-learn.

        Raises
        ------
        InputError
            For other options, and for a flow of one point.

        References
        ----------
        Domingos 2020 (2012.00152), Definition 3.
        """
        check_options(options, KernelOptions, "a flow's path kernel")
        return PathKernel(self._points(dict(enumerate(time_weights(self.times)))), quadrature=LeftEndpoint(), **options)

    def path_kernel(self, X: PyTree, Z: PyTree | None = None, **options: Unpack[KernelOptions]) -> np.ndarray:
        """Matrix of the path kernel of the flow: `kernel` called with samples.

        Parameters
        ----------
        X, Z
            n and m samples; Z None stands for X.
        **options
            As of `kernel`.

        Returns
        -------
        numpy.ndarray
            float64 (n, m), or (n, m, C, C) for ``outputs="full"``.
        """
        return self.kernel(**options)(X, Z)

    def explain(self, X: PyTree) -> Attributions:
        r"""The network at the end of gradient flow as a kernel machine: Domingos' theorem, sample by sample.

        .. math:: f_c(x; \theta(T)) = f_c(x; \theta(0)) - \sum_i \int_0^T \sum_{c'}
                  K_{t, cc'}(x, x_i)\, \frac{\partial L}{\partial z_{i c'}}\, dt

        with the tangent kernel :math:`K_t` of outputs at θ(t), integrated as by `kernel`.

        Parameters
        ----------
        X
            n samples; every output of each is a query.

        Returns
        -------
        Attributions
            Shares (n C, N). What they and the untrained network miss of the output is the error of the integral, which
            is both ``residual`` and ``quadrature_error``. The exact machine of the steps that were taken is
            `pathkernel.KernelMachine`.

        Raises
        ------
        InputError
            For no samples, and for a flow of one point. For other flows: gradients act through velocities and averages
            there. For a network that trains on other outputs than it has in evaluation, as with batch normalization in
            train mode, and for one whose gradient is not its derivative, as with a tied embedding that has a
            ``padding_idx``.

        Notes
        -----
        Full blocks of the tangent kernel of n queries and N samples at every point: n N C² numbers at once. At both
        ends of the flow, the rates at which shares grow are compared with the rates of the outputs themselves,
        :math:`\nabla f \cdot \dot\theta` by forward differentiation.
        """
        loss = self.system.loss
        if not self.system.is_gradient_flow:
            raise InputError(
                f"An explanation was asked of a {self.system.name}",
                "Under gradient flow alone, shares are products of gradients at one time; elsewhere gradients act "
                "through velocities, averages and Hessians",
                "Write `gradient_flow(...)`, or record a run: `KernelMachine(trajectory).explain(X)` is exact for it",
            )
        inputs, function = self._queries(X, "Flow.explain"), loss.run.function()
        weights = time_weights(self.times)
        ends = [function.outputs(theta, inputs, loss.block) for theta in (self.theta[0], self.theta[-1])]
        n, c = ends[0].shape
        last = len(self) - 1
        for point in (0, last):
            loss.check_evaluation(self.theta[point])
        shares = torch.zeros(n, c, len(loss), dtype=torch.float64)
        for point, weight in enumerate(weights):
            kernel = PathKernel(self._points({point: 1.0}), outputs="full", quadrature=LeftEndpoint())
            blocks = torch.from_numpy(kernel(inputs, loss.inputs))
            slopes = output_cotangents(
                function, self.theta[point], loss.run.objective, loss.inputs, loss.targets, loss.weights
            )
            rates = -torch.einsum("nicd,id->nci", blocks, slopes.double().cpu())
            if point in (0, last):
                self._check_rates(point, inputs, rates)
            shares += weight * rates
        start, end = (values.double().cpu().flatten().numpy() for values in ends)
        added = shares.flatten(0, 1).numpy()
        missed = np.abs(end - start - added.sum(axis=1)) / np.maximum(np.abs(end - start), np.finfo(float).tiny)
        return Attributions(
            shares=added,
            channels={"initial": start},
            output=end,
            query_index=np.repeat(np.arange(n), c),
            output_index=np.tile(np.arange(c), n),
            quadrature_error=missed,
        )

    def _check_rates(self, point: int, inputs: PyTree, rates: Tensor) -> None:
        """Refuse shares whose rates (n, C, N) do not add up to those of the outputs at a point, ∇f · θ̇.

        Reverse sweeps make the shares; forward differentiation is independent of them.
        """
        loss, theta = self.system.loss, self.theta[point]
        moved = output_products(loss.run.function(), theta, inputs, -loss.gradient(theta)[None])
        if moved is None:  # torch has no forward derivative of this network
            return
        difference = float((rates.sum(dim=2) - moved[0].cpu()).abs().max())
        if difference > torch.finfo(theta.dtype).eps ** 0.5 * float(rates.abs().sum(dim=2).max()):
            raise InputError(
                f"The shares of samples grow at other rates than the outputs at t = {self.times[point]:.6g} (by "
                f"{difference:.1e}): the gradient that autograd takes of the network is not its derivative",
                "Shares are products of gradients, and they add up to the outputs where gradients are derivatives; the "
                "row `padding_idx` of an embedding that is tied to another layer gets no gradient for where it is read",
                "Leave `padding_idx` out, or untie the weights",
            )

    def _points(self, weights: Mapping[int, float]) -> Trajectory:
        """Some of the points that are kept as steps that stay where they are, with weights as rates."""
        run = self.system.loss.run
        nothing = torch.empty(0, dtype=self.theta.dtype)
        names = run.layout.names
        steps = [
            Step(
                index=k,
                before=self.theta[point],
                after=self.theta[point],
                gradient=nothing,
                active=frozenset(names),
                batches=(),
                groups=dict.fromkeys(names, 0),
                hyperparameters=({"lr": float(weight)},),
            )
            for k, (point, weight) in enumerate(weights.items())
        ]
        return Trajectory(replace(run, reference=None), MemoryStore(steps), End(is_live=False))

    # -- beside a recorded run -------------------------------------------------------------------------------

    def at(self, times: ArrayLike) -> Tensor:
        """θ at any points of time on the flow, followed to each from the point before it.

        Parameters
        ----------
        times
            Rising, from 0 to the flow's last time, (n,).

        Returns
        -------
        Tensor
            (n, P).
        """
        wanted = points_of(times)
        end = self.times[-1]
        slack = 1e-9 * end  # sums of many rates end a few roundings beside the time that was asked for
        if self.solver is None:
            raise InputError(
                f"A point between those kept of {self.system.name} was asked for",
                "A flow that draws random numbers has the points that were kept, and no others",
                "Write a smaller `step=` and more `points=`",
            )
        if wanted.ndim != 1 or not ((wanted >= 0) & (wanted <= end + slack)).all() or (np.diff(wanted) < 0).any():
            raise InputError(
                f"Times {shown(wanted)} were asked of a flow",
                f"They rise, from 0 to {end:.6g}",
                "Leave out the others, or follow the flow for longer with `time=`",
            )
        # Each point may take as many steps as the whole flow.
        solver = replace(self.solver, max_steps=self.solver.max_steps * (1 + len(wanted)))
        integration = Integration(self.system.flat_velocity, solver)
        found, now, state = [], 0.0, self.states[0]
        with self.system.loss.held():
            for time in np.minimum(wanted, end).tolist():
                before = int(np.searchsorted(self.times, time + slack, side="right")) - 1
                if self.times[before] > now:
                    now, state = float(self.times[before]), self.states[before]
                if time > now + slack:
                    state = integration.advance(now, time, state)
                    now = time
                found.append(self.system.split(state)[0])
        return torch.stack(found) if found else self.theta[:0]

    def distance(self, trajectory: Trajectory) -> FlowDistance:
        """Distance of a recorded run from the flow, point by point at equal times.

        Parameters
        ----------
        trajectory
            A run of the same network from the same θ(0). Time passes by the flow's own clock: a step takes its learning
            rate, under momentum the time step of the leapfrog scheme.

        Returns
        -------
        FlowDistance
            At every recorded point that the flow reaches.

        Raises
        ------
        InputError
            For a run from elsewhere, where parameter groups have rates of their own, and for runs with ``maximize`` or
            ``dampening``, which no flow here has a clock for.
        """
        if not isinstance(trajectory, Trajectory):
            raise InputError(
                f"A distance from a {type(trajectory).__name__} was asked for",
                "A flow is compared with a recorded run",
                "Write `flow.distance(recorder.trajectory)`",
            )
        start = self.theta[0]
        initial = self.system.loss.initial  # a modified flow with momentum starts uphill of it
        if trajectory.layout != self.system.loss.run.layout or not torch.allclose(
            trajectory.initial.to(initial), initial, rtol=1e-6, atol=1e-6 * initial.abs().max().item()
        ):
            raise InputError(
                "The recorded run does not begin where the flow does",
                "Both start from the same parameters of the same network",
                "Follow the flow before training, or from a copy of the network as it was then: "
                "`model.load_state_dict({**model.state_dict(), **trajectory.parameters(0)})`",
            )
        times = np.array(times_of(self.system, trajectory))
        times = times[times <= self.times[-1] * (1 + 1e-9)]
        run = torch.stack([trajectory.vector(s).to(start) for s in range(len(times))])
        flow = self.at(times)
        moved = (flow - start).norm(dim=1)
        return FlowDistance(times, (run - flow).norm(dim=1).cpu().numpy(), moved.cpu().numpy())


@dataclass(frozen=True)
class FlowDistance:
    """Distance of a recorded run from a flow.

    Attributes
    ----------
    times
        Of the recorded points, (n,).
    distance
        ‖θ_s − θ(t_s)‖, (n,).
    moved
        ‖θ(t_s) − θ(0)‖, (n,).
    """

    times: np.ndarray
    distance: np.ndarray
    moved: np.ndarray

    @property
    def relative(self) -> float:
        """The largest distance over how far the flow moved in all."""
        return float(self.distance.max() / max(self.moved.max(), np.finfo(float).tiny))
