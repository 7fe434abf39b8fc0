"""Rows of `dynamics.py` about two players: the Dirac GAN against closed forms, and a real small GAN as exact sums."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from _dynamics_rows import Row
from torch.func import functional_call

from pathkernel.cli.game import EXAMPLES, play
from pathkernel.dynamics import dirac_gan
from pathkernel.dynamics.dirac_gan import UPDATES, DiracGAN
from pathkernel.reference.two_players import alternating_eigenvalues, flow_eigenvalues, simultaneous_eigenvalues

RATE = 0.2
CLOSED = {
    "GAN": (0.0, 0.5, 0.0),
    "non-saturating": (0.0, 0.5, 0.0),
    "WGAN, clipped": (0.0, 1.0, 0.0),
    "WGAN-GP, centre 0": (0.5, 1.0, 0.0),
    "GAN-QP": (0.0, 1.0, 0.0),
    "instance noise": (0.5, 0.5, 0.0),
    "R1, γ = 0.3": (0.3, 0.5, 0.0),
    "R1, γ = 1": (1.0, 0.5, 0.0),
    "R1, γ = 1.5": (1.5, 0.5, 0.0),
    "consensus": (0.25, 0.5, 0.25),
}
"""Damping of the discriminator, frequency, and damping of the generator, by hand."""

RESIDUAL = {torch.float64: 1e-10, torch.float32: 1e-4}


def rows(quick: bool) -> Iterator[Row]:
    """Every number of the games; ``quick`` for fewer rounds of the real GANs."""
    variants = {variant.name: variant for variant in dirac_gan.variants()}
    yield from eigenvalues(variants)
    yield from motion(variants)
    for name, rounds in (("gaussians", 10 if quick else 60), ("digits", 4 if quick else 24)):
        for dtype in RESIDUAL:
            yield from players(name, rounds, dtype)


def eigenvalues(variants: dict[str, DiracGAN]) -> Iterator[Row]:
    for name, (damping, frequency, of_generator) in CLOSED.items():
        for updates, steps in UPDATES.items():
            report = variants[name].stability(RATE, steps)
            assert report is not None
            if updates == "simultaneous":
                flow = flow_eigenvalues(damping, frequency, of_generator)
                yield Row(f"Dirac GAN, {name}: eigenvalues of the flow, apart", apart(report.flow, flow), 0, 1e-6)
                closed = simultaneous_eigenvalues(RATE, damping, frequency, of_generator)
            else:
                repeats = len(steps) - 1
                closed = alternating_eigenvalues(RATE, damping, frequency, of_generator, repeats)
            yield Row(f"Dirac GAN, {name}: eigenvalues of steps, {updates}, apart", apart(report.map, closed), 0, 1e-6)


def motion(variants: dict[str, DiracGAN]) -> Iterator[Row]:
    plain = variants["GAN"]
    times = np.linspace(0, 60, 1201)
    path = plain.flow((0.05, 0.0), times)
    yield Row("Dirac GAN, GAN: period where it is linear", period(times, path[:, 0]), 4 * np.pi, 0.01 * 4 * np.pi)
    drift = np.abs(np.hypot(*plain.flow((1.0, 0.5), times).T) - np.hypot(1.0, 0.5)).max()
    yield Row("Dirac GAN, GAN: change of the radius under the flow", drift, 0, 1e-6)
    ends = np.hypot(*plain.trajectory((1e-6, 0.0), RATE, 100)[[0, -1]].T)
    expected = np.sqrt(1 + RATE**2 / 4) ** 100
    yield Row("Dirac GAN, GAN: growth of the radius in 100 steps at once", ends[1] / ends[0], expected, 1e-6)
    radius = max(abs(value) for value in plain.stability(4.0, "alternating").map)  # type: ignore[union-attr]
    yield Row("Dirac GAN, GAN: spectral radius of steps in turns at the rate 4", radius, 1, 1e-6)
    for name, first, last, exponent in (("non-saturating", 300, 3000, -0.5), ("GAN-QP", 100, 1000, -1.0)):
        yield Row(
            f"Dirac GAN, {name}: exponent of the decay of the radius",
            decay(variants[name], first, last),
            exponent,
            0.05,
        )
    for updates, steps in UPDATES.items():
        paths = {c: dirac_gan.wgan_gp(c).trajectory((0.5, 0.5), 0.02, 4000, steps)[-2000:] for c in (0.0, 1.0)}
        farthest = np.hypot(*paths[0.0].T).max()
        yield Row(f"Dirac GAN, WGAN-GP, centre 0: distance at the end, {updates}", farthest, 0, 1e-4)
        # It neither ends at the equilibrium nor leaves: between half and one and a half of the flow's 4/π.
        radius = np.hypot(*paths[1.0].T).mean()
        yield Row(f"Dirac GAN, WGAN-GP, centre 1: radius of its circle, {updates}", radius, 4 / np.pi, 2 / np.pi)
        turned = turns(paths[1.0])
        yield Row(f"Dirac GAN, WGAN-GP, centre 1: is circling at the end, {updates}", float(turned > 5), 1, 0)
    circle = dirac_gan.wgan_gp(1.0, weight=0.05).flow((1.0, 0.0), np.linspace(0, 300, 3001), 1e-8)[2000:]
    yield Row(
        "Dirac GAN, WGAN-GP, centre 1: radius of its circle, flow, γ = 0.05",
        np.hypot(*circle.T).mean(),
        4 / np.pi,
        0.01,
    )


def players(name: str, rounds: int, dtype: torch.dtype) -> Iterator[Row]:
    played = play(EXAMPLES[name], rounds, seed=0, dtype=dtype)
    label = f"GAN of {name}, {str(dtype).removeprefix('torch.')}"
    for player, why in played.explained().items():
        yield Row(f"{label}: residual of the {player}", why.relative_residual, 0, RESIDUAL[dtype])
        yield Row(f"{label}: split error of the {player}", why.split_error, 0, RESIDUAL[dtype])
    game, origins = played.game, played.game.origins("D")["generated"]
    fakes, largest = game.samples("D", "generated"), 0.0
    for step in range(rounds):  # a batch is made again as a whole: BatchNorm couples its samples
        own = origins.made_at == step
        theta = dict(game.trajectory("G").parameters(step))
        with torch.no_grad():
            again = functional_call(played.G.train(), theta, (origins.latents[own],))
        largest = max(largest, float((again - fakes[own]).abs().max()))
    yield Row(f"{label}: fakes made again of their latents at their time, apart", largest, 0, RESIDUAL[dtype])


def apart(found: np.ndarray, closed: tuple[complex, complex]) -> float:
    """Distance of two pairs of eigenvalues, whatever their order."""
    expected = np.asarray(closed)
    return float(min(np.abs(found - expected).max(), np.abs(found[::-1] - expected).max()))


def period(times: np.ndarray, values: np.ndarray) -> float:
    """Mean time from one rise through zero to the next."""
    up = np.flatnonzero((values[:-1] < 0) & (values[1:] >= 0))
    at = times[up] - values[up] * (times[up + 1] - times[up]) / (values[up + 1] - values[up])
    return float(np.diff(at).mean())


def decay(variant: DiracGAN, first: float, last: float) -> float:
    """Exponent of the radius as a power of time."""
    times = np.concatenate([[0.0], np.geomspace(first, last, 60)])
    radius = np.hypot(*variant.flow((1.0, 0.0), times, 1e-7).T)[1:]
    return float(np.polyfit(np.log(times[1:]), np.log(radius), 1)[0])


def turns(path: np.ndarray) -> float:
    """How many times a path goes round the origin."""
    angles = np.unwrap(np.arctan2(path[:, 1], path[:, 0]))
    return float(abs(angles[-1] - angles[0]) / (2 * np.pi))
