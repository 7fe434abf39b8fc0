"""A store runs nothing: names in it are looked up in closed tables, and its files belong together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pathkernel as pk
from pathkernel.cli import main as cli
from pathkernel.errors import CorruptBlockError, StoreError
from pathkernel.optimizers.scaled import Lion
from pathkernel.runtime.checksum import crc32c
from pathkernel.storage import fingerprints as identity
from pathkernel.storage.blocks import _write_bytes
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import Group
from pathkernel.storage.format.groups import checksum
from pathkernel.storage.header import Header
from pathkernel.storage.known_classes import LOSS_FUNCTIONS, LOSSES, OPTIMIZERS, known_loss
from pathkernel.storage.opening import known_optimizer, known_rule
from pathkernel.storage.packing import pack

MINE = """
import torch
from torch import nn
from pathkernel.update_rules.sgd import SGD

def make():
    return nn.Linear(2, 3)

class Rule(SGD):
    pass

class Optimizer(torch.optim.SGD):
    pass

def penalty(parameters):
    return 0.125 * parameters["weight"].square().sum()

regularizers = {"penalty": penalty}

def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)
"""
X = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(1))


def recorded(
    folder: Path, seed: int = 0, name: str = "run", optimizer: Callable[[Any], Any] | None = None, **options: Any
) -> Path:
    """A recording of four steps, the last part of which may have more parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(2, 3)
    late = options.pop("late", False)
    if late:
        model.bias.requires_grad_(False)
    made = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.25))
    steps = made([model.weight] if late else model.parameters())
    loss = options.pop("loss", nn.CrossEntropyLoss(label_smoothing=0.125))
    penalty = options.get("regularizers", {}).get("penalty")
    with pk.KernelRecorder(model, steps, loss, (X, Y), store=folder / name, audit_every=0, **options) as recorder:
        for s in range(4):
            if late and s == 2:
                model.bias.requires_grad_(True)
                steps.add_param_group({"params": [model.bias]})
            x, y = recorder.batch([s, s + 4])
            steps.zero_grad()
            value = loss(model(x), y)
            (value if penalty is None else value + penalty(dict(model.named_parameters()))).backward()
            steps.step()
    np.savez(folder / "train.npz", X=X.numpy(), y=Y.numpy())
    (folder / "mine.py").write_text(MINE)
    return folder / name


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a header, and put its checksum right."""
    meta = json.loads((path / "zarr.json").read_text())
    change(meta["attributes"])
    meta["attributes"]["checksum"] = checksum(meta["attributes"])
    (path / "zarr.json").write_text(json.dumps(meta))


def explain(folder: Path, *arguments: str) -> int:
    place = str(folder / "train.npz")
    objects = ["--model", f"{folder}/mine.py:make", "--data", place, "--queries", place, "--quiet"]
    return cli.main(["explain", str(folder / "run"), *objects, *arguments])


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["explain", "gram"])
@pytest.mark.parametrize("name", ["run/notes.py:MSE", "run.notes.MSE", "run.notes:MSE", "os:system", "builtins.exec"])
def test_a_loss_is_never_imported(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded(tmp_path)
    (run / "notes.py").write_text(
        "import pathlib; pathlib.Path('OWNED').touch()\nfrom torch import nn\nMSE = nn.CrossEntropyLoss\n"
    )
    edit(run, lambda a: a["fingerprints"].update(loss={"name": name, "settings": {"reduction": "'mean'"}}))
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "mine.py:make", "--data", "train.npz", "--queries", "train.npz", "--quiet"]
    assert cli.main([command, "run", *arguments]) == 2
    assert not (tmp_path / "OWNED").exists()
    refused = capsys.readouterr().err
    assert "which was not imported" in refused and "--loss train.py:loss" in refused and name in refused


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.25, ignore_index=-7),
        nn.HuberLoss(delta=2),
        nn.SmoothL1Loss(beta=0.5, reduction="none"),
        nn.PoissonNLLLoss(log_input=False, eps=1e-6),
        nn.functional.mse_loss,
    ],
)
def test_a_loss_of_torch_is_found_with_its_settings(loss: Any) -> None:
    recorded_as = json.loads(json.dumps(identity.loss_identity(loss)))
    found = known_loss(recorded_as)
    assert type(found) is type(loss) and identity.loss_identity(found) == recorded_as


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("CrossEntropyLoss", {"reduction": "'os:system'"}),
        ("CrossEntropyLoss", {"reduction": "__import__('os').getcwd()"}),
        ("CrossEntropyLoss", {"reduction": "'mean'", "ignore_index": "10**9", "label_smoothing": "0.0"}),
        ("CrossEntropyLoss", {"reduction": "'mean'", "ignore_index": "9" * 5000, "label_smoothing": "0.0"}),
        ("CrossEntropyLoss", {"reduction": "(" * 5000}),
        ("CrossEntropyLoss", {"reduction": "'mean'", "weight": "tensor 00"}),
        ("CrossEntropyLoss", {"reduction": "'mean'"}),  # the others are there, too
        ("MSELoss", {"reduction": "'mean'", "size_average": "True"}),
        ("MSELoss", {"reduction": "'mean'", "self": "1"}),
        ("HuberLoss", {"reduction": "'mean'", "delta": "-1.0"}),
        ("_Loss", {"reduction": "'mean'"}),
        ("F", {}),
        ("LinearCrossEntropyLoss", {"in_features": "2000000", "num_classes": "2000000"}),
    ],
)
def test_settings_of_a_loss_are_literals_of_its_own_keywords(name: str, settings: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="not imported"):
        known_loss({"name": f"torch.nn.modules.loss.{name}", "settings": settings})


def test_settings_of_a_loss_are_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "__import__('pathlib').Path('OWNED').touch()"
    for setting in (text, f"[{text}]"):
        with pytest.raises(StoreError, match="not imported"):
            known_loss({"name": "torch.nn.modules.loss.MSELoss", "settings": {"reduction": setting}})
    assert not (tmp_path / "OWNED").exists()


def test_a_loss_that_was_not_found_is_named_by_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Loss(nn.CrossEntropyLoss):
        pass

    recorded(tmp_path, loss=Loss())
    assert explain(tmp_path) == 2
    refused = capsys.readouterr().err
    assert "not imported" in refused and "--loss train.py:loss" in refused


def test_a_loss_that_does_not_suit_the_samples_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # as in a store of an earlier version, whose start does not say which header it was written with
    monkeypatch.setattr(Header, "digest", lambda self: "")
    run = recorded(tmp_path)
    edit(run, lambda a: a["fingerprints"].update(loss=identity.loss_identity(nn.BCELoss())))
    assert explain(tmp_path) == 2
    assert "fails on the outputs and the targets" in capsys.readouterr().err


def test_a_rule_of_the_users_own_is_named_by_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pathkernel.cli.objects import imported

    (tmp_path / "mine.py").write_text(MINE)
    rule = imported(f"{tmp_path}/mine.py:Rule", "--rule", "Rule")()
    recorded(tmp_path, rule=rule)
    assert explain(tmp_path) == 2
    assert "--rule train.py:YourRule" in capsys.readouterr().err
    assert explain(tmp_path, "--rule", f"{tmp_path}/mine.py:Rule") == 0
    assert explain(tmp_path, "--rule", f"{tmp_path}/mine.py:penalty") == 2
    assert "is a" in capsys.readouterr().err


def test_an_optimizer_of_the_users_own_is_named_by_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pathkernel.cli.objects import imported

    (tmp_path / "mine.py").write_text(MINE)
    kind = imported(f"{tmp_path}/mine.py:Optimizer", "--optimizer", "Optimizer")
    options = {"schedule": pk.Schedule(keyframes=2), "rule": "elementwise"}
    recorded(tmp_path, optimizer=lambda parameters: kind(parameters, lr=0.25), **options)
    assert explain(tmp_path) == 2
    assert "--optimizer train.py:YourOptimizer" in capsys.readouterr().err
    assert explain(tmp_path, "--optimizer", f"{tmp_path}/mine.py:Optimizer") == 0
    assert explain(tmp_path, "--optimizer", f"{tmp_path}/mine.py:make") == 2


def test_regularizers_are_named_by_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pathkernel.cli.objects import imported

    (tmp_path / "mine.py").write_text(MINE)
    regularizers = imported(f"{tmp_path}/mine.py:regularizers", "--regularizers", "regularizers")
    recorded(tmp_path, regularizers=regularizers)
    assert explain(tmp_path) == 2
    assert "--regularizers train.py:regularizers" in capsys.readouterr().err
    assert explain(tmp_path, "--regularizers", f"{tmp_path}/mine.py:regularizers") == 0
    assert explain(tmp_path, "--regularizers", f"{tmp_path}/mine.py:Rule") == 2


def test_the_packages_own_optimizers_and_rules_are_found(tmp_path: Path) -> None:
    schedule = pk.Schedule(keyframes=2)
    recorded(tmp_path, optimizer=lambda p: Lion(p, lr=0.0625), rule=Lion.rule(), schedule=schedule)
    assert explain(tmp_path) == 0


def test_tables_hold_classes_that_can_be_what_they_are_looked_up_for() -> None:
    assert torch.optim.Optimizer not in OPTIMIZERS.values()
    assert all(issubclass(cls, torch.optim.Optimizer) for cls in OPTIMIZERS.values())
    assert not any(list(cls().parameters()) for cls in LOSSES.values())
    assert not set(LOSSES) & set(LOSS_FUNCTIONS)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a["fingerprints"].update(loss={}),
        lambda a: a["fingerprints"]["loss"].update(name=["os", "system"]),
        lambda a: a["fingerprints"]["loss"]["settings"].update(reduction=0),
        lambda a: a["fingerprints"]["data"].update(count="many"),
        lambda a: a["rule"].update(name=["sgd"]),
        lambda a: a["end"].update(values=["theta-0", 10]),
        lambda a: a.update(checksums={"start": "0"}),
    ],
    ids=["no loss", "loss", "setting", "count", "rule", "end", "checksums"],
)
def test_what_is_no_name_is_damage_for_every_command(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    run = recorded(tmp_path)
    edit(run, change)
    assert cli.main(["info", str(run)]) == 2 and cli.main(["verify", str(run)]) == 1 and explain(tmp_path) == 2


def test_names_do_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded(tmp_path)
    edit(run, lambda a: a["rule"].update(name="\x1b]0;owned\x07\ud800\n" + "x" * 100_000))
    assert cli.main(["info", str(run)]) == 0
    assert explain(tmp_path) == 2
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert len(text) < 5000 and all(c.isprintable() or c == "\n" for c in text)


def test_weights_under_names_that_lead_elsewhere_are_not_exported(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    edit(run, lambda a: a["regions"][0][0].update(name="../../outside"))
    assert cli.main(["export", str(run), str(tmp_path / "w.npz")]) == 2
    edit(run, lambda a: a["regions"][0][0].update(name="file"))  # which numpy.savez has an argument of
    assert cli.main(["export", str(run), str(tmp_path / "w.npz")]) == 0
    assert np.load(tmp_path / "w.npz")["file"].shape == (5, 3, 2)


# -- files of another recording -------------------------------------------------------------------------------------


def at(model: nn.Module, path: Path, step: int | None = None) -> nn.Module:
    """A network with the weights before a step of a store, or at its end."""
    store = DiskStore.open(path)
    theta = store.final() if step is None else store.vector(step)
    with torch.no_grad():
        for name, value in store.header.layouts[-1].unflatten(theta).items():  # type: ignore[union-attr]
            model.get_parameter(name).copy_(value)
    return model


def opened(path: Path, like: Path) -> pk.Trajectory:
    """The trajectory of a store, with the network of another one whose end it should have."""
    model = at(nn.Linear(2, 3), like)
    return pk.Trajectory.open(path, model=model, loss=nn.CrossEntropyLoss(label_smoothing=0.125), data=(X, Y))


def rates(rate: float) -> Callable[[Any], Any]:
    return lambda parameters: torch.optim.SGD(parameters, lr=torch.tensor(rate))


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["start"], {}),
        (["end-1"], {"schedule": pk.Schedule(keyframes=2)}),
        (["commit", "log", "theta-0", "gradient-0"], {}),
        (["region-1"], {"late": True}),
        (["optimizer"], {"schedule": pk.Schedule(keyframes=2)}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_files_of_another_recording_are_noticed(names: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    one = recorded(tmp_path, 0, "run", rates(0.25), **options)
    other = recorded(tmp_path, 1, "other", rates(0.125), **options)
    intact = shutil.copytree(one, tmp_path / "intact")
    for name in names:
        shutil.rmtree(one / name)
        shutil.copytree(other / name, one / name)
    with pytest.raises(CorruptBlockError, match=r"not what was written with this header|of another recording"):
        trajectory = opened(one, intact)
        _ = [trajectory.initial, trajectory.tail, *trajectory.steps()]
    assert cli.main(["verify", str(one)]) != 0
    assert cli.main(["verify", str(intact)]) == 0


def test_a_header_of_another_recording_is_noticed(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    edit(run, lambda a: a["fingerprints"].update(loss=identity.loss_identity(nn.MultiMarginLoss())))
    with pytest.raises(CorruptBlockError, match="another header"):
        DiskStore.open(run).start_values()


def test_a_recording_that_goes_on_keeps_its_checksums(tmp_path: Path) -> None:
    run = recorded(tmp_path)
    first = DiskStore.open(run).header.checksums  # type: ignore[union-attr]
    assert set(first) == {"start", "end-1"}
    model = at(nn.Linear(2, 3), run, 2)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.25), nn.CrossEntropyLoss(label_smoothing=0.125)
    with pk.KernelRecorder(model, optimizer, loss, (X, Y), store=run, audit_every=0) as recorder:
        x, y = recorder.batch([0, 1])
        loss(model(x), y).backward()
        optimizer.step()
    store = DiskStore.open(run)
    assert len(store) == 3 and not store.verify()
    again = store.header.checksums  # type: ignore[union-attr]
    assert set(again) == {"start", "end-1"} and again["start"] == first["start"]


# -- what a computation keeps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(names="os:system"),
        lambda a: a["names"].append("one more"),
        lambda a: a.update(blocks={"0": {}}),
        lambda a: a.update(blocks=[]),
        lambda a: a.update(identity="os:system"),
        lambda a: a["names"].__setitem__(0, "os:system"),
    ],
    ids=["names", "one more", "block", "blocks", "identity", "a name"],
)
def test_the_store_of_an_explanation_is_distrusted_too(
    change: Callable[[dict[str, Any]], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path)
    assert explain(tmp_path, "--store", str(tmp_path / "why")) == 0
    edit(tmp_path / "why", change)
    assert explain(tmp_path, "--store", str(tmp_path / "why")) == 2
    assert "makes no sense" in (text := capsys.readouterr().err) or "make no sense" in text or "other arrays" in text


def test_a_lock_that_is_a_link_is_refused_in_words(tmp_path: Path) -> None:
    recorded(tmp_path)
    assert explain(tmp_path, "--store", str(tmp_path / "why")) == 0
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "why" / "lock").unlink()
    (tmp_path / "why" / "lock").symlink_to(outside)
    assert explain(tmp_path, "--store", str(tmp_path / "why")) == 2
    assert outside.read_text() == "precious"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (1, {"os:system": torch.zeros(3, dtype=torch.uint8)}),
        (2, ("os", torch.bfloat16)),
        (2, ("cpu", "os:system")),
        (None, "os:system"),
    ],
    ids=["generator", "device", "floating type", "learning rate"],
)
def test_names_in_a_record_are_looked_at_before_torch_is(part: int | None, value: Any, tmp_path: Path) -> None:
    run = recorded(tmp_path)
    store = DiskStore.open(run)
    blocks = store._there.blocks
    record = blocks.record(0)
    if part is None:
        record["settings"] = [tuple({**group, "lr": value} for group in groups) for groups in record["settings"]]
    for step in record["steps"] if part is not None else []:
        for batch in step["batches"]:
            batch[4] = [[*state[:part], value, *state[part + 1 :]] for state in batch[4]]
    raw, row = pack(record), list(vars(blocks.commit(0)).values())
    row[4:6] = len(raw), crc32c(raw)
    _write_bytes(blocks.array("log"), row[3], raw)
    Group(run).array("commit").write([0], np.array(row, np.int64))
    with pytest.raises(CorruptBlockError, match="makes no sense"):
        list(opened(run, run).steps())


@pytest.mark.parametrize("folder", ["dynamics", "optimizers"])
def test_names_of_the_package_from_before_its_folders_were_renamed(folder: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer, data = Lion(model.parameters(), lr=0.1), (torch.ones(8, 3), torch.ones(8, 2))
    recorder = pk.KernelRecorder(
        model, optimizer, torch.nn.MSELoss(), data=data, store=tmp_path / "run", rule=Lion.rule()
    )
    with recorder:
        for x, y in recorder.batches(4):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    header = DiskStore.open(tmp_path / "run").header
    assert header is not None
    earlier = replace(header, rule={**header.rule, "class": f"pathkernel.{folder}.scaled.LionRule"})
    assert isinstance(known_rule(earlier, None), pk.optimizers.LionRule)
    assert known_optimizer(f"pathkernel.{folder}.scaled.Lion", None) is Lion
    opened = pk.Trajectory.open(tmp_path / "run", model=model, loss=torch.nn.MSELoss(), data=data)
    assert isinstance(opened.rule, pk.optimizers.LionRule)
