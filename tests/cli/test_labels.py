"""`pathkernel labels`: a ranked list with reasons, from a store alone and the objects of the training."""

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
from pathkernel.errors import PathKernelError
from pathkernel.influence.labels import label_quality
from pathkernel.plotting import DoubtfulLabelsDisplay


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    generator = torch.Generator().manual_seed(0)
    X, y = samples(24, generator)
    trajectory = recorded_on_disk(folder, X, y, batch_size=8, epochs=3)
    quality = label_quality(trajectory)
    why = pk.KernelMachine(trajectory).explain((X[quality.top(4)], y[quality.top(4)]), outputs="margin")
    np.savez(folder / "expected.npz", ids=quality.ids, score=quality.score, shares=why.shares, y=y.numpy())
    return folder


def call(run: Path, *arguments: str, command: str = "labels") -> dict[str, Any]:
    objects = ["--model", f"{run}/train.py:make", "--data", str(run / "train.npz"), "--quiet"]
    where = str(run / "numbers.json")
    assert cli.main([command, str(run / "store"), *objects, *arguments, "--json", where]) == 0
    return json.loads(Path(where).read_text())


@pytest.mark.parametrize("command", ["labels", "audit"])
def test_the_list(command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = np.load(run / "expected.npz")
    picture, arrays = tmp_path / "doubtful.png", tmp_path / "scores.npz"
    numbers = call(run, "--top", "4", "--picture", str(picture), "--output", str(arrays), command=command)
    assert [row["sample"] for row in numbers["labels"]] == expected["ids"][:4].tolist()
    for row, shares in zip(numbers["labels"], expected["shares"], strict=True):
        assert row["score"] == pytest.approx(expected["score"][row["sample"]])
        others = [i for i in np.argsort(shares) if i != row["sample"]][:3]
        assert [one["sample"] for one in row["against"]] == others
        assert [one["label"] for one in row["against"]] == expected["y"][others].tolist()
        np.testing.assert_allclose([one["share"] for one in row["against"]], shares[others], rtol=1e-4)
    assert picture.stat().st_size > 1000
    np.testing.assert_allclose(np.load(arrays)["score"], expected["score"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("4 of 24 labels, the most doubtful first, from 9 points of the path")
    assert said[1].startswith(f"   1. sample {expected['ids'][0]}: label ") and "pulled the other way by" in said[2]


def test_without_reasons(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = call(run, "--top", "2", "--reasons", "0", "--nodes", "3")
    assert [row["against"] for row in numbers["labels"]] == [[], []] and len(numbers["steps"]) == 3
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_more_than_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = ["--model", f"{run}/train.py:make", "--data", str(run / "train.npz"), "--quiet"]
    assert cli.main(["labels", str(run / "store"), *objects, "--top", "25"]) == 2
    assert "`--top 25` was given for 24 training samples" in capsys.readouterr().err


def test_a_picture_of_a_group_too_few() -> None:
    quality = pk.LabelQuality(*[np.arange(3.0)] * 4, "margin", np.arange(3), np.arange(3), (0,))
    with pytest.raises(PathKernelError, match=r"`against` has 1 groups of samples for 2.*`k=1`"):
        DoubtfulLabelsDisplay.from_quality(quality, np.zeros((3, 2, 2)), against=[[1]], k=2)
    display = DoubtfulLabelsDisplay.from_quality(quality, np.zeros((3, 2, 2)), k=2).plot()
    assert len(display.axes_) == 2


def test_samples_that_are_no_image() -> None:
    from pathkernel.cli.labels import _image

    with pytest.raises(PathKernelError, match=r"samples that are a tuple.*Leave `--picture` out"):
        _image((torch.ones(2), torch.ones(2)))
    assert _image(torch.ones(9)).shape == (3, 3) and _image(torch.ones(2, 5)).shape == (2, 5)
