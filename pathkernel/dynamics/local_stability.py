"""Stability of a game at a point: eigenvalues of its vector field, and of the map that its players' steps make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pathkernel.errors import CertificateWarning, InputError
from pathkernel.gradients.parameters import ParameterLayout, constants_of, named_trainable
from pathkernel.gradients.structural_copy import StructuralCopy

GameLoss = Callable[..., Tensor]
"""Loss of one player as a function of all players' networks, in their order."""

DENSE = 400
"""Parameters up to which whole Jacobians are formed: a backward pass for each, and O(P³) for the eigenvalues."""

METHODS = ("auto", "dense", "arnoldi")


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
    """

    flow: np.ndarray
    map: np.ndarray
    speed: float
    updates: tuple[tuple[str, ...], ...]
    complete: bool
    error: float = float("nan")

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
        ``lambda D, G: softplus(-D(G(z))).mean()``. It is called once for each step of the map, with the parameters of
        the networks where they stand then, and begins each time with torch's generator as it was; which is put back.
    rates
        Step size of plain gradient steps, one for all players or by name.
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
        For a player without a loss or a loss without a player, and where a gradient is not finite.

    Warns
    -----
    CertificateWarning
        Where Arnoldi's method did not converge: those eigenvalues are returned that it has found.

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
    stages = stages_of(updates, tuple(players))
    game = _Game(players, losses, rates)
    with torch.random.fork_rng(devices=[]):
        start = game.point
        field = _Stage(start, game.gradients(game.names))
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
    return Stability(flow, of_map, float(field.value.detach().norm()), stages, complete, error)


class _Game:
    """Gradients of all players' losses at a point, on copies of their networks.

    Attributes
    ----------
    point
        w where the players stand, (P,).
    """

    def __init__(
        self, players: Mapping[str, nn.Module], losses: Mapping[str, GameLoss], rates: float | Mapping[str, float]
    ) -> None:
        given = dict(rates) if isinstance(rates, Mapping) else dict.fromkeys(players, rates)
        for name, by_player in (("losses", losses), ("rates", given)):
            if by_player.keys() != players.keys():
                raise InputError(
                    f"`{name}` are of {', '.join(map(repr, by_player)) or 'nobody'}",
                    f"Players are {', '.join(map(repr, players)) or 'nobody'}, and each has one",
                    f"Write `{name}={{{', '.join(f'{player!r}: ...' for player in players)}}}`",
                )
        self.names = tuple(players)
        self._losses, self._rates = losses, given
        self._copies = {name: StructuralCopy(module) for name, module in players.items()}
        trained = {name: named_trainable(module) for name, module in players.items()}
        self._layouts = {name: ParameterLayout.of(own) for name, own in trained.items()}
        self._constants = {name: constants_of(module, self._layouts[name]) for name, module in players.items()}
        self._drawn = torch.get_rng_state()
        self.point = torch.cat([self._layouts[name].flatten(own).detach() for name, own in trained.items()])
        self._parts: dict[str, slice] = {}
        begin = 0
        for name in self.names:
            self._parts[name] = slice(begin, begin + self._layouts[name].size)
            begin += self._layouts[name].size

    def gradients(self, stepping: Sequence[str], scaled: bool = False) -> Callable[[Tensor], Tensor]:
        """Function of w: minus the gradients of those who step, (P,), zero for the others; times their rates."""

        def of(w: Tensor) -> Tensor:
            value = nothing = 0 * w  # with a graph, also where no loss depends on w
            for name in stepping:
                torch.set_rng_state(self._drawn)
                loss = self._losses[name](*self._at(w))
                (gradient,) = torch.autograd.grad(loss + nothing.sum(), w, create_graph=True)
                if not bool(gradient.isfinite().all()):
                    raise InputError(
                        f"The gradient of the loss of {name!r} is not finite where the players stand",
                        "Eigenvalues are those of finite derivatives; a player that diverged has none",
                        "Ask for the players as they were before, such as "
                        "`game.trajectory(player).parameters(step)` loaded into the networks",
                    )
                own = self._parts[name]
                rate = self._rates[name] if scaled else 1.0
                value = value + torch.nn.functional.pad(-rate * gradient[own], (own.start, len(w) - own.stop))
            return value

        return of

    def steps(self, stages: Sequence[Sequence[str]]) -> Iterator[_Stage]:
        """The steps of the map, each where the one before has led."""
        point = self.point
        for stepping in stages:
            stage = _Stage(point, self.gradients(stepping, scaled=True))
            point = (point + stage.value).detach()
            yield stage

    def _at(self, w: Tensor) -> Iterator[nn.Module]:
        """Copies of the networks with the parameters w, and with buffers that they may write on."""
        for name, copy in self._copies.items():
            values = self._layouts[name].unflatten(w[self._parts[name]])
            constants = {key: value.clone() for key, value in self._constants[name].items()}
            copy.fill({**constants, **values})
            yield copy.module


class _Stage:
    """A step w + f(w) at a point, with the graph of f.

    Attributes
    ----------
    value
        f(w), (P,).
    """

    def __init__(self, point: Tensor, of: Callable[[Tensor], Tensor]) -> None:
        self._w = point.detach().clone().requires_grad_(True)
        self.value = of(self._w)

    def pulled_back(self, u: Tensor) -> Tensor:
        """Product of the transposed Jacobian of f with a vector, (P,)."""
        (found,) = torch.autograd.grad(self.value, self._w, u, retain_graph=True)
        return found


def _through(steps: Sequence[_Stage], u: Tensor) -> Tensor:
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
    tolerance = float(torch.finfo(like.dtype).eps) ** 0.75  # rounding of the products makes more of them no better
    try:
        values, vectors = eigs(operator, k=count, which=which, v0=start, tol=tolerance)
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
    """Who steps at once, in the order of the steps.

    Raises
    ------
    InputError
        For updates that are none of these players'.
    """
    if updates == "simultaneous":
        return (names,)
    order = names if updates == "alternating" else tuple(updates)
    if (isinstance(updates, str) and updates != "alternating") or not order or not set(order) <= set(names):
        raise InputError(
            f"`updates={updates!r}` was given",
            f'Updates are "simultaneous", "alternating", or names of {", ".join(map(repr, names))} in the order of '
            "their steps",
            f"Write `updates={tuple(names)!r}`",
        )
    return tuple((name,) for name in order)
