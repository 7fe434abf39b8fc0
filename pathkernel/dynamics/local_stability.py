"""Stability of a game at a point: eigenvalues of its vector field, and of the map that its players' steps make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pathkernel.dynamics.game_field import Game, GameLoss, Stage, check_players
from pathkernel.errors import CertificateWarning, InputError, is_whole
from pathkernel.gradients.forward_state import generators_at

DENSE = 400
"""Parameters up to which whole Jacobians are formed: a backward pass for each, and O(P³) for the eigenvalues."""

METHODS = ("auto", "dense", "arnoldi")

MISSING = 0.01
"""Part of a derivative by differences that backward passes may lack before it is said; ten times their error, too."""


@dataclass(frozen=True)
class Stability:
    r"""Eigenvalues of a game at a point, of its flow and of the map of its steps.

    With :math:`w = (\varphi, \theta)` and the vector field :math:`v(w) = -(\nabla_\varphi L_D, \nabla_\theta L_G)`, and
    so on for more players, the flow :math:`\dot w = v(w)` is stable at a zero of v where all eigenvalues of
    :math:`v'(w)` have negative real parts; the map of the steps :math:`w \mapsto F(w)` where all those of
    :math:`F'(w)` have sizes below 1.

    Attributes
    ----------
    flow
        (k,) eigenvalues of :math:`v'(w)`, those of the largest real parts first.
    map
        (k,) eigenvalues of :math:`F'(w)`, the largest first.
    speed
        :math:`\lVert v(w) \rVert`: 0 at an equilibrium; elsewhere eigenvalues say how neighbours of w part from it.
    updates
        The players in the order of their steps, those that step at once in one tuple.
    complete
        Whether these are all eigenvalues, or the outermost k.
    error
        Largest :math:`\lVert A u - \lambda u \rVert` of an eigenvector u of length 1 of the transposed Jacobians; NaN
        where they were formed whole.
    rounding
        What rounding may add to an eigenvalue: real parts, and sizes beside 1, that are nearer to it are neutral.
    """

    flow: np.ndarray
    map: np.ndarray
    speed: float
    updates: tuple[tuple[str, ...], ...]
    complete: bool
    error: float = float("nan")
    rounding: float = 1e-12

    @property
    def abscissa(self) -> float:
        """Largest real part of the flow's eigenvalues: negative where it is stable, NaN where none was found."""
        return float(self.flow.real.max()) if len(self.flow) else float("nan")

    @property
    def radius(self) -> float:
        """Spectral radius of the map: below 1 where it is stable, NaN where no eigenvalue was found."""
        return float(np.abs(self.map).max()) if len(self.map) else float("nan")

    @property
    def rotation(self) -> np.ndarray:
        """(k,) size of imaginary over real part of each of the flow's eigenvalues: radians turned while one decays."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(np.abs(self.flow.imag) / np.abs(self.flow.real), nan=0.0, posinf=np.inf)

    def __repr__(self) -> str:
        steps = ", ".join(" with ".join(stage) for stage in self.updates)
        some = "all" if self.complete else "outermost"
        return (
            f"Stability({some} {len(self.flow)} eigenvalues: flow up to {self.abscissa:+.3g} in the real part, map of "
            f"the steps ({steps}) up to {self.radius:.4g} in size; speed {self.speed:.2g})"
        )


def stability(
    players: Mapping[str, nn.Module],
    losses: Mapping[str, GameLoss],
    rates: float | Mapping[str, float] = 1.0,
    *,
    updates: str | Sequence[str] = "simultaneous",
    count: int = 6,
    method: str = "auto",
    seed: int = 0,
) -> Stability:
    r"""Find the eigenvalues of a game where its players stand.

    Parameters
    ----------
    players
        The network of each player by its name. They are read, and neither run nor changed.
    losses
        What each player makes smaller, as a function of all players' networks in the order of ``players``:
        ``lambda D, G: softplus(-D(G(z))).mean()``. It is called once for each step of the map and a few times more,
        with the parameters of the networks where they stand then, and begins each time with torch's generators as they
        were, on the CPU and on the device of the networks; they are put back. It is written without ``detach``: the
        usual :math:`L_D` of ``G(z).detach()`` has the same gradient, but no derivative of it,
        :math:`\partial\dot\varphi/\partial\theta`.
    rates
        Step size of plain gradient steps, one for all players or by name, 0 or more.
    updates
        ``"simultaneous"``: all at once; ``"alternating"``: one after the other in the order of ``players``; or names in
        the order of their steps, ``("D", "D", "D", "D", "D", "G")``.
    count
        How many eigenvalues Arnoldi's method is asked for: those of the largest real part of the flow, and of the
        largest size of the map.
    method
        ``"dense"`` forms the Jacobians, P backward passes; ``"arnoldi"`` multiplies by them alone; ``"auto"`` the first
        up to 400 parameters.
    seed
        Of the vector that Arnoldi's method starts with.

    Returns
    -------
    Stability

    Raises
    ------
    InputError
        For a player without a loss or a loss without a player; for a loss that is no number with a graph, or does not
        depend on the parameters of its player's network as it was passed in; for players that share parameters; and
        where a gradient is not finite.

    Warns
    -----
    CertificateWarning
        Where backward passes lack a part of the derivatives of the vector field, as those of losses with ``detach``
        do: along a random direction of each player they are compared with a difference quotient. Where Arnoldi's method
        did not converge: those eigenvalues are returned that it has found.

    Notes
    -----
    Products with transposed Jacobians are backward passes through the graph of the gradient, whose eigenvalues are the
    same: :math:`F'^\top u = \prod_k (I + v_k'^\top H_k)\, u`, with :math:`v_k'` where the k-th step begins and
    :math:`H_k` the rates of those who take it. Memory: a graph for each of these steps.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> from torch.nn.functional import softplus
    >>> D, G = (torch.nn.Linear(1, 1, bias=False).double() for _ in range(2))
    >>> for network in (D, G):
    ...     _ = torch.nn.init.zeros_(network.weight)
    >>> one = torch.ones(1, 1).double()
    >>> of_d = lambda D, G: softplus(D(G(one))).sum() + softplus(-D(0 * one)).sum()
    >>> of_g = lambda D, G: -softplus(D(G(one))).sum()
    >>> report = pk.dynamics.stability({"D": D, "G": G}, {"D": of_d, "G": of_g}, rates=0.2)
    >>> report.flow.imag.round(6), round(report.radius, 6)
    (array([ 0.5, -0.5]), 1.004988)

    References
    ----------
    Mescheder et al. 2017 (1705.10461), Proposition 4; 2018 (1801.04406), section 2.
    """
    if method not in METHODS:
        raise InputError(
            f"`method={method!r}` was given",
            f"Methods are {', '.join(map(repr, METHODS))}",
            'Write `method="auto"`',
        )
    if not is_whole(count) or count < 1:
        raise InputError(
            f"`count={count!r}` was given", "So many eigenvalues are asked for, 1 or more", "Write `count=6`"
        )
    check_players(players, losses)
    stages = stages_of(updates, tuple(players))
    game = Game(players, losses, rates)
    with generators_at(game.drawn), torch.enable_grad():
        start = game.point
        field = Stage(start, game.gradients(game.names))
        _warn_of_missing_derivatives(field, game, seed)
        steps = list(game.steps(stages))
        size = len(start)
        if method == "dense" or (method == "auto" and size <= DENSE) or size <= count + 1:
            flow, error = np.linalg.eigvals(_dense(field.pulled_back, start)), float("nan")
            of_map = np.linalg.eigvals(_dense(lambda u: _through(steps, u), start))
            complete = True
        else:
            flow, first = _arnoldi(field.pulled_back, start, count, "LR", seed, "the vector field")
            of_map, second = _arnoldi(lambda u: _through(steps, u), start, count, "LM", seed, "the map of the steps")
            error, complete = max(first, second), False
    flow = flow[np.lexsort((-flow.imag, -flow.real.round(12)))]
    of_map = of_map[np.lexsort((-of_map.imag, -np.abs(of_map).round(12)))]
    scale = max(1.0, *np.abs(flow), *np.abs(of_map))
    rounding = float(max(np.nan_to_num(error), _tolerance(start) * scale))
    return Stability(flow, of_map, float(field.value.detach().norm()), stages, complete, error, rounding)


def _tolerance(like: Tensor) -> float:
    """Rounding left in products with Jacobians, relative to their size: more of them makes it no better."""
    return float(torch.finfo(like.dtype).eps) ** 0.75


def _warn_of_missing_derivatives(field: Stage, game: Game, seed: int) -> None:
    r"""Warn where the graph of the vector field v lacks what a difference quotient of v finds.

    Along a random direction r of each player's parameters, :math:`d = (v(w + hr) - v(w - hr)) / 2h`, once more with
    h/2 for its error. What the graph has of each player's part of d is :math:`d^\top v' r`, beside
    :math:`d^\top d`: one backward pass for each pair of players.
    """
    point, v = game.point, game.gradients(game.names)
    draws = torch.from_numpy(np.random.default_rng(seed).normal(size=len(point))).to(point)
    width = torch.finfo(point.dtype).eps ** 0.5 * max(1.0, float(point.norm()))  # short: few kinks of a ReLU within

    def difference(direction: Tensor, h: float) -> Tensor:
        ends = [Stage(point + sign * h * direction, v).value.detach() for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * h)

    missing = 0.0
    for moving in game.parts.values():
        direction = torch.zeros_like(point)
        direction[moving] = draws[moving] / draws[moving].norm()
        rough, found = difference(direction, width), difference(direction, width / 2)
        for part in game.parts.values():
            size = float(found[part].norm())
            if size <= MISSING * float(found.norm()):
                continue
            unit = torch.zeros_like(point)
            unit[part] = found[part] / size
            lacking = abs(1 - float(field.pulled_back(unit) @ direction) / size)
            if lacking > max(MISSING, 10 * float((found - rough)[part].norm()) / size):
                missing = max(missing, lacking)
    if missing > 0.0:
        warnings.warn(
            CertificateWarning(
                f"Backward passes lack {missing:.0%} of how the gradient of a loss changes with the parameters of a "
                "player",
                "Eigenvalues are right where losses are differentiable functions of all networks passed in; `detach`, "
                "`no_grad` and `.item()` hide from the derivatives of a gradient what they let pass into its value",
                "Write the losses without them, `softplus(D(G(z)))` in place of `softplus(D(G(z).detach()))`: of each "
                "loss the gradient of its own player alone is taken in any case",
            ),
            stacklevel=3,  # the caller of `stability`
        )


def _through(steps: Sequence[Stage], u: Tensor) -> Tensor:
    """Product of the transposed Jacobian of all steps with a vector, which goes back from the last to the first."""
    for stage in reversed(steps):
        u = u + stage.pulled_back(u)
    return u


def _dense(product: Callable[[Tensor], Tensor], like: Tensor) -> np.ndarray:
    """The Jacobian (P, P) float64, from the products of its transposed one with unit vectors."""
    return np.stack([_as_numpy(product, unit, like) for unit in np.eye(len(like))])


def _as_numpy(product: Callable[[Tensor], Tensor], u: np.ndarray, like: Tensor) -> np.ndarray:
    """A product with a vector, which is converted to the type and device of the parameters."""
    found: np.ndarray = product(torch.from_numpy(u.reshape(-1)).to(like)).double().cpu().numpy()
    return found


def _arnoldi(
    product: Callable[[Tensor], Tensor], like: Tensor, count: int, which: str, seed: int, of_what: str
) -> tuple[np.ndarray, float]:
    """Outermost eigenvalues (k,) by products alone, and the largest ‖A u − λ u‖ among them."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs  # takes its time to load

    size = len(like)
    operator = LinearOperator((size, size), matvec=lambda u: _as_numpy(product, u, like), dtype=np.float64)
    start = np.random.default_rng(seed).normal(size=size)
    try:
        values, vectors = eigs(operator, k=count, which=which, v0=start, tol=_tolerance(like))
    except ArpackNoConvergence as stopped:
        values, vectors = stopped.eigenvalues, stopped.eigenvectors
        warnings.warn(
            CertificateWarning(
                f"Arnoldi's method found {len(values)} of the {count} outermost eigenvalues of {of_what}",
                "Eigenvalues that lie close to each other take many products to tell apart; those found are returned",
                f'Ask for more, `count={2 * count}`, or write `method="dense"`',
            ),
            stacklevel=3,  # the caller of `stability`
        )
    errors = [
        np.linalg.norm(operator.matvec(u.real) + 1j * operator.matvec(u.imag) - value * u)
        for value, u in zip(values, vectors.T, strict=True)
    ]
    return values, float(max(errors, default=float("nan")))


def stages_of(updates: str | Sequence[str], names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Players that step at once, in the order of the steps.

    Raises
    ------
    InputError
        For updates that are none of these players'.
    """
    if updates == "simultaneous":
        return (names,)
    order = names if updates == "alternating" else updates
    if not isinstance(order, Sequence) or isinstance(order, str) or not order or not set(order) <= set(names):
        raise InputError(
            f"`updates={updates!r}` was given",
            f'Updates are "simultaneous", "alternating", or names of {", ".join(map(repr, names))} in the order of '
            "their steps",
            f"Write `updates={tuple(names)!r}`",
        )
    return tuple((name,) for name in order)
