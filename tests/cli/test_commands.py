"""The command line on stores: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pathkernel as pk
from pathkernel.cli import main as cli
from pathkernel.plotting.report import write_report

MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

def other():
    return nn.Linear(4, 3)

def broken():
    raise RuntimeError("inside")

def one():
    return 1
"""
OBJECTS = ("--model", "{run}/train.py:make", "--data", "{run}/train.npz")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recorded run, its data, queries, and the file that makes its network."""
    folder = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(24, 4, generator=generator), torch.randint(3, (24,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), store=folder / "store") as recorder:
        for _ in range(3):
            for x, target in recorder.batches(batch_size=8):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    np.savez(folder / "train.npz", X=X.numpy(), y=y.numpy())
    np.save(folder / "queries.npy", X[:5].numpy())
    (folder / "train.py").write_text(MODEL)
    (folder / "wrong.py").write_text("def (")
    machine, kernel = pk.KernelMachine(recorder.trajectory), pk.PathKernel(recorder.trajectory)
    shares, trained = machine.explain(X[:5]).shares, model[0].weight.detach()
    np.savez(folder / "expected.npz", shares=shares, K=kernel(X), trained=trained)
    return folder


def call(run: Path, *arguments: str, code: int = 0) -> dict:
    """The numbers of a command."""
    assert cli.main([*arguments, "--json", str(run / "numbers.json")]) == code
    return json.loads((run / "numbers.json").read_text())


def objects(run: Path) -> list[str]:
    return ["--model", f"{run}/train.py:make", "--data", str(run / "train.npz"), "--quiet"]


def test_info(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = call(run, "info", str(run / "store"))
    assert numbers["steps"] == 9 and numbers["ended"] and numbers["parameters"] == 51 and numbers["samples"] == 24
    assert "9 steps committed (ended)" in capsys.readouterr().out


def test_verify_finds_damage(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    assert call(run, "verify", str(run / "store")) == {"path": str(run / "store"), "steps": 9, "damage": []}
    copy = shutil.copytree(run / "store", tmp_path / "copy")
    chunks = [path for path in copy.rglob("*") if path.is_file() and "/c/" in str(path)]
    largest = max(chunks, key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1
    largest.write_bytes(raw)
    assert call(run, "verify", str(copy), code=1)["damage"]
    assert largest.name in capsys.readouterr().out


def test_export_of_weights(run: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    call(run, "export", str(run / "store"), str(tmp_path / "w.safetensors"), "--steps", "0,-1")
    call(run, "export", str(run / "store"), str(tmp_path / "w.npz"))
    few, every = load_file(tmp_path / "w.safetensors"), np.load(tmp_path / "w.npz")
    assert few["0.weight"].shape == (2, 6, 4) and every["0.weight"].shape == (10, 6, 4)
    assert few["steps"].tolist() == [0, 9] and every["steps"].tolist() == list(range(10))
    assert np.array_equal(few["0.weight"][0], every["0.weight"][0])
    assert np.array_equal(few["0.weight"][1], np.load(run / "expected.npz")["trained"])
    assert np.array_equal(every["0.weight"][-1], np.load(run / "expected.npz")["trained"])


class Stepper(nn.Linear):
    """A layer with a parameter under the name that the export gives to the points of the path."""

    def __init__(self) -> None:
        super().__init__(4, 1)
        self.steps = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.steps.sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exported_weights_are_the_recorded_ones_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        X, y = torch.randn(16, 4, dtype=dtype), torch.randn(16, 1, dtype=dtype)
        model = Stepper().to(dtype)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=1e-2), nn.MSELoss()
    with pk.KernelRecorder(model, optimizer, loss, (X, y), store=tmp_path / "store", audit_every=0) as recorder:
        for x, target in recorder.batches(batch_size=8):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    for name in ("w.safetensors", "w.npz"):
        assert cli.main(["export", str(tmp_path / "store"), str(tmp_path / name)]) == 0
    found, arrays = load_file(tmp_path / "w.safetensors"), np.load(tmp_path / "w.npz")
    assert found["steps_"].tolist() == arrays["steps_"].tolist() == [0, 1, 2]
    for name, p in model.named_parameters():
        assert found[name].dtype == dtype
        assert torch.equal(found[name][0], start[name]) and torch.equal(found[name][-1], p)
        assert torch.equal(torch.from_numpy(arrays[name]).to(dtype), found[name])


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_files_are_made_as_the_user_wants_new_files(run: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        for name in ("w.safetensors", "w.npz", "steps.csv"):
            call(run, "export", str(run / "store"), str(tmp_path / name))
        outputs = ["--output", str(tmp_path / "K"), "--json", str(tmp_path / "numbers.json")]
        assert cli.main(["gram", str(run / "store"), *objects(run), *outputs]) == 0
        write_report(tmp_path / "report.html", title="Digits")
    finally:
        os.umask(before)
    made = {place.name: oct(place.stat().st_mode & 0o777) for place in tmp_path.iterdir()}
    assert len(made) == 6 and set(made.values()) == {oct(0o666 & ~mask)}
    assert np.load(tmp_path / "K")["K"].shape == (24, 24)  # under the very name that was given


def test_the_package_runs_as_the_command_does(run: Path) -> None:
    called = subprocess.run(
        [sys.executable, "-m", "pathkernel", "info", str(run / "store")], capture_output=True, text=True, check=False
    )
    assert called.returncode == 0 and "9 steps committed" in called.stdout
    refused = subprocess.run(
        [sys.executable, "-m", "pathkernel", "info", str(run)], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and refused.stderr.startswith("pathkernel info:")


def test_export_of_steps(run: Path, tmp_path: Path) -> None:
    call(run, "export", str(run / "store"), str(tmp_path / "steps.csv"))
    rows = list(csv.DictReader((tmp_path / "steps.csv").open()))
    assert len(rows) == 9 and float(rows[0]["lr_0"]) == 1e-2 and json.loads(rows[1]["ids"]) == list(range(8, 16))


def test_export_to_parquet(run: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    call(run, "export", str(run / "store"), str(tmp_path / "steps.parquet"))
    assert len(pandas.read_parquet(tmp_path / "steps.parquet")) == 9


def test_plan(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = call(run, "plan", "85k", "10k")["levels"]
    full, keyframes = levels[0], levels[1]
    assert full["total_bytes"] > 10_000 * 3 * 85_000 * 4 - 1 and keyframes["total_bytes"] < full["total_bytes"] / 20
    assert "Keyframes(100)" in capsys.readouterr().out


def test_gram_is_that_of_the_library_and_is_kept(run: Path, tmp_path: Path) -> None:
    arguments = ["gram", str(run / "store"), *objects(run), "--store", str(tmp_path / "k"), "--output"]
    call(run, *arguments, str(tmp_path / "k.npz"))
    call(run, *arguments, str(tmp_path / "again.npz"))
    expected = np.load(run / "expected.npz")["K"]
    for name in ("k.npz", "again.npz"):
        assert np.array_equal(np.load(tmp_path / name)["K"], expected)


def test_explain_is_that_of_the_library_and_is_kept(run: Path, tmp_path: Path) -> None:
    arguments = ["explain", str(run / "store"), *objects(run), "--queries", str(run / "queries.npy"), "--top", "3"]
    numbers = call(run, *arguments, "--store", str(tmp_path / "why"), "--output", str(tmp_path / "why.npz"))
    expected = np.load(run / "expected.npz")["shares"]
    assert np.array_equal(np.load(tmp_path / "why.npz")["shares"], expected)
    assert [len(query["top"]) for query in numbers["queries"]] == [3] * 5
    largest = numbers["queries"][0]["top"][0]
    assert largest["share"] == expected[0, largest["sample"]] and abs(largest["share"]) == abs(expected[0]).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "{run}/nothing"], r"holds no store"),
        (["export", "{run}/store", "{run}/w.pickle"], r"ending tells the format.*safetensors"),
        (["export", "{run}/store", "{run}/w.npz", "--steps", "99"], r"Points \[99\].*points 0 to 9"),
        (["export", "{run}/store", "{run}/w.npz", "--memory", "1kB"], r"points of 51 numbers.*budget.*--steps"),
        (["plan", "many", "10"], r"size 'many'.*85k"),
        (["gram", "{run}/store", "--model", "nowhere:make", "--data", "x.npz"], r"'nowhere:make'.*train.py:make_model"),
        (["gram", "{run}/store", "--model", "{run}/train.py:make", "--data", "x.npz"], r"x.npz.*arrays.*savez"),
        (
            ["gram", "{run}/store", "--model", "{run}/train.py:other", "--data", "{run}/train.npz"],
            r"without `0.weight`.*architecture that was recorded",
        ),
        (["export", "{run}/store", "{run}/w.npz", "--steps", "0,a"], r"`--steps 0,a`.*whole numbers.*--steps 0,-1"),
        (["info", "{run}/store", "--json", "{run}"], r"`--json .*` was given, and `.*` is a folder"),
        (["info", "{run}/store", "--json", "{run}/train.py/n.json"], r"train.py` on the way is no folder"),
        (["explain", "{run}/store", *OBJECTS, "--queries", "q.npy", "--top", "0"], r"`--top=0`.*`--top=5`"),
        (
            ["gram", "{run}/store", "--model", "{run}/train.py:broken", "--data", "x"],
            r"fails \(RuntimeError: inside, .*train.py, line \d+\)",
        ),
        (
            ["gram", "{run}/store", "--model", "{run}/train.py:nn.Linear", "--data", "x"],
            r"fails \(TypeError: .*missing 2",
        ),
        (["gram", "{run}/store", "--model", "{run}/train.py:torch", "--data", "x"], r"a module is no function"),
        (["gram", "{run}/store", "--model", "{run}/train.py:one", "--data", "x"], r"`model` is a int"),
        (["gram", "{run}/store", "--model", "{run}/wrong.py:one", "--data", "x"], r"SyntaxError"),
        (["flow", "--output", "flow.txt"], r"Pictures end in"),
        (["flow", "--seed", "-1"], r"`--seed=-1` was given"),
        (["demo", "--seed", "9999999999"], r"Seeds are below"),
    ],
    ids=[
        "no store",
        "format",
        "points",
        "memory",
        "size",
        "model",
        "data",
        "architecture",
        "points in words",
        "a folder",
        "below a file",
        "no samples",
        "a function that fails",
        "a class with arguments",
        "a module",
        "a number",
        "no Python",
        "a picture",
        "a negative seed",
        "a large seed",
    ],
)
def test_bad_input_gets_a_message_and_exit_code_2(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert cli.main([argument.replace("{run}", str(run)) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_a_tolerance_is_looked_at_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pathkernel.cli.demo.train", lambda *_: pytest.fail("trained"))
    assert cli.main(["demo", "--quiet", "--tolerance", "nan", "--output", str(tmp_path / "demo")]) == 2
    assert "`tolerance=nan`" in capsys.readouterr().err


def test_places_that_may_not_be_written_to(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert cli.main(["info", str(run / "store"), "--json", str(run / "new.json")]) == 2
    assert not (run / "new.json").exists()


def test_an_interruption_says_what_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathkernel.path_kernel.path_kernel.PathKernel.__call__", interrupted)
    assert cli.main(["gram", str(run / "store"), *objects(run), "--store", str(tmp_path / "k")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_store_with_keyframes(run: Path, tmp_path: Path) -> None:
    data = np.load(run / "train.npz")
    X, y = torch.from_numpy(data["X"]), torch.from_numpy(data["y"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer, loss, where = torch.optim.AdamW(model.parameters(), lr=1e-2), nn.CrossEntropyLoss(), tmp_path / "store"
    schedule = pk.Schedule(keyframes=4)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), store=where, schedule=schedule) as recorder:
        for _ in range(3):
            for x, target in recorder.batches(batch_size=8):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    call(run, "verify", str(where))
    call(run, "gram", str(where), *objects(run), "--output", str(tmp_path / "k.npz"))
    assert np.array_equal(np.load(tmp_path / "k.npz")["K"], np.load(run / "expected.npz")["K"])
    assert cli.main(["export", str(where), str(tmp_path / "steps.csv")]) == 2
