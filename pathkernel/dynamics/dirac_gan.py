r"""The Dirac GAN: the smallest game, whose variants converge, circle or diverge as real ones do.

The discriminator is :math:`D(x) = \varphi x`, the real sample is 0, and the generator makes the one sample θ. Every
variant is a pair of losses, and the vector field :math:`(\dot\varphi, \dot\theta) = -(\partial_\varphi L_D,
\partial_\theta L_G)` that follows from it, with σ the logistic function:

=====================  ============================================================================================
GAN                    :math:`L_D = \log 2 + \log(1 + e^{\varphi\theta})`, :math:`L_G = -\log(1 + e^{\varphi\theta})`
non-saturating         :math:`L_G = \log(1 + e^{-\varphi\theta})`
WGAN                   :math:`L_D = \varphi\theta`, :math:`L_G = -\varphi\theta`; after each step of D,
                       :math:`\lvert\varphi\rvert \le 1` (clipped) or :math:`\lvert\varphi\rvert = 1` (spectral)
WGAN-GP, centre c      :math:`L_D = \varphi\theta + \frac{\gamma}{2} (\lvert\varphi\rvert - c)^2`
GAN-QP                 :math:`L_D = \varphi\theta + \frac{(\varphi\theta)^2}{2\lambda\lvert\theta\rvert}`
instance noise         the GAN with :math:`\theta + \varepsilon` and :math:`0 + \varepsilon`,
                       :math:`\varepsilon \sim N(0, s^2)`
R1                     the GAN with :math:`\frac{\gamma}{2} \varphi^2` in :math:`L_D`
consensus              the GAN with :math:`\frac{\gamma}{2} \lVert v \rVert^2` in both losses, v the field of the GAN
=====================  ============================================================================================

References
----------
Mescheder et al. 2018 (1801.04406); 2017 (1705.10461) for consensus optimization; Su 2018 (1811.07296) for GAN-QP; the
series 从动力学角度看优化算法, part IV, of kexue.fm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pathkernel.dynamics.local_stability import Stability, stability, stages_of
from pathkernel.errors import GameError, InputError, brief, check_number

Numbers = Any
"""Numbers or arrays of them, of one shape for φ and θ."""

UPDATES: Mapping[str, str | tuple[str, ...]] = {
    "simultaneous": "simultaneous",
    "alternating 1": ("D", "G"),
    "alternating 5": ("D", "D", "D", "D", "D", "G"),
}
"""Who steps when: both at once, one after the other, and five steps of the discriminator for each of the generator."""

FARTHEST = 1e6
"""Distance from the equilibrium beyond which a trajectory has diverged."""


@dataclass(frozen=True)
class DiracGAN:
    """A variant of the game.

    Attributes
    ----------
    name
        As in the literature.
    field
        ``(φ, θ) -> (φ̇, θ̇)`` of numbers or arrays.
    losses
        ``(φ, θ) -> (L_D, L_G)`` of tensors without axes.
    project
        What is done to φ after a step of the discriminator, or None.
    equilibrium
        Whether the field is differentiable, and zero, at (0, 0), and the projection leaves that point.
    """

    name: str
    field: Callable[[Numbers, Numbers], tuple[Numbers, Numbers]]
    losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    project: Callable[[float], float] | None = None
    equilibrium: bool = True

    def trajectory(
        self,
        start: tuple[float, float],
        rate: float,
        steps: int,
        updates: str | Sequence[str] = "simultaneous",
    ) -> np.ndarray:
        """Gradient steps of both players.

        Parameters
        ----------
        start
            (φ, θ).
        rate
            h, of both, 0 or more.
        steps
            How many rounds, each of all steps in ``updates``, 0 or more.
        updates
            ``"simultaneous"``, ``"alternating"``, or names in the order of their steps, such as ``("D", "D", "G")``.

        Returns
        -------
        numpy.ndarray
            (steps + 1, 2): φ and θ before every round and after the last.

        Raises
        ------
        InputError
            For updates that are none of D's and G's, and a rate or a number of steps that is none.
        GameError
            Where the players go away from each other for good; its ``path`` are the rounds before that.
        """
        stages = stages_of(updates, ("D", "G"))
        check_number("rate", rate)
        check_number("steps", steps, whole=True)
        phi, theta = map(float, start)
        path = np.empty((steps + 1, 2))
        path[0] = phi, theta
        for k in range(1, steps + 1):
            for stepping in stages:
                of_phi, of_theta = self.field(phi, theta)
                if "D" in stepping:
                    moved = phi + rate * of_phi
                    phi = moved if self.project is None else self.project(moved)
                if "G" in stepping:
                    theta = theta + rate * of_theta
            path[k] = phi, theta
            if not np.hypot(phi, theta) < FARTHEST:
                raise _ended(f"{self.name} left the neighbourhood of its equilibrium for good in round {k}", path[:k])
        return path

    def flow(self, start: tuple[float, float], times: np.ndarray, tolerance: float = 1e-10) -> np.ndarray:
        """The flow (φ̇, θ̇) = field(φ, θ), solved to a tolerance: (φ, θ) at increasing times, the start's first, (n, 2).

        Raises
        ------
        InputError
            For a variant with a projection, whose flow has no vector field of its own, and for times that do not
            increase, or are fewer than two.
        GameError
            Where the flow ends before its time; its ``path`` is what there is of it.
        """
        from scipy.integrate import solve_ivp  # takes its time to load

        if self.project is not None:
            raise InputError(
                f"The flow of {self.name} was asked for",
                "Its discriminator is put back after every step, which a vector field does not",
                "Write `variant.trajectory(start, rate, steps)` with a small rate",
            )
        times = np.asarray(times, dtype=float)
        if times.ndim != 1 or len(times) < 2 or not bool(np.isfinite(times).all() and (np.diff(times) > 0).all()):
            raise InputError(
                f"The flow was asked for at {times.size} times {brief(times.tolist())}",
                "Times are two or more finite numbers that increase; the first is that of the start",
                "Write `variant.flow(start, np.linspace(0, 10, 101))`",
            )
        found = solve_ivp(
            lambda t, w: np.array(self.field(*w)),
            (float(times[0]), float(times[-1])),
            start,
            method="DOP853",
            t_eval=times,
            rtol=tolerance,
            atol=tolerance * 1e-3,
        )
        values: np.ndarray = found.y.T
        if not found.success:
            reached = f"{times[len(values) - 1]:g}" if len(values) else "its start"
            raise _ended(f"The flow of {self.name} came to an end after {reached}: {found.message.rstrip('.')}", values)
        return values

    def stability(self, rate: float, updates: str | Sequence[str] = "simultaneous") -> Stability | None:
        """Eigenvalues where both players are zero, by `pathkernel.dynamics.stability`; None without an equilibrium."""
        if not self.equilibrium:
            return None
        players = {"D": _Number(), "G": _Number()}
        losses = {"D": lambda D, G: self.losses(D(), G())[0], "G": lambda D, G: self.losses(D(), G())[1]}
        return stability(players, losses, rate, updates=updates)


class _Number(nn.Module):
    """A player that is one number, zero to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.value


def _ended(found: str, path: np.ndarray) -> GameError:
    """Error for a path that came to an end before its time, with what there is of it."""
    error = GameError(
        found,
        f"Players of the Dirac GAN are followed while they are nearer than {FARTHEST:g}, and their field is finite",
        "Write a smaller `rate`, or a shorter time; `error.path` is the part of the path before",
    )
    error.path = path.copy()
    return error


# -- the variants ----------------------------------------------------------------------------------------------------


def _sigmoid(t: Numbers) -> Numbers:
    return 0.5 * (1 + np.tanh(0.5 * t))


def gan() -> DiracGAN:
    """The saturating GAN of Goodfellow et al. 2014: its flow conserves φ² + θ²."""

    def field(phi: Numbers, theta: Numbers) -> tuple[Numbers, Numbers]:
        slope = _sigmoid(phi * theta)
        return -slope * theta, slope * phi

    def losses(phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        fake = softplus(phi * theta)
        return softplus(-phi * 0.0) + fake, -fake

    return DiracGAN("GAN", field, losses)


def non_saturating() -> DiracGAN:
    r"""The GAN whose generator makes :math:`\log(1 + e^{-D(G)})` small: its radius decays like :math:`t^{-1/2}`."""

    def field(phi: Numbers, theta: Numbers) -> tuple[Numbers, Numbers]:
        return -_sigmoid(phi * theta) * theta, _sigmoid(-phi * theta) * phi

    def losses(phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return softplus(-phi * 0.0) + softplus(phi * theta), softplus(-phi * theta)

    return DiracGAN("non-saturating", field, losses)


def wgan(projection: str = "clipped") -> DiracGAN:
    r"""The Wasserstein GAN, its discriminator put back after each of its steps.

    Parameters
    ----------
    projection
        ``"clipped"``: into :math:`\lvert\varphi\rvert \le 1`; ``"spectral"``: onto :math:`\lvert\varphi\rvert = 1`,
        where there is no equilibrium. (Divided by its own norm within the loss, φ would get no gradient at all here.)
    """
    projections = {"clipped": _clipped, "spectral": _normalized}
    if projection not in projections:
        raise InputError(
            f"`wgan({projection!r})` was called",
            f"Projections are {', '.join(map(repr, projections))}",
            'Write `wgan("clipped")`',
        )

    def field(phi: Numbers, theta: Numbers) -> tuple[Numbers, Numbers]:
        return -theta, 1.0 * phi

    def losses(phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return phi * theta, -phi * theta

    return DiracGAN(f"WGAN, {projection}", field, losses, projections[projection], projection == "clipped")


def _clipped(phi: float) -> float:
    return min(max(phi, -1.0), 1.0)


def _normalized(phi: float) -> float:
    return -1.0 if phi < 0 else 1.0


def wgan_gp(centre: float, weight: float = 0.5) -> DiracGAN:
    r"""The Wasserstein GAN with a gradient penalty (γ/2)(‖∇D‖ − c)², which is centred at c.

    Parameters
    ----------
    centre
        c: 0 damps the rotation; around 1 there is a limit cycle, whose radius is 4/π for a small γ.
    weight
        γ. With a centre of 1 and n steps of the discriminator to one of the generator, :math:`n\gamma^2 > 4` ends at a
        discriminator of zero and a fake at :math:`\theta = \pm\gamma`, which is not the real sample.
    """
    check_number("centre", centre)
    check_number("weight", weight)

    def field(phi: Numbers, theta: Numbers) -> tuple[Numbers, Numbers]:
        return -theta - weight * (phi - centre * np.sign(phi)), 1.0 * phi

    def losses(phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        penalty = (phi - centre * phi.sign()) ** 2  # (|φ| − c)², with a second derivative at 0 where c is 0
        return phi * theta + weight / 2 * penalty, -phi * theta

    return DiracGAN(f"WGAN-GP, centre {centre:g}", field, losses, equilibrium=centre == 0)


def gan_qp(weight: float = 1.0) -> DiracGAN:
    """GAN-QP: a quadratic potential in place of a Lipschitz constraint; the radius decays like 1/t.

    Parameters
    ----------
    weight
        λ, positive.
    """
    check_number("weight", weight, positive=True)

    def field(phi: Numbers, theta: Numbers) -> tuple[Numbers, Numbers]:
        return -theta - phi * np.abs(theta) / weight, 1.0 * phi

    def losses(phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return phi * theta + phi**2 * theta.abs() / (2 * weight), -phi * theta

    return DiracGAN("GAN-QP", field, losses)


def instance_noise(deviation: float = 1.0, nodes: int = 64) -> DiracGAN:
    """The GAN with Gaussian noise on real and generated samples, averaged by Gauss–Hermite quadrature.

    Parameters
    ----------
    deviation
        s, of the noise.
    nodes
        Of the quadrature.
    """
    check_number("deviation", deviation)
    check_number("nodes", nodes, positive=True, whole=True)
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    noise, weights = deviation * points, weights / weights.sum()

    def field(phi: Numbers, theta: Numbers) -> tuple[Numbers, Numbers]:
        phi, theta = np.asarray(phi)[..., None], np.asarray(theta)[..., None]
        real = noise * _sigmoid(-phi * noise)
        slope = _sigmoid(phi * (theta + noise))
        return ((real - (theta + noise) * slope) * weights).sum(-1), (phi * slope * weights).sum(-1)

    def losses(phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        drawn, mean = torch.from_numpy(noise), partial(torch.dot, torch.from_numpy(weights))
        fake = mean(softplus(phi * (theta + drawn)))
        return mean(softplus(-phi * drawn)) + fake, -fake

    return DiracGAN("instance noise", field, losses)


def r1(weight: float = 1.0) -> DiracGAN:
    """The GAN with the R1 penalty (γ/2)‖∇D‖² at the real sample.

    Parameters
    ----------
    weight
        γ: the eigenvalues are −γ/2 ± √(γ²/4 − 1/4).
    """
    check_number("weight", weight)
    plain = gan()

    def field(phi: Numbers, theta: Numbers) -> tuple[Numbers, Numbers]:
        of_phi, of_theta = plain.field(phi, theta)
        return of_phi - weight * phi, of_theta

    def losses(phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        of_discriminator, of_generator = plain.losses(phi, theta)
        return of_discriminator + weight / 2 * phi**2, of_generator

    return DiracGAN(f"R1, γ = {weight:g}", field, losses)


def consensus(weight: float = 1.0) -> DiracGAN:
    """Consensus optimization: both players also make (γ/2)‖v‖² smaller, v the field of the GAN.

    It converges from nearby. Far out, where the discriminator saturates, ‖v‖ is small too, and steps may lead there.

    Parameters
    ----------
    weight
        γ: the eigenvalues are −γ/4 ± i/2.
    """
    check_number("weight", weight)
    plain = gan()

    def field(phi: Numbers, theta: Numbers) -> tuple[Numbers, Numbers]:
        of_phi, of_theta = plain.field(phi, theta)
        slope = _sigmoid(phi * theta)  # ‖v‖² = σ²(φθ) (φ² + θ²)
        curved = slope**2 * (1 - slope) * (phi**2 + theta**2)
        return (
            of_phi - weight * (curved * theta + slope**2 * phi),
            of_theta - weight * (curved * phi + slope**2 * theta),
        )

    def losses(phi: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        of_discriminator, of_generator = plain.losses(phi, theta)
        (of_phi,) = torch.autograd.grad(of_discriminator, phi, create_graph=True)
        (of_theta,) = torch.autograd.grad(of_generator, theta, create_graph=True)
        penalty = weight / 2 * (of_phi**2 + of_theta**2)
        return of_discriminator + penalty, of_generator + penalty

    return DiracGAN("consensus", field, losses)


def variants() -> tuple[DiracGAN, ...]:
    """All variants, with the weights that the documentation uses."""
    return (
        gan(),
        non_saturating(),
        wgan("clipped"),
        wgan("spectral"),
        wgan_gp(0.0),
        wgan_gp(1.0),
        gan_qp(),
        instance_noise(),
        r1(0.3),
        r1(1.0),
        r1(1.5),
        consensus(),
    )


@dataclass(frozen=True)
class EigenvalueRow:
    """Eigenvalues of a variant, and the spectral radius of its steps.

    Attributes
    ----------
    name
        Of the variant.
    flow
        (2,) eigenvalues of the vector field; empty without an equilibrium.
    radii
        Spectral radius by the name of the updates, see `UPDATES`; empty without an equilibrium.
    """

    name: str
    flow: np.ndarray
    radii: Mapping[str, float]


def eigenvalue_table(rate: float, chosen: Sequence[DiracGAN] | None = None) -> list[EigenvalueRow]:
    """Eigenvalues of variants, and of their steps at a rate under all `UPDATES`.

    Parameters
    ----------
    rate
        h, of both players.
    chosen
        The variants; all by default.
    """
    rows = []
    for variant in variants() if chosen is None else chosen:
        found = {name: variant.stability(rate, updates) for name, updates in UPDATES.items()}
        known = {name: one for name, one in found.items() if one is not None}
        flow = known["simultaneous"].flow if known else np.empty(0, complex)
        rows.append(EigenvalueRow(variant.name, flow, {name: one.radius for name, one in known.items()}))
    return rows
