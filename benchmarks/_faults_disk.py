"""The disk and who else uses it: full, read-only, out of power; two recorders, a reader while writing; the clock."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _faults_killed import Told, computed, forked
from _faults_table import FAILED, LOST, SURVIVED, WRONG, Bench, Fault, Outcome, first_sentence
from _faults_training import Reference, Training, bits, reference

from pathkernel.errors import PathKernelError, StoreError
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import files

STEPS = 40


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of its own, where this process may mount one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


def trained(path: Path, bench: Bench) -> tuple[Training, list[str]]:
    """Train on record while the disk gives out; the run, and the warnings."""
    training = Training("momentum")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        training.recorded(DiskStore(path, flush_every=bench.random.choice([1, 2, 4])), STEPS)
    return training, [str(w.message) for w in seen if "cannot be written any more" in str(w.message)]


def judged(path: Path, training: Training, told: list[str], whole: Reference) -> Outcome:
    """A store whose disk gave out: training went on, one warning, and what it says of the prefix is true."""
    if bits(training.model.state_dict()) != bits(whole.weights):
        return Outcome(WRONG, "training was led astray")
    if not (path / "zarr.json").exists():
        return Outcome(LOST, "no store")
    store = DiskStore.open(path)
    trajectory = (training if len(store) == STEPS else Training("momentum")).opened(path)
    if store.verify() or whole.wrong(trajectory):
        return Outcome(WRONG, f"a prefix of {len(store)} steps that is not the run's")
    complete = store.header is not None and store.header.end is not None
    if complete and not told:
        return Outcome(SURVIVED, "nothing: it was enough")
    if len(told) != 1 or f"the first {len(store)} steps are kept" not in told[0]:
        return Outcome(FAILED, f"{len(told)} warnings for {len(store)} steps: {told[:1]}")
    return Outcome(SURVIVED, "one warning with path, free space and steps kept; training goes on; the prefix is valid")


def full_disk(bench: Bench) -> Iterator[Outcome]:
    """A file system that is too small; then room is made, and recording goes on from a checkpoint."""
    whole = reference("momentum", STEPS)
    for _ in range(bench.count(2, 25)):
        place = bench.place()
        with small_disk(place, bench.random.randrange(80, 600, 4)) as mounted:
            if not mounted:
                yield from full_at_write(bench, 1)
                continue
            path = place / "run"
            try:
                training, told = trained(path, bench)
            except StoreError as error:
                refused = "No space left" in str(error) and not (path / "zarr.json").exists()
                yield Outcome(SURVIVED if refused else FAILED, "StoreError before training: no space for its start")
                continue
            outcome = judged(path, training, told, whole)
            if outcome.verdict == SURVIVED and told:
                subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
                again = Training("momentum")
                trajectory = again.recorded(path, STEPS)  # from the start: the prefix is overwritten by the same steps
                if whole.wrong(trajectory) or len(trajectory) != STEPS:
                    outcome = Outcome(WRONG, "recording that goes on is not the run")
            yield outcome


def full_at_write(bench: Bench, many: int | None = None) -> Iterator[Outcome]:
    """The n-th write fails, for every n."""
    whole = reference("momentum", STEPS)
    for n in bench.random.sample(range(180), many or bench.count(8, 60)):
        path, count = bench.place(), 0

        class Full(io.FileIO):
            def write(self, data: Any) -> int:
                nonlocal count
                count += 1
                if count < n:  # noqa: B023 - used at once
                    return int(super().write(data))
                if count == n and len(data) > 1:  # noqa: B023
                    return int(super().write(data[: len(data) // 2]))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def opened(place: Any, mode: str, buffering: int = -1, kind: Any = Full) -> Any:
            return kind(place, mode) if mode == "wb" else open(place, mode, buffering)

        try:
            with mock.patch.object(files, "open", opened, create=True):
                training, told = trained(path, bench)
        except StoreError as error:
            refused = "No space left" in str(error) and not (path / "zarr.json").exists()
            yield Outcome(SURVIVED if refused else FAILED, "StoreError before training: no space for its start")
            continue
        except Exception as error:
            yield Outcome(FAILED, first_sentence(error))
            continue
        yield judged(path, training, told, whole)


def read_only(bench: Bench) -> Iterator[Outcome]:
    """A folder that cannot be written: refused for recording, readable."""
    whole = reference("momentum", STEPS)
    for _ in range(bench.count(1, 5)):
        place = bench.place()
        with small_disk(place, 100_000) as mounted:
            training = Training("momentum")
            training.recorded(place / "run", STEPS)
            if mounted:
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            elif os.geteuid():
                for folder in [place, *(p for p in place.rglob("*") if p.is_dir())]:
                    folder.chmod(0o500)
            else:
                continue  # nothing is read-only for root, who may not mount either
            wrong = whole.wrong(training.opened(place / "run"))
            yield Outcome(WRONG if wrong else SURVIVED, "reading: every value right")
            for name in ("run", "other"):
                try:
                    Training("momentum").recorded(place / name, 2)
                    yield Outcome(FAILED, "recording was not refused")
                except StoreError as error:
                    told = "cannot be written" in str(error)
                    yield Outcome(SURVIVED if told else FAILED, "recording: StoreError with the reason")
            for folder in [place, *place.rglob("*")] if not mounted else []:
                folder.chmod(0o700)


# -- loss of power ----------------------------------------------------------------------------------------------------


class Journal:
    """What a process asked of the file system, in order, and what is sure to be there after the power is gone.

    After ``fsync`` of a file its content is; after ``fsync`` of a folder the names in it are. Anything else may be.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.events = root, []  # type: ignore[var-annotated]
        self.acknowledged: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        fsync, replace, mkdir, unlink = os.fsync, os.replace, Path.mkdir, Path.unlink

        def fsynced(descriptor: int) -> None:
            self.events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")), None))
            fsync(descriptor)

        def replaced(source: Any, target: Any) -> None:
            content = Path(source).read_bytes()
            self.events.append(("name", Path(target), (Path(source), content)))
            replace(source, target)

        def made(place: Path, *arguments: Any, **options: Any) -> None:
            new = not place.exists()
            mkdir(place, *arguments, **options)
            if new:
                self.events.append(("folder", place, None))

        def unlinked(place: Path, *arguments: Any, **options: Any) -> None:
            self.events.append(("gone", place, None))
            unlink(place, *arguments, **options)

        with (
            mock.patch.object(os, "fsync", fsynced),
            mock.patch.object(os, "replace", replaced),
            mock.patch.object(Path, "mkdir", made),
            mock.patch.object(Path, "unlink", unlinked),
        ):
            yield

    def after_power_loss(self, moment: int, target: Path, bench: Bench) -> None:
        """Write what is left at a moment under another root.

        The system has written what is older than some other moment. What came later and was not synchronised is there,
        damaged, or not.
        """
        events, written_until = self.events[:moment], bench.random.randrange(moment + 1)
        target.mkdir()
        last_sync = {place: i for i, (kind, place, _) in enumerate(events) if kind == "sync"}
        gone: set[Path] = set()
        for i, (kind, place, more) in enumerate(events):
            if kind not in ("name", "folder", "gone"):
                continue
            sure = i < written_until or last_sync.get(place.parent, -1) > i
            there = place.parent not in gone and (sure or bench.random.random() < 0.5)
            inside = target / place.relative_to(self.root.parent)
            if kind == "gone":
                if there and place.suffix != ".partial":
                    inside.unlink(missing_ok=True)
            elif kind == "folder":
                gone.discard(place) if there else gone.add(place)
                if there:
                    inside.mkdir(parents=True, exist_ok=True)
            elif there:
                source, content = more
                written = i < written_until or any(k == "sync" and p == source for k, p, _ in events[:i])
                if not written and bench.random.random() < 0.7:
                    content = content[: bench.random.randrange(len(content))] + bytes(bench.random.randrange(9))
                inside.write_bytes(content)


def power_loss(durable: bool, bench: Bench) -> Iterator[Outcome]:
    """The power goes at a random moment, and with it what was not synchronised."""
    whole = reference("momentum", STEPS)
    path = bench.place()
    journal, training = Journal(path), Training("momentum")
    with journal.listening(), training.recorder(DiskStore(path, flush_every=1, durable=durable)) as recorder:
        for step in training.train(recorder, STEPS):
            journal.acknowledged.append((len(journal.events), step))
    for _ in range(bench.count(10, 100)):
        moment, target = bench.random.randrange(len(journal.events)), bench.place()
        journal.after_power_loss(moment, target, bench)
        promised = max((step for event, step in journal.acknowledged if event <= moment), default=0)
        left = target / path.name
        try:
            trajectory = Training("momentum").opened(left)
            wrong = whole.wrong(trajectory)
        except PathKernelError as error:
            lost = durable and promised > 0
            yield Outcome(LOST if lost else SURVIVED, f"{type(error).__name__}: damage is found", promised)
            continue
        except Exception as error:
            yield Outcome(FAILED, first_sentence(error))
            continue
        if wrong:
            yield Outcome(WRONG, f"wrong: {wrong[:3]}")
        elif durable and len(trajectory) < promised:
            yield Outcome(LOST, f"{promised - len(trajectory)} steps lost", promised - len(trajectory))
        else:
            yield Outcome(SURVIVED, "a valid prefix", max(0, promised - len(trajectory)))
        shutil.rmtree(target)


# -- others -----------------------------------------------------------------------------------------------------------


def record_slowly(path: Path, flush_every: int, steps: int, told_at: Path) -> None:
    torch.set_num_threads(1)
    told, training = Told(told_at), Training("adamw")
    with training.recorder(DiskStore(path, flush_every=flush_every)) as recorder:
        for step in training.train(recorder, steps):
            told[0] = step
    told[1] = 1


def two_recorders(bench: Bench) -> Iterator[Outcome]:
    """A second recorder on the store of one that is at work, in another process and in this one."""
    for _ in range(bench.count(1, 10)):
        path = bench.place()
        told = Told(path.with_suffix(".told"))
        process = forked(record_slowly, path, 4, 100_000, told.path)
        while told[0] < 5 and process.is_alive():
            time.sleep(0.001)
        for _ in range(2):
            try:
                Training("adamw").recorded(path, 3)
                yield Outcome(WRONG, "two recorders on one store")
            except StoreError as error:
                named = f"process {process.pid} on" in str(error)
                yield Outcome(SURVIVED if named else FAILED, "StoreError with process, machine and time of the other")
        process.kill()
        process.join()
        training = Training("adamw")
        with training.recorder(path) as recorder:  # the lock went with the process
            next(training.train(recorder, 3))
            with contextlib.suppress(StoreError):
                Training("adamw").recorded(path, 3)
                yield Outcome(WRONG, "two recorders on one store in one process")
        yield Outcome(SURVIVED, "the lock of a dead process is free")


def reader_while_writing(bench: Bench) -> Iterator[Outcome]:
    """Readers that open the store while it grows see committed steps only, all of them right."""
    steps = bench.count(120, 400)
    whole = reference("adamw", steps)
    for flush_every in (1, 3, 16):
        path = bench.place()
        told, seen = Told(path.with_suffix(".told")), 0
        process = forked(record_slowly, path, flush_every, steps, told.path)
        for _ in range(bench.count(3, 40)):
            while not (path / "zarr.json").exists():
                time.sleep(0.001)
            store = DiskStore.open(path)
            chosen = [i for i in range(len(store)) if bench.random.random() < 0.1 or i >= len(store) - 4]
            wrong = [i for i in chosen if bits(store.read(i)) != whole.steps[i]]
            backwards = len(store) < seen
            seen = store.refresh()
            wrong += [seen - 1] if seen and bits(store.read(seen - 1)) != whole.steps[seen - 1] else []
            bad = wrong or backwards
            gets = f"wrong: {wrong[:3]}" if bad else "the committed steps, all right"
            yield Outcome(WRONG if bad else SURVIVED, gets)
        process.join(60)
        process.kill()


def clock(bench: Bench) -> Iterator[Outcome]:
    """Time and dates that go backwards, while recording and while computing; files from the future."""
    whole = reference("momentum", STEPS)

    def back(*_: Any) -> float:
        return bench.random.uniform(-1e9, 1e9)

    for _ in range(bench.count(2, 10)):
        path, training = bench.place(), Training("momentum")
        with mock.patch("time.time", back), mock.patch("time.monotonic", back), mock.patch("time.perf_counter", back):
            training.recorded(DiskStore(path, flush_every=4), STEPS)
            for place in path.rglob("*"):
                when = bench.random.uniform(0, 4e9)
                os.utime(place, (when, when))
            trajectory = training.opened(path)
            wrong = whole.wrong(trajectory)
            gram = computed("gram", trajectory, bench.place())
        same = gram.tobytes() == computed("gram", trajectory, bench.place()).tobytes()
        yield Outcome(SURVIVED if same and not wrong else WRONG, "nothing: the same bits")


FAULTS = [
    Fault("disk full, then room is made", "steps after the warning", full_disk),
    Fault("disk full at the n-th write", "steps after the warning", full_at_write),
    Fault("read-only folder", "none", read_only),
    Fault("power loss, durable=True", "none", lambda bench: power_loss(True, bench)),
    Fault("power loss, durable=False", "what the system had not written", lambda bench: power_loss(False, bench)),
    Fault("two recorders on one store", "none", two_recorders),
    Fault("reader while writing", "none", reader_while_writing),
    Fault("clock going backwards", "none", clock),
]
