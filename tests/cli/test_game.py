"""The command of built-in games: what it prints, its picture, and its numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from pathkernel.cli import game
from pathkernel.cli import main as cli
from pathkernel.errors import NonFiniteStepError

mpl.use("Agg")


def called(folder: Path, *arguments: str) -> dict[str, Any]:
    numbers = folder / "numbers.json"
    assert (
        cli.main(["game", *arguments, "--quiet", "--output", str(folder / "a" / "game.png"), "--json", str(numbers)])
        == 0
    )
    assert (folder / "a" / "game.png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads(numbers.read_text())
    return found


def test_the_dirac_gan_is_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = called(tmp_path, "--rounds", "5")
    assert numbers["R1, γ = 0.3.eigenvalue_0.imaginary"] == pytest.approx(0.477, abs=1e-3)
    assert numbers["GAN.radius.simultaneous"] == pytest.approx((1 + 0.2**2 / 4) ** 0.5)
    printed = capsys.readouterr().out
    assert "WGAN-GP, centre 1  no equilibrium with derivatives" in printed and "picture: " in printed
    assert f"{numbers['GAN.radius.alternating 5']:.6f}" in printed


@pytest.mark.parametrize("example", ["gaussians", pytest.param("digits", marks=pytest.mark.exhaustive)])
def test_a_small_gan_is_two_exact_sums(example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = called(tmp_path, example, "--rounds", "3", "--seed", "1")
    for player in ("discriminator", "generator", "averaged generator"):
        assert numbers[f"{player}.residual"] < 1e-4 and numbers[f"{player}.split_error"] < 1e-4
    assert numbers["steps.D"] == numbers["steps.G"] == 3
    parts = [name for name in numbers if name.startswith("discriminator.")]
    parts = [name for name in parts if name.split(".")[1] not in ("residual", "split_error", "output")]
    assert sum(numbers[name] for name in parts) == pytest.approx(numbers["discriminator.output"], abs=1e-4)
    assert "GameRecorder(D: 3 steps, G: 3 steps)" in capsys.readouterr().out


def test_a_game_that_diverges_is_one_of_the_rounds_before(capsys: pytest.CaptureFixture[str]) -> None:
    wild = replace(game.EXAMPLES["gaussians"], rate=1e12)
    played = game.play(wild, 4, seed=0)
    assert 1 <= played.game.clock.taken("G") < 4
    assert "What follows is of the rounds before" in capsys.readouterr().out
    with pytest.raises(NonFiniteStepError):
        game.play(replace(wild, rate=1e30), 4, seed=0)


def test_what_cannot_be_is_refused_before_anything_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["game", "--output", "game.txt"]) == 2
    assert "`--output game.txt` was given. Pictures end in .png, .svg, .pdf" in capsys.readouterr().err
    assert cli.main(["game", "--rounds", "0"]) == 2
    assert "`--rounds 0` was given" in capsys.readouterr().err
    for rate in ("nan", "-0.1"):
        assert cli.main(["game", "gaussians", "--quiet", f"--rate={rate}"]) == 2
        assert f"`--rate {rate}` was given. A rate is a finite number, 0 or more" in capsys.readouterr().err
