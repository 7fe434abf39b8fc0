"""Files of a store that are damaged, lost, exchanged or of another version, and folders that are moved."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from _faults_killed import computed
from _faults_table import FAILED, SURVIVED, WRONG, Bench, Fault, Outcome, first_sentence
from _faults_training import Reference, Training, reference

from pathkernel.errors import CorruptBlockError, PathKernelError, StoreError
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format.groups import checksum
from pathkernel.storage.header import VERSION

STEPS = 9


@dataclass
class Stored:
    """A finished recording on disk, and what is in it."""

    path: Path
    training: Training
    whole: Reference

    def copy(self, bench: Bench) -> Stored:
        return Stored(Path(shutil.copytree(self.path, bench.place())), self.training, self.whole)

    def files(self) -> list[str]:
        names = sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file())
        return [name for name in names if name != "lock"]

    def read(self) -> Outcome:
        """What a reader gets: everything right, or an error that names the file."""
        try:
            trajectory = self.training.opened(self.path)
            wrong = self.whole.wrong(trajectory)
            if len(trajectory) != len(self.whole.steps):
                wrong.append(f"{len(trajectory)} steps")
        except CorruptBlockError as error:
            named = str(self.path) in str(error)
            return Outcome(SURVIVED if named else FAILED, "CorruptBlockError that names the file")
        except PathKernelError as error:
            return Outcome(SURVIVED, type(error).__name__)
        except Exception as error:
            return Outcome(FAILED, first_sentence(error))
        return Outcome(WRONG, f"wrong: {wrong[:3]}") if wrong else Outcome(SURVIVED, "every value right")


@cache
def stored(folder: Path) -> Stored:
    """A recording in blocks of two steps, with averages, changes from outside, buffers and late parameters."""
    path, training = folder / "original", Training("adamw")
    late = training.model[4]
    for p in late.parameters():
        p.requires_grad_(False)
    training.optimizer = torch.optim.AdamW(training.model[:2].parameters(), lr=0.01)
    ema = torch.optim.swa_utils.AveragedModel(training.model)
    with training.recorder(DiskStore(path, flush_every=2), averages={"ema": ema}) as recorder:
        for step in training.train(recorder, STEPS):
            ema.update_parameters(training.model)
            if step == 5:
                late.requires_grad_(True)
                training.optimizer.add_param_group({"params": list(late.parameters())})
    return Stored(path, training, Reference.of(recorder.trajectory))


Damage = Callable[[bytes, Bench], bytes | None]


def flipped(raw: bytes, bench: Bench) -> bytes:
    place, damaged = bench.random.randrange(8 * len(raw)), bytearray(raw)
    damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


def flips(bench: Bench) -> Iterator[Outcome]:
    """One bit in every file, and again."""
    one = stored(bench.folder).copy(bench)
    names = one.files()
    for name in (names * 40)[: bench.count(60, 1000)]:
        yield with_damage(one, name, flipped((one.path / name).read_bytes(), bench))


def with_damage(one: Stored, name: str, content: bytes | None) -> Outcome:
    place = one.path / name
    kept = place.read_bytes()
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content)
    outcome = one.read()
    place.write_bytes(kept)
    return outcome


def truncations(bench: Bench) -> Iterator[Outcome]:
    """Every file, cut at the ends of its parts, or with something behind it."""
    one = stored(bench.folder).copy(bench)
    names = one.files()
    for name in bench.random.sample(names, bench.count(10, len(names))):
        raw = (one.path / name).read_bytes()
        for size in sorted({0, 1, 4, 8, 15, 16, 17, 20, len(raw) // 2, len(raw) - 5, len(raw) - 4, len(raw) - 1}):
            if 0 <= size < len(raw):
                yield with_damage(one, name, raw[:size])
        yield must_be_refused(with_damage(one, name, raw + b"\0"), name)


def must_be_refused(outcome: Outcome, name: str) -> Outcome:
    if outcome.gets == "every value right" and not name.endswith("zarr.json"):
        return Outcome(FAILED, f"{name.split('/')[0]}: accepted")
    return outcome


def lost_files(bench: Bench) -> Iterator[Outcome]:
    """Every file alone, and every folder."""
    one = stored(bench.folder).copy(bench)
    for name in bench.random.sample(one.files(), bench.count(15, len(one.files()))):
        yield must_be_refused(with_damage(one, name, None), name)
    for folder in sorted(p for p in one.path.rglob("*") if p.is_dir()):
        if folder.exists():
            folder.rename(bench.folder / "aside")
            yield must_be_refused(one.read(), "folder")
            (bench.folder / "aside").rename(folder)


def exchanged(bench: Bench) -> Iterator[Outcome]:
    """A file in the place of another of the same kind."""
    one = stored(bench.folder).copy(bench)
    chunks = [name for name in one.files() if "/c/" in name]
    for _ in range(bench.count(10, 60)):
        name = bench.random.choice(chunks)
        others = [n for n in chunks if n.split("/")[0] == name.split("/")[0] and n != name]
        others = [n for n in others if (one.path / n).read_bytes() != (one.path / name).read_bytes()]
        if others:
            yield with_damage(one, name, (one.path / bench.random.choice(others)).read_bytes())


def edited(raw: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A zarr.json that was changed by somebody who put its checksum right."""
    content = json.loads(raw)
    change(content)
    if "checksum" in content.get("attributes", {}):
        content["attributes"]["checksum"] = checksum(content["attributes"])
    return json.dumps(content).encode()


def versions(bench: Bench) -> Iterator[Outcome]:
    one = stored(bench.folder).copy(bench)
    raw = (one.path / "zarr.json").read_bytes()
    for version in (VERSION + 1, VERSION + 2, 99, 10**30, 0, -1, None, "1", 1.0, True, [1]):
        for writer in ("9.9", None, ["9"]):
            change = partial(_set_version, version=version, writer=writer)
            outcome = with_damage(one, "zarr.json", edited(raw, change))
            refused = "StoreError" in outcome.gets
            yield Outcome(outcome.verdict if refused else WRONG, outcome.gets)


def _set_version(content: dict[str, Any], version: Any, writer: Any) -> None:
    content["attributes"].update(version=version, versions={"pathkernel": writer} if writer != ["9"] else writer)


def damaged_computation(bench: Bench) -> Iterator[Outcome]:
    """A bit in a file of a Gram matrix or an attribution, and files that are gone."""
    training = Training("momentum")
    trajectory = training.recorded(None, STEPS)
    for kind in ("gram", "explain"):
        path = bench.place()
        whole = computed(kind, trajectory, path)
        names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != "lock")
        kept = shutil.copytree(path, bench.place())
        for name in (names * 20)[: bench.count(10, 60)]:
            raw = (path / name).read_bytes()
            for content in (flipped(raw, bench), raw[: len(raw) // 2], None):
                (path / name).unlink() if content is None else (path / name).write_bytes(content)
                try:
                    same = computed(kind, trajectory, path).tobytes() == whole.tobytes()
                    yield Outcome(SURVIVED, "every value right") if same else Outcome(WRONG, f"{kind}: {name}")
                except StoreError as error:
                    yield Outcome(SURVIVED, type(error).__name__ + " that names the file")
                except Exception as error:
                    yield Outcome(FAILED, f"{kind}, {name}: {first_sentence(error)}")
                shutil.rmtree(path)
                shutil.copytree(kept, path)


def moved(bench: Bench) -> Iterator[Outcome]:
    """Renamed when closed, while a reader has it open, and while it is recorded."""
    for _ in range(bench.count(1, 10)):
        one = stored(bench.folder).copy(bench)
        trajectory, new = one.training.opened(one.path), bench.place()
        one.path.rename(new)
        try:
            trajectory.store.read(STEPS - 1)
            yield Outcome(WRONG, "read from where nothing is")
        except StoreError:
            yield Outcome(SURVIVED, "CorruptBlockError that names the file")
        yield Stored(new, one.training, one.whole).read()
        yield _moved_while_recording(bench)


def _moved_while_recording(bench: Bench) -> Outcome:
    path, new, whole, training = bench.place(), bench.place(), reference("momentum", 30), Training("momentum")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with training.recorder(DiskStore(path, flush_every=bench.random.choice([1, 4]))) as recorder:
            for step in training.train(recorder, 30):
                if step == 12:
                    recorder.trajectory.store.flush()
                    path.rename(new)
    again = DiskStore.open(new)
    told = [w for w in seen if "cannot be written any more" in str(w.message)]
    right = not again.verify() and not whole.wrong(Training("momentum").opened(new))
    if not right or path.exists():
        return Outcome(WRONG, f"{again!r}, the old place is there: {path.exists()}")
    kept = len(again) == 12 and len(told) == 1
    return Outcome(SURVIVED if kept else FAILED, f"one warning, {len(again)} of 12 steps kept, training goes on")


FAULTS = [
    Fault("a flipped bit anywhere", "none", flips),
    Fault("a file cut short, or lengthened", "none", truncations),
    Fault("a file or folder gone", "none", lost_files),
    Fault("a chunk in the place of another", "none", exchanged),
    Fault("damage to a Gram's or attribution's store", "none", damaged_computation),
    Fault("a newer, older or unknown format", "none", versions),
    Fault("store moved, also while it is open", "none", moved),
]
