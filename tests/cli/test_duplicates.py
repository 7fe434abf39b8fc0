"""`pathkernel duplicates`: near-duplicates from a store alone and the objects of the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs_on_disk import recorded_on_disk

import pathkernel as pk
from pathkernel.cli import main as cli
from pathkernel.errors import PathKernelError
from pathkernel.influence import near_duplicates
from pathkernel.plotting import NearDuplicatesDisplay


def samples() -> torch.Tensor:
    X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    X[40], X[41] = X[3] + 1e-3, X[5]
    return X


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("duplicates")
    X, y = samples(), torch.arange(50) % 3  # so that 3 and 40 disagree, and 5 and 41 do not
    y[40], y[41] = y[3] + 1, y[5]
    trajectory = recorded_on_disk(folder, X, y, batch_size=10)
    test = torch.randn(120, 4, generator=torch.Generator().manual_seed(1))
    test[8], test[9] = X[20], X[21] + 1e-3
    np.savez(folder / "test.npz", X=test.numpy(), y=np.zeros(120, dtype=int))
    np.save(folder / "test.npy", test.numpy())
    kernels = {
        "path": pk.PathKernel(trajectory, steps=5),
        "initial": pk.TangentKernel(trajectory.model, trajectory.parameters(0)),
        "final": pk.TangentKernel(trajectory.model),
        "inputs": lambda A, B=None: np.asarray(A) @ np.asarray(A if B is None else B).T,
    }
    expected = {f"{name}.{i}": near_duplicates(k, X, other) for name, k in kernels.items() for i, other in
                enumerate((None, test))}  # fmt: skip
    np.savez(folder / "expected.npz", **{f"{key}.{what}": getattr(found, what) for key, found in expected.items()
             for what in ("pairs", "cosine", "p_value")})  # fmt: skip
    return folder


def call(run: Path, *arguments: str) -> dict[str, Any]:
    objects = ["--model", f"{run}/train.py:make", "--data", str(run / "train.npz"), "--quiet"]
    where = str(run / "numbers.json")
    assert cli.main(["duplicates", str(run / "store"), *objects, *arguments, "--json", where]) == 0
    return json.loads(Path(where).read_text())


def same(numbers: dict[str, Any], run: Path, key: str) -> None:
    expected = np.load(run / "expected.npz")
    rows = numbers["pairs"]
    assert [[row["sample"], row.get("other", row.get("test_sample"))] for row in rows] == expected[
        f"{key}.pairs"
    ].tolist()
    np.testing.assert_allclose([row["cosine"] for row in rows], expected[f"{key}.cosine"], atol=1e-6)
    assert all(row["p_value"] < 1e-3 for row in rows)


@pytest.mark.parametrize("kernel", ["path", "initial", "final", "inputs"])
def test_within_the_training_samples(
    kernel: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, arrays = tmp_path / "pairs.png", tmp_path / "pairs.npz"
    numbers = call(run, "--kernel", kernel, "--picture", str(picture), "--output", str(arrays))
    same(numbers, run, f"{kernel}.0")
    assert (numbers["found"], numbers["identical"], numbers["conflicts"], numbers["tested"]) == (2, 1, 1, 49)
    assert numbers["redundant"] == [40, 41] and numbers["kernel"] == kernel
    assert [(row["label"], row["other_label"], row["labels_disagree"]) for row in numbers["pairs"]] == [
        (2, 2, False),
        (0, 1, True),
    ]
    assert picture.stat().st_size > 1000 and np.load(arrays)["pairs"].tolist() == [[5, 41], [3, 40]]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        f"2 pairs of near-duplicates among 50 training samples under the {kernel} kernel, 1 of th"
    )
    assert said[1] == "   1. 5 and 41: identical; label 2" and said[2].endswith("; labels 0 and 1 disagree")
    assert said[3] == "without 2 of the training samples none of these pairs is left"


@pytest.mark.parametrize("name", ["test.npz", "test.npy"])
def test_between_training_and_test_samples(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "pairs.png"
    numbers = call(run, "--test", str(run / name), "--picture", str(picture), "--top", "1", "--steps", "0")
    assert (numbers["found"], numbers["test_samples"], numbers["redundant"]) == (2, 120, [8, 9])
    assert numbers["conflicts"] == (1 if name == "test.npz" else None)  # 20 has label 2, all test samples have 0
    assert len(numbers["pairs"]) == 1 and picture.exists()
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("   1. 20 and test 8: identical") and len(said) == 3
    assert said[2] == "2 of 120 test samples (1.7 %) have a near-duplicate in training"
    same(call(run, "--test", str(run / name)), run, "path.1")


def test_nothing_is_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "far.npy", torch.randn(120, 4, generator=torch.Generator().manual_seed(7)).numpy())
    picture = tmp_path / "pairs.png"
    numbers = call(run, "--test", str(tmp_path / "far.npy"), "--picture", str(picture))
    assert numbers["found"] == 0 and numbers["picture"] is None and not picture.exists()
    assert len(capsys.readouterr().out.splitlines()) == 1


REFUSED = {
    "no pairs": (("--top", "0"), "`--top=0` was given"),
    "no such file": (("--test", "nowhere.npz"), "Samples were asked of 'nowhere.npz'"),
    "no steps of the path": (("--steps", "-1"), "-1"),
    "few test samples": (("--test", "few.npy"), "10 other samples are tested"),
    "few test samples, and what to write": (
        ("--test", "few.npy"),
        "`pathkernel duplicates` prints it without `--test`, and takes it as `--dimension`",
    ),
    "a rate of one": (("--false-discovery-rate", "1"), "between 0 and 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, said = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    np.save("few.npy", samples()[:10] + 1)
    objects = ["--model", f"{run}/train.py:make", "--data", str(run / "train.npz"), "--quiet"]
    assert cli.main(["duplicates", str(run / "store"), *objects, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_cosine_of_samples_of_several_arrays() -> None:
    from pathkernel.cli.duplicates import _of_inputs

    with pytest.raises(PathKernelError, match=r"samples that are a tuple of several arrays.*`--kernel path`"):
        _of_inputs((torch.ones(2), torch.ones(2)))


def test_a_picture_of_nothing_and_without_the_others() -> None:
    def linear(A: np.ndarray, B: np.ndarray | None = None) -> np.ndarray:
        return A @ (A if B is None else B).T

    X, images = samples().numpy(), np.zeros((50, 2, 2))
    none, across = near_duplicates(linear, X[:40]), near_duplicates(linear, X, X[:4])
    with pytest.raises(PathKernelError, match=r"asked of 0 pairs of near-duplicates.*`k=12`"):
        NearDuplicatesDisplay.from_near_duplicates(none, images)
    with pytest.raises(PathKernelError, match=r"images of the training samples alone.*other_images"):
        NearDuplicatesDisplay.from_near_duplicates(across, images)
    assert len(NearDuplicatesDisplay.from_near_duplicates(across, images, images).plot().axes_) == 4
    targets = near_duplicates(linear, X, labels=np.ones((50, 2)))
    display = NearDuplicatesDisplay.from_near_duplicates(targets, images, k=1)
    assert display.pairs[0][1].startswith("#5: 1, 1\n")
