"""`pathkernel prune` and `pathkernel label-next`: ids out, from a store alone and the objects of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs_on_disk import recorded_on_disk, samples

import pathkernel as pk
from pathkernel.cli import main as cli
from pathkernel.influence import active_learning, pruning


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subsets")
    generator = torch.Generator().manual_seed(0)
    X, y = samples(24, generator)
    trajectory = recorded_on_disk(folder, X, y, batch_size=4)
    candidates = torch.randn(9, 4, generator=generator)
    np.save(folder / "candidates.npy", candidates.numpy())
    kept = pk.influence.prune(trajectory, 0.25)
    chosen = pk.influence.label_next(trajectory, candidates, 3)
    np.savez(folder / "kept.npz", ids=kept.ids, left_out=kept.left_out, weights=kept.weights, y=y.numpy())
    np.savez(folder / "chosen.npz", ids=chosen.ids, score=chosen.score, predictions=chosen.predictions)
    return folder


def objects(run: Path) -> list[str]:
    return [str(run / "store"), "--model", f"{run}/train.py:make", "--data", str(run / "train.npz"), "--quiet"]


def call(command: str, run: Path, *arguments: str) -> dict[str, Any]:
    where = str(run / "numbers.json")
    assert cli.main([command, *objects(run), *arguments, "--json", where]) == 0
    return json.loads(Path(where).read_text())


def test_prune(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, arrays = np.load(run / "kept.npz"), tmp_path / "kept.npz"
    numbers = call("prune", run, "--keep", "0.25", "--output", str(arrays), "--store", str(tmp_path / "kernel"))
    assert numbers["ids"] == expected["ids"].tolist() and numbers["left_out"] == expected["left_out"].tolist()
    assert (numbers["samples"], numbers["kept"], numbers["criterion"]) == (24, 6, "gradient_herding")
    labels = expected["y"]
    for row in numbers["classes"]:
        assert row["samples"] == (labels == row["label"]).sum()
        assert row["kept"] == (labels[expected["ids"]] == row["label"]).sum()
    found = np.load(arrays)
    assert all((found[name] == expected[name]).all() for name in ("ids", "left_out", "weights"))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "6 of 24 training samples are kept, by 'gradient_herding'"
    assert said[1] == f"kept, the most needed first: {', '.join(map(str, expected['ids']))}"
    assert (tmp_path / "kernel" / "part-0").is_dir()
    assert call("prune", run, "--keep", "6")["ids"] == numbers["ids"]
    assert call("prune", run, "--keep", "6", "--criterion", "final_loss")["criterion"] == "final_loss"


def test_label_next(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, arrays = np.load(run / "chosen.npz"), tmp_path / "chosen.npz"
    candidates = ["--candidates", str(run / "candidates.npy"), "--count", "3"]
    numbers = call("label-next", run, *candidates, "--output", str(arrays))
    assert [row["candidate"] for row in numbers["label_next"]] == expected["ids"].tolist()
    assert [row["prediction"] for row in numbers["label_next"]] == expected["predictions"][expected["ids"]].tolist()
    np.testing.assert_allclose(
        [row["score"] for row in numbers["label_next"]], expected["score"][expected["ids"]], rtol=1e-5
    )
    assert (numbers["candidates"], numbers["criterion"]) == (9, "experimental_design")
    assert (np.load(arrays)["ids"] == expected["ids"]).all()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "3 of 9 candidates, the first to label first, by 'experimental_design'"
    assert said[1].startswith(f"   1. candidate {expected['ids'][0]}: the network says ")
    assert call("label-next", run, *candidates, "--criterion", "margin")["criterion"] == "margin"


@pytest.mark.parametrize("command, criteria", [("prune", pruning.CRITERIA), ("label-next", active_learning.CRITERIA)])
def test_commands_know_the_criteria_of_the_library(command: str, criteria: tuple[str, ...]) -> None:
    own = ["--candidates", "new.npy"] if command == "label-next" else []
    for name in criteria:
        given = [command, "run", "--model", "m:make", "--data", "d.npz", *own, "--criterion", name]
        assert cli.parser().parse_args(given).criterion == name


@pytest.mark.parametrize(
    "command, arguments, said",
    [
        ("prune", ["--keep", "half"], "`--keep half` was given. It is the part"),
        ("prune", ["--keep", "25"], "`keep=25` was given for 24 training samples"),
        ("label-next", ["--candidates", "missing.npy"], "Samples were asked of 'missing.npy'"),
        ("label-next", ["--candidates", "CANDIDATES", "--count", "10"], "`count=10` was given for 9 candidates"),
    ],
)
def test_refusals(command: str, arguments: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [argument.replace("CANDIDATES", str(run / "candidates.npy")) for argument in arguments]
    assert cli.main([command, *objects(run), *given]) == 2
    assert said in capsys.readouterr().err
