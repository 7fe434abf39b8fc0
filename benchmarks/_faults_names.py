"""Names in a store that lead elsewhere: nothing that a header says is imported, run, or opened outside of its folder.

The sender puts a file into the store that says when it is run, names it in every place of the header that holds a name,
and puts the checksum right. Then every command reads the store; what it answers must be right, or refused in words.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _faults_files import edited
from _faults_table import FAILED, SURVIVED, WRONG, Bench, Fault, Outcome, first_sentence
from torch import nn

import pathkernel as pk
from pathkernel.cli import main as cli
from pathkernel.storage import step_writer
from pathkernel.storage.blocks import write_packed
from pathkernel.storage.format import Group
from pathkernel.storage.known_classes import LOSS_FUNCTIONS, LOSSES, OPTIMIZERS, UPDATE_RULES

MODEL = "import torch\nfrom torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))\n"  # noqa: E501
MARKER = """import os
import pathlib

pathlib.Path(os.environ["PATHKERNEL_FAULTS_MARKER"]).write_text("code of the store ran")
from torch import nn

MSE = Rule = Optimizer = nn.CrossEntropyLoss
"""
LONGEST = 20_000
"""Characters that a command may print of a store with four parameters."""

Change = Callable[[dict[str, Any]], Any]


class Watch:
    """What runs while it is on: files of a store, and calls of the system."""

    def __init__(self) -> None:
        self.on, self.seen = "", []  # type: ignore[var-annotated]
        sys.addaudithook(self._event)  # which cannot be taken away again

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
            self.seen.append(f"{event} {arguments[0]!r}")
        elif event in ("exec", "compile"):
            name = arguments[1] if event == "compile" else getattr(arguments[0], "co_filename", "")
            if isinstance(name, str) and os.path.abspath(name).startswith(self.on):
                self.seen.append(f"{event} {name}")


@cache
def watch() -> Watch:
    return Watch()


@dataclass
class Sent:
    """A finished recording, and what is needed to read it with every command."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def header(self) -> dict[str, Any]:
        return json.loads((self.run / "zarr.json").read_bytes())["attributes"]

    def copy(self, place: Path) -> Sent:
        return Sent(Path(shutil.copytree(self.folder, place)))

    def arguments(self) -> dict[str, list[str]]:
        """The commands that read a store."""
        objects = ["--model", "mine.py:make", "--data", "train.npz", "--quiet", "--output", "out.npz"]
        queries = ["--queries", "train.npz"]
        found = {
            "info": ["info", "run"],
            "verify": ["verify", "run"],
            "explain": ["explain", "run", *objects, *queries],
            "gram": ["gram", "run", *objects, *queries],
            "explain --store": ["explain", "run", *objects, *queries, "--store", "why"],
            "gram --store": ["gram", "run", *objects, *queries, "--store", "K"],
            "export npz": ["export", "run", "out.npz", "--steps", "0,-1"],
            "export safetensors": ["export", "run", "out.safetensors", "--steps", "0,-1"],
            "export csv": ["export", "run", "out.csv"],
        }
        if self.header["replay"] is not None:
            del found["export csv"]  # refused at any rate
        return found

    def called(self, name: str) -> tuple[int, Any, str]:
        """Exit code of a command, what it computed, and what it printed."""
        printed = io.StringIO()
        place, marker = os.getcwd(), self.folder / "marker"
        for stale in self.folder.glob("out.*"):
            stale.unlink()
        os.environ["PATHKERNEL_FAULTS_MARKER"] = str(marker)
        os.chdir(self.folder)
        watch().on = str(self.run.resolve())
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = cli.main([*self.arguments()[name], "--json", "numbers.json"])
        finally:
            watch().on = ""
            os.chdir(place)
        return code, self._result(name) if code == 0 else None, printed.getvalue()

    def _result(self, name: str) -> Any:
        if name == "info":
            return None  # it tells what the header says
        numbers = json.loads((self.folder / "numbers.json").read_text())
        made = {}
        for path in sorted(self.folder.glob("out.*")):
            content = path.read_bytes()
            if path.suffix == ".npz":
                with np.load(path) as arrays:
                    content = b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays.files))
            made[path.name] = content
        return numbers, made

    def ran(self) -> str | None:
        """What was run that nobody asked for; told once."""
        seen, marker = watch().seen[:], self.folder / "marker"
        watch().seen.clear()
        if marker.exists():
            marker.unlink()
            seen.append("the marker is there")
        return "; ".join(seen) or None


@cache
def sent(folder: Path, kind: str) -> Sent:
    """A recording of 4 steps, full or with keyframes.

    Unless it is ``"tied"`` the sender has taken out all that ties header, start and blocks to each other, as in stores
    of earlier versions: what is read then has nothing to rely on.
    """
    place = folder / f"sent-{kind}"
    place.mkdir()
    (place / "mine.py").write_text(MODEL)
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(8, 3, generator=generator), torch.randint(2, (8,), generator=generator)
    np.savez(place / "train.npz", X=X.numpy(), y=y.numpy())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=0.05), nn.CrossEntropyLoss(label_smoothing=0.125)
    schedule = pk.Schedule(keyframes=2) if "keyframes" in kind else None
    options = {} if schedule is None else {"schedule": schedule}
    recorder = pk.KernelRecorder(model, optimizer, loss, (X, y), store=place / "run", audit_every=0, **options)
    with nullcontext() if "tied" in kind else patch.object(step_writer, "write_packed", untied), recorder:
        for _ in range(2):
            for x, target in recorder.batches(4):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    if "tied" not in kind:
        header = place / "run" / "zarr.json"
        header.write_bytes(edited(header.read_bytes(), lambda c: c["attributes"].pop("checksums")))
    (place / "run" / "notes.py").write_text(MARKER)
    (place / "run" / "__init__.py").write_text(MARKER)
    return Sent(place)


def untied(group: Group, name: str, value: Any) -> tuple[int, None]:
    """`write_packed` without a checksum, of values that say nothing of their header."""
    return write_packed(group, name, {k: v for k, v in value.items() if k != "header"})[0], None


@cache
def answers(folder: Path, kind: str) -> dict[str, Any]:
    """What each command answers of the store as it was recorded."""
    one = sent(folder, kind).copy(folder / f"answers-{kind}")
    found = {}
    for name in one.arguments():
        code, found[name], text = one.called(name)
        assert code == 0 and one.ran() is None, (name, text)
    return found


def hostile_names(run: Path) -> list[str]:
    """What somebody could write where a name is expected."""
    return [
        "os:system", "os.system", "posix:system", "builtins.exec", "builtins:eval", "subprocess:Popen",
        "run/notes.py:MSE", f"{run}/notes.py:MSE", "run.notes:MSE", "run.notes.MSE", "notes:MSE", "run:MSE",
        "../run/notes.py:MSE", "../../../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
        "torch.nn.modules.loss.__import__", "torch.nn.modules.loss.F", "torch.nn.modules.loss._Loss",
        "torch.nn.modules.linear.Linear", "torch.nn.Linear", "torch.nn:Sequential", "torch.nn.modules.loss.MSELoss()",
        "torch.nn.modules.loss.GaussianNLLLoss", "torch.nn.functional.mse_loss", "torch.nn.functional.__dict__",
        "torch.load", "torch.hub:load", "torch.optim.optimizer.Optimizer", "torch.optim.lbfgs.LBFGS",
        "torch.optim.sparse_adam.SparseAdam", "pathkernel.cli.main:main", "pathkernel.cli.objects.imported",
        "pathkernel.update_rules.rule.UpdateRule", "__main__:main", "sys.exit",
        "__import__('os').system('touch marker')", "'mean' if __import__('notes') else 0", "(" * 5000, "9" * 5000,
        "{'a': " * 200, "x" * 1_000_000, "'" + "x" * 100_000 + "'", "", ".", ":", "..", "\0", "\ud800", "a\nb",
        "\x1b]0;owned\x07\x1b[2J", "\u202eSSOLESM.nn.hcrot", "torch.nn.modules.loss.MSELoſſ", "=cmd|' /C calc'!A0",
        "'sum'", "'none'", "'elementwise_mean'", "nan", "1e999", "-1", "None", "True", "[]", "b'mean'",
    ]  # fmt: skip


def name_fields() -> dict[str, Callable[[dict[str, Any], str], Any]]:
    """Every place of a header that holds a name or a text."""
    return {
        "loss": lambda a, v: a["fingerprints"]["loss"].update(name=v),
        "loss without settings": lambda a, v: a["fingerprints"].update(loss={"name": v, "settings": {}}),
        "reduction of the loss": lambda a, v: a["fingerprints"]["loss"]["settings"].update(reduction=v),
        "number of the loss": lambda a, v: a["fingerprints"]["loss"]["settings"].update(label_smoothing=v),
        "tensor of the loss": lambda a, v: a["fingerprints"]["loss"]["settings"].update(weight=v),
        "setting of the loss": lambda a, v: a["fingerprints"]["loss"]["settings"].update({v: "1"}),
        "rule's name": lambda a, v: a["rule"].update(name=v),
        "rule's class": lambda a, v: a["rule"].update({"class": v}),
        "rule's memory": lambda a, v: a["rule"].update(memory=[v]),
        "rule": lambda a, v: a.update(rule={"name": v, "class": v, "memory": [v]}),
        "reduction": lambda a, v: a.update(reduction=v),
        "regularizers": lambda a, v: a.update(regularizers=[v]),
        "averages": lambda a, v: a.update(averages=[v]),
        "version of the package": lambda a, v: a["versions"].update(pathkernel=v),
        "another version": lambda a, v: a["versions"].update({v: v}),
        "module of the model": lambda a, v: a["fingerprints"]["model"]["modules"].update({"0": v}),
        "name of a module": lambda a, v: a["fingerprints"]["model"]["modules"].update({v: v}),
        "state of the model": lambda a, v: a["fingerprints"]["model"]["state"].update({"0.bias": v}),
        "digest of the data": lambda a, v: a["fingerprints"]["data"].update(digest=v),
        "shape of the data": lambda a, v: a["fingerprints"]["data"].update(shapes=[v]),
        "parameter": lambda a, v: a["regions"][0][0].update(name=v),
        "dtype": lambda a, v: a.update(dtype=v),
        "level of record": lambda a, v: a["schedule"].update(keep=v),
        "setting of the level of record": lambda a, v: a["schedule"].update({v: v}),
        "array of the end": lambda a, v: a["end"].update(values=[v, a["end"]["values"][1]]),
        "weights at the end": lambda a, v: a["end"].update(weights=v),
        "array with a checksum": lambda a, v: a.setdefault("checksums", {}).update({v: 1}),
        "format": lambda a, v: a.update(format=v),
        "anything else": lambda a, v: a.update({v: v}),
    }


def loss_of(name: str) -> Change:
    made = LOSSES.get(name)
    settings = {} if made is None else {k: repr(v) for k, v in vars(made()).items() if k[0] != "_" and k != "training"}
    return lambda a: a["fingerprints"].update(loss={"name": name, "settings": settings})


def rule_of(name: str) -> Change:
    rule = UPDATE_RULES[name]
    return lambda a: a.update(rule={"name": rule.name, "class": name, "memory": list(rule.memory)})


def changes(run: Path, kind: str) -> list[tuple[str, Change]]:
    """Every hostile name in every field, and every known class in the place of another."""
    fields = name_fields()
    if "keyframes" in kind:  # where they differ from the fields of any other store
        fields = {"optimizer": lambda a, v: a["replay"].update(optimizer=v), "rule": fields["rule"]}
    found: list[tuple[str, Change]] = [
        (field, lambda a, v=v, put=put: put(a, v)) for field, put in fields.items() for v in hostile_names(run)
    ]
    if "keyframes" in kind:
        return found + [(f"optimizer {n}", lambda a, n=n: a["replay"].update(optimizer=n)) for n in OPTIMIZERS]
    wrong_types: list[Any] = [None, 3, 1.5, True, [], ["a"], {}, {"a": "b"}, [["a", "b"]]]
    found += [(f"type of {f}", lambda a, v=v, put=put: put(a, v)) for f, put in fields.items() for v in wrong_types]
    found += [(f"loss {name}", loss_of(name)) for name in (*LOSSES, *LOSS_FUNCTIONS)]
    # What tells one rule of the package from another in the place of it is that the start says which it was.
    return found + [(f"rule {name}", rule_of(name)) for name in UPDATE_RULES if "tied" in kind]


def in_every_command(bench: Bench) -> Iterator[Outcome]:
    for kind, quick, full in (("full", 15, 400), ("keyframes", 6, 100), ("tied", 6, 300)):
        right, one = answers(bench.folder, kind), sent(bench.folder, kind).copy(bench.place())
        raw, cases = (one.run / "zarr.json").read_bytes(), changes(one.run, kind)
        for field, change in bench.random.sample(cases, min(bench.count(quick, full), len(cases))):
            try:
                content = edited(raw, lambda c, change=change: change(c["attributes"]))
            except (TypeError, ValueError, AttributeError):
                continue  # JSON has no such keys
            (one.run / "zarr.json").write_bytes(content)
            names = bench.random.sample(list(one.arguments()), 3) if bench.quick else list(one.arguments())
            for name in names:
                yield outcome(one, field, name, right)
                for kept in ("why", "K"):
                    shutil.rmtree(one.folder / kept, ignore_errors=True)
        (one.run / "zarr.json").write_bytes(raw)


def outcome(one: Sent, field: str, name: str, right: dict[str, Any]) -> Outcome:
    """What a command made of a store with a hostile name in it."""
    what, before = f"{field}, {name}", outside(one)
    try:
        code, result, text = one.called(name)
    except (Exception, SystemExit) as error:
        return Outcome(WRONG if (ran := one.ran()) else FAILED, f"{what}: {ran or first_sentence(error)}")
    if ran := one.ran():
        return Outcome(WRONG, f"{what}: executed: {ran}")
    if outside(one) != before:
        return Outcome(WRONG, f"{what}: something outside of the store was changed")
    if len(text) > LONGEST or any(not c.isprintable() and c != "\n" for c in text):
        return Outcome(FAILED, f"{what}: {len(text)} characters were printed, or some that a terminal obeys")
    if code == 0:
        # Weights are written under the names that the header has, and `info` tells what it says.
        renamed = field == "parameter" and name.startswith("export")
        same = name == "info" or result == right[name] or (renamed and numbers_of(result) == numbers_of(right[name]))
        return Outcome(SURVIVED if same else WRONG, "every value right" if same else f"{what}: another answer")
    told = (code == 1 and name == "verify") or (code == 2 and text.count(". ") >= 2)
    return Outcome(SURVIVED if told else FAILED, "an error in three parts" if told else f"{what}: {code} {text[:100]}")


def numbers_of(result: Any) -> Any:
    """What an export holds, whatever the names of its arrays."""
    return result[0]["steps"]


def outside(one: Sent) -> list[str]:
    """Files beside the store that no command writes."""
    names = {place.name for place in one.folder.parent.iterdir()}
    mine = {place.name for place in one.folder.iterdir() if not place.name.startswith(("out.", "numbers", "why", "K"))}
    return sorted(names) + sorted(mine - {"marker", "__pycache__"})


def computation_changes(run: Path) -> list[tuple[str, str, Change]]:
    """The same for the store of an explanation and of a Gram matrix: which, field, change."""
    wrong: list[Any] = [*hostile_names(run), None, 3, [], ["a"], {}, {"a": "b"}, {"0": []}, [["a"]]]
    both: dict[str, Callable[[dict[str, Any], Any], Any]] = {
        "kind": lambda a, v: a.update(kind=v),
        "format": lambda a, v: a.update(format=v),
        "version": lambda a, v: a.update(version=v),
        "identity": lambda a, v: a.update(identity=v),
        "trajectory": lambda a, v: a["identity"].update(trajectory=v),
        "anything else": lambda a, v: a["identity"].update({v: v}),
    }
    why = {
        "names": lambda a, v: a.update(names=v),
        "a name": lambda a, v: a["names"].__setitem__(0, v),
        "one more name": lambda a, v: a["names"].append(v),
        "blocks": lambda a, v: a.update(blocks=v),
        "a block": lambda a, v: a["blocks"].update({"0": v}),
    }
    K = {"settled": lambda a, v: a.update(settled=v), "settled sizes": lambda a, v: _settle(a, v)}
    pairs = [("why", f, put) for f, put in (both | why).items()] + [("K", f, put) for f, put in (both | K).items()]
    return [(kept, field, lambda a, v=v, put=put: put(a, v)) for kept, field, put in pairs for v in wrong]


def _settle(attributes: dict[str, Any], value: Any) -> None:
    attributes["settled"] = {size: value for size in attributes.get("settled") or ["8 × 8"]}


def in_computations(bench: Bench) -> Iterator[Outcome]:
    one = sent(bench.folder, "full").copy(bench.place())
    commands = {"why": "explain --store", "K": "gram --store"}
    right = answers(bench.folder, "full")
    for command in commands.values():
        assert one.called(command)[0] == 0
    kept = {name: Path(shutil.copytree(one.folder / name, bench.place())) for name in commands}
    cases = computation_changes(one.run)
    for name, field, change in bench.random.sample(cases, bench.count(20, len(cases))):
        raw = (kept[name] / "zarr.json").read_bytes()
        try:
            content = edited(raw, lambda c, change=change: change(c["attributes"]))
        except (TypeError, ValueError, AttributeError):
            continue
        shutil.rmtree(one.folder / name)
        shutil.copytree(kept[name], one.folder / name)
        (one.folder / name / "zarr.json").write_bytes(content)
        yield outcome(one, f"{name}: {field}", commands[name], right)


def start_of_another(bench: Bench) -> Iterator[Outcome]:
    """Files of one recording in the place of those of another: each is right in itself."""
    swapped = {"tied": ("start", "end-1", "log", "theta-0", "blocks"), "tied keyframes": ("start", "optimizer")}
    for kind, arrays in swapped.items():
        right = answers(bench.folder, kind)
        mine, other = sent(bench.folder, kind).copy(bench.place()), _another(bench, kind)
        for array in arrays:
            names = ("commit", "log", "theta-0", "gradient-0", "frozen-0-0") if array == "blocks" else (array,)
            kept = {name: Path(shutil.copytree(mine.run / name, bench.place())) for name in names}
            for name in names:
                shutil.rmtree(mine.run / name)
                shutil.copytree(other.run / name, mine.run / name)
            same = all((mine.run / n / "c").exists() and _tree(mine.run / n) == _tree(kept[n]) for n in names)
            for command in mine.arguments():
                found = outcome(mine, f"{array} of another run", command, right)
                accepted = found.gets == "every value right" and not same and command in ("verify", "explain")
                yield Outcome(FAILED, f"{array}, {command}: accepted") if accepted else found
                for folder in ("why", "K"):
                    shutil.rmtree(mine.folder / folder, ignore_errors=True)
            for name in names:
                shutil.rmtree(mine.run / name)
                shutil.copytree(kept[name], mine.run / name)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _another(bench: Bench, kind: str) -> Sent:
    """A recording of the same network, data and length, begun from other weights and with other settings."""
    place = bench.place()
    X, y = (torch.from_numpy(np.load(sent(bench.folder, kind).folder / "train.npz")[name]) for name in "Xy")
    with torch.random.fork_rng():
        torch.manual_seed(bench.random.getrandbits(30) + 1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    rate: Any = torch.tensor(0.03125) if "keyframes" in kind else 0.03125
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=rate), nn.CrossEntropyLoss(label_smoothing=0.125)
    options = {"schedule": pk.Schedule(keyframes=2)} if "keyframes" in kind else {}
    with pk.KernelRecorder(model, optimizer, loss, (X, y), store=place / "run", audit_every=0, **options) as recorder:
        for _ in range(2):
            for x, target in recorder.batches(4):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    return Sent(place)


FAULTS = [
    Fault("hostile names in every command", "none", in_every_command),
    Fault("hostile names in a Gram's or attribution's store", "none", in_computations),
    Fault("start of another run", "none", start_of_another),
]
