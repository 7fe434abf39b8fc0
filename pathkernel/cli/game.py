"""The command ``pathkernel game``: two players on built-in examples, with a picture."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from pathkernel.cli.places import check_picture
from pathkernel.dynamics.dirac_gan import UPDATES, eigenvalue_table
from pathkernel.dynamics.game import GameRecorder
from pathkernel.dynamics.local_stability import Stability, stability
from pathkernel.errors import InputError, NonFiniteStepError, is_number
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.runtime.extras import require_extra

Result = tuple[int, dict[str, Any], str]
"""Exit code, numbers, and text."""

LATENT, BATCH = 8, 32


@dataclass(frozen=True)
class Example:
    """A game that the command plays.

    Attributes
    ----------
    discriminator, generator
        Functions that make the networks.
    data
        Function that makes the real samples.
    noise
        Shape of a latent.
    penalty
        Weight γ of R1.
    rate
        Of Adam, for both players.
    rounds
        Steps of each, unless the user says otherwise.
    """

    discriminator: Callable[[], nn.Module]
    generator: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Tensor]
    noise: tuple[int, ...]
    penalty: float
    rate: float
    rounds: int


@dataclass(frozen=True)
class Played:
    """A game that was played, with its networks and a few samples.

    Attributes
    ----------
    game
        Its recorder.
    D, G
        The networks, in evaluation mode.
    real
        Real samples, in the order of their ids.
    latents
        Some that the generator was not trained on.
    output
        Which output of the generator training has changed most, for the first of these.
    """

    game: GameRecorder
    D: nn.Module
    G: nn.Module
    real: Tensor
    latents: Tensor
    output: int

    def explained(self) -> dict[str, Attributions]:
        """Both players and the averaged generator as exact sums, for one sample each."""
        return {
            "discriminator": self.game.machine("D").explain(self.real[:1]),
            "generator": self.game.machine("G").explain(self.latents[:1], outputs=self.output),
            "averaged generator": self.game.machine("G", average="ema").explain(self.latents[:1], outputs=self.output),
        }


def eight_gaussians(generator: torch.Generator) -> Tensor:
    """512 points (n, 2) of eight Gaussians around a circle."""
    which = torch.arange(512) % 8
    angle = which * (2 * math.pi / 8)
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centres + 0.1 * torch.randn(512, 2, generator=generator)


def digits(generator: torch.Generator) -> Tensor:
    """512 of scikit-learn's handwritten digits, (n, 1, 8, 8) in [-1, 1]."""
    return torch.tensor(load_digits().images[:512] / 8 - 1, dtype=torch.float32)[:, None]


def points_player(inputs: int, outputs: int) -> nn.Module:
    """A network of points in the plane."""
    return nn.Sequential(nn.Linear(inputs, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, outputs))


def convolutional_discriminator() -> nn.Module:
    """The discriminator of a small DCGAN."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 1, 2, 1, 0, bias=False),
        nn.Flatten(),
    )


def convolutional_generator() -> nn.Module:
    """The generator of a small DCGAN."""
    return nn.Sequential(
        nn.ConvTranspose2d(LATENT, 16, 2, 1, 0, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


DIRAC_ROUNDS = 250
"""Rounds of the Dirac GAN, unless the user says otherwise."""

EXAMPLES = {
    "gaussians": Example(
        discriminator=lambda: points_player(2, 1),
        generator=lambda: points_player(LATENT, 2),
        data=eight_gaussians,
        noise=(LATENT,),
        penalty=0.1,
        rate=2e-3,
        rounds=200,
    ),
    "digits": Example(
        discriminator=convolutional_discriminator,
        generator=convolutional_generator,
        data=digits,
        noise=(LATENT, 1, 1),
        penalty=0.1,
        rate=2e-3,
        rounds=80,
    ),
}


def play(
    example: Example, rounds: int, seed: int, dtype: torch.dtype = torch.float32, progress: bool = False
) -> Played:
    """Train a small GAN by the ordinary alternating loop, with R1 and an average of the generator, recorded.

    Parameters
    ----------
    example
        Networks and data.
    rounds
        Steps of each player.
    seed
        Of weights, batches and latents; torch's global generator is put back.
    dtype
        Of everything.
    progress
        Show a progress bar.

    Returns
    -------
    Played
        A game that diverges is one of the rounds before.
    """
    draws = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        D, G = example.discriminator().to(dtype), example.generator().to(dtype)
    real, untrained = example.data(draws).to(dtype), copy.deepcopy(G).eval()
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), example.rate, betas=(0.5, 0.999)) for net in (D, G))
    ema = AveragedModel(G, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
    game = GameRecorder(
        {"D": (D, opt_d), "G": (G, opt_g)}, data={"D": (real, torch.ones(len(real)))}, averages={"G": {"ema": ema}}
    )
    batches = torch.stack([torch.randint(len(real), (BATCH,), generator=draws) for _ in range(rounds)])
    try:
        with game:
            for ids in tqdm(batches, desc="game", disable=not progress):
                game["D"].announce(ids)
                x = real[ids].requires_grad_(True)
                opt_d.zero_grad()
                z = D(x)
                softplus(-z).mean().backward(retain_graph=True)
                with game["D"].channel("r1"):
                    (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
                    (example.penalty / 2 * slope.square().flatten(1).sum(1).mean()).backward()
                with game.sources(D="generated", G="noise"):
                    fake = G(torch.randn(BATCH, *example.noise, generator=draws).to(dtype))
                    softplus(D(fake.detach())).mean().backward()
                    opt_d.step()
                    opt_g.zero_grad()
                    softplus(-D(fake)).mean().backward()
                    opt_g.step()
                ema.update_parameters(G)
    except NonFiniteStepError as error:
        if not game.clock.taken("G"):
            raise
        tqdm.write(f"{error} What follows is of the rounds before.")
    latents = torch.randn(BATCH, *example.noise, generator=draws).to(dtype)
    D.eval(), G.eval()
    with torch.no_grad():
        changed = int((G(latents[:1]) - untrained(latents[:1])).abs().argmax())
    return Played(game, D, G, real, latents, changed)


def stability_of(played: Played, rate: float, updates: str = "alternating") -> Stability:
    """Where the players of a game stand: the outermost eigenvalues, for plain gradient steps on a batch."""
    x, z = played.real[:BATCH], played.latents
    losses: dict[str, Callable[..., Tensor]] = {
        "D": lambda D, G: softplus(-D(x)).mean() + softplus(D(G(z))).mean(),
        "G": lambda D, G: softplus(-D(G(z))).mean(),
    }
    return stability({"D": played.D, "G": played.G}, losses, rate, updates=updates, count=4)


# -- the command -----------------------------------------------------------------------------------------------------


def game(arguments: argparse.Namespace) -> Result:
    """Play a built-in game, print what it measured, and write its picture."""
    known = EXAMPLES.get(arguments.example)
    usual = DIRAC_ROUNDS if known is None else known.rounds
    rounds = usual if arguments.rounds is None else arguments.rounds
    if rounds < 1:
        raise InputError(f"`--rounds {rounds}` was given", "A game has at least one round", "Write `--rounds 100`")
    if not (is_number(arguments.rate) and arguments.rate >= 0):
        raise InputError(
            f"`--rate {arguments.rate}` was given", "A rate is a finite number, 0 or more", "Write `--rate 0.2`"
        )
    output = arguments.output or Path(f"game-{arguments.example}.png")
    check_picture(output, "--output")
    require_extra("plot", "The picture of `pathkernel game`", "matplotlib")
    numbers, text, figure = (dirac if known is None else trained)(arguments, rounds)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)
    return 0, numbers, f"{text}\npicture: {output}"


def dirac(arguments: argparse.Namespace, rounds: int) -> tuple[dict[str, Any], str, Any]:
    """The variants of the Dirac GAN: eigenvalues, and trajectories under three kinds of updates."""
    from pathkernel.plotting.vector_field import DiracGANDisplay  # drawing needs matplotlib

    numbers: dict[str, Any] = {"rate": arguments.rate}
    heads = "eigenvalues of the flow", f"spectral radius of a round, at a rate of {arguments.rate:g}"
    lines = [f"{'':<18} {heads[0]:<36} {heads[1]}"]
    lines.append(" " * 56 + " ".join(f"{name:>14}" for name in UPDATES))
    for row in eigenvalue_table(arguments.rate):
        if not row.radii:
            lines.append(f"{row.name:<18} no equilibrium with derivatives")
            continue
        flow = ", ".join(f"{value.real:+.4f}{value.imag:+.4f}i" for value in row.flow)
        lines.append(f"{row.name:<18} {flow:<36} " + " ".join(f"{radius:14.6f}" for radius in row.radii.values()))
        for place, value in enumerate(row.flow):
            numbers[f"{row.name}.eigenvalue_{place}.real"] = float(value.real)
            numbers[f"{row.name}.eigenvalue_{place}.imaginary"] = float(value.imag)
        numbers |= {f"{row.name}.radius.{name}": radius for name, radius in row.radii.items()}
    figure = DiracGANDisplay.from_variants(rate=arguments.rate, steps=rounds).plot().figure_
    return numbers, "\n".join(lines), figure


def trained(arguments: argparse.Namespace, rounds: int) -> tuple[dict[str, Any], str, Any]:
    """A small GAN, both of its players as exact kernel machines."""
    example = EXAMPLES[arguments.example]
    played = play(example, rounds, arguments.seed, progress=not arguments.quiet)
    explained = played.explained()
    numbers: dict[str, Any] = {f"steps.{name}": played.game.clock.taken(name) for name in played.game.players}
    lines = [repr(played.game)]
    for name, why in explained.items():
        numbers |= {f"{name}.residual": why.relative_residual, f"{name}.split_error": why.split_error}
        lines.append(f"{name:<19} residual {why.relative_residual:.1e}, split error {why.split_error:.1e}")
    why = explained["discriminator"]
    columns = why.sources["generated"]
    parts = {
        "untrained": float(why.initial[0]),
        "real samples": float(why.shares[0, : columns.start].sum()),
        "generated samples": float(why.shares[0, columns].sum()),
        **{name: float(values[0]) for name, values in why.channels.items() if name != "initial"},
    }
    numbers |= {f"discriminator.{name}": value for name, value in parts.items()}
    numbers["discriminator.output"] = float(why.output[0])
    account = ", ".join(f"{name} {value:+.4g}" for name, value in parts.items())
    lines.append(f"D of a real sample: {float(why.output[0]):+.4g} = {account}")
    report = stability_of(played, arguments.rate)
    numbers |= {"stability.abscissa": report.abscissa, "stability.radius": report.radius, "speed": report.speed}
    lines.append(f"{report!r} at a rate of {arguments.rate:g}")
    return numbers, "\n".join(lines), picture_of(arguments.example, played, why)


def picture_of(name: str, played: Played, why: Attributions) -> Any:
    """Picture of the samples that moved the discriminator's output for the first real one."""
    from pathkernel.plotting.player import PlayerViewDisplay  # drawing needs matplotlib
    from pathkernel.plotting.share_map import ShareMapDisplay

    fakes, title = played.game.samples("D", "generated"), "The discriminator's view of a real sample"
    if name == "digits":
        origins = played.game.origins("D")["generated"]
        view = PlayerViewDisplay.from_attributions(
            why, 0, played.real, fakes, origins, query_image=played.real[0], title=title
        )
        return view.plot(cmap="gray_r").figure_
    columns = why.sources["generated"]
    shares = np.asarray(why.shares[0])
    groups = {"real": (played.real, shares[: columns.start]), "generated": (fakes, shares[columns])}
    return ShareMapDisplay(groups, played.real[0], f"{title} (star)").plot().figure_
