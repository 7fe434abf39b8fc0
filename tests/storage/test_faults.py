"""Damage is found and named, and never read as numbers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Recording, generator, record
from stores import opened, same, written

import pathkernel as pk
from pathkernel.errors import CorruptBlockError, InputError, ModelMismatchError, RecordingError, StoreError
from pathkernel.runtime.checksum import crc32c
from pathkernel.storage import disk, step_writer
from pathkernel.storage import writer_thread as writer
from pathkernel.storage.blocks import _write_bytes
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import Group, arrays
from pathkernel.storage.format.groups import checksum
from pathkernel.storage.packing import PackingError, pack, unpack


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, Path]:
    run = record(optimizer="adam", dtype=torch.float32)
    path = tmp_path_factory.mktemp("store") / "run"
    written(run.trajectory, path, flush_every=2)
    return run, path


@pytest.fixture
def store(original: tuple[Recording, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[1], tmp_path / "run"))


def data_files(path: Path) -> list[str]:
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.stat().st_size)
    return [name for name in files if name != "lock"]


def outcome(run: Recording, path: Path) -> str:
    """What a reader gets: every step right, or an error; anything else fails."""
    try:
        trajectory = opened(run, path)
        for index in range(len(run.trajectory)):
            same(run.trajectory.store.read(index), trajectory.store.read(index), f"step {index}")
        for name in ("initial", "constants", "tail", "final_buffers"):
            same(getattr(run.trajectory, name), getattr(trajectory, name), name)
    except (StoreError, ModelMismatchError) as error:
        return type(error).__name__
    assert len(trajectory) == len(run.trajectory)
    return "right"


def test_a_flipped_bit_anywhere_is_found(original: tuple[Recording, Path], store: Path) -> None:
    run, rng = original[0], generator(0)
    outcomes: dict[str, int] = {}
    for name in data_files(store) * 4:
        raw = bytearray((store / name).read_bytes())
        place = int(torch.randint(len(raw) * 8, (), generator=rng))
        raw[place // 8] ^= 1 << place % 8
        kept = (store / name).read_bytes()
        (store / name).write_bytes(raw)
        got = outcome(run, store)
        assert got != "right" or name.endswith("zarr.json"), name  # where some text is only there to be read by people
        outcomes[got] = outcomes.get(got, 0) + 1
        (store / name).write_bytes(kept)
    assert outcome(run, store) == "right"
    assert sum(outcomes.values()) > 80


def test_a_file_cut_or_lost_is_found(original: tuple[Recording, Path], store: Path) -> None:
    run = original[0]
    for name in data_files(store):
        kept = (store / name).read_bytes()
        for size in (0, 1, len(kept) // 2, len(kept) - 1, None):
            if size is None:
                (store / name).unlink()
            else:
                (store / name).write_bytes(kept[:size])
            assert outcome(run, store) != "right", (name, size)
            (store / name).write_bytes(kept)


def test_the_steps_that_are_hit_are_named_and_the_others_stay(original: tuple[Recording, Path], store: Path) -> None:
    run = original[0]
    file = store / "theta-0" / "c" / "1" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    trajectory = opened(run, store)
    with pytest.raises(CorruptBlockError, match=r"theta-0/c/1/0: its checksum is wrong \(steps 2–3\)"):
        trajectory.store.read(3)
    for index in (0, 1, 4, 5):
        same(run.trajectory.store.read(index), trajectory.store.read(index))
    (problem,) = DiskStore.open(store).verify()
    assert "steps 2–3" in str(problem)


def test_a_chunk_in_the_place_of_another_is_found(original: tuple[Recording, Path], store: Path) -> None:
    for name in ("theta-0/c/{}/0", "gradient-0/c/{}/0", "log/c/{}", "commit/c/{}"):
        kept = (store / name.format(1)).read_bytes()
        shutil.copy(store / name.format(0), store / name.format(1))
        assert outcome(original[0], store) == "CorruptBlockError", name
        (store / name.format(1)).write_bytes(kept)


def changed(path: Path, change: Any, file: str = "zarr.json") -> None:
    content = json.loads((path / file).read_text())
    change(content)
    if "checksum" in content.get("attributes", {}):
        content["attributes"]["checksum"] = checksum(content["attributes"])
    (path / file).write_text(json.dumps(content))


def test_newer_format(store: Path) -> None:
    changed(store, lambda c: c["attributes"].update(version=5, versions={"pathkernel": "9.1"}))
    with pytest.raises(StoreError, match=r"has version 5 of the format, .* Install pathkernel 9\.1 or later"):
        DiskStore.open(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["attributes"].update(format="other"), "holds 'other'"),
        (lambda c: c["attributes"].update(dtype="object"), "the header makes no sense"),
        (lambda c: c["attributes"]["regions"][0][0].update(shape=[2**60]), "the header makes no sense"),
        (lambda c: c["attributes"]["regions"][0][0].update(shape=[-1]), "the header makes no sense"),
        (lambda c: c["attributes"].update(start=2**62), "the header makes no sense"),
        (lambda c: c["attributes"]["end"].update(values=["../../etc", 10]), "is no name of an array"),
        (lambda c: c.update(node_type="array"), "is not that of a zarr v3 group"),
    ],
)
def test_hostile_header(original: tuple[Recording, Path], store: Path, change: Any, message: str) -> None:
    changed(store, change)
    with pytest.raises(StoreError, match=message):
        opened(original[0], store).final_buffers  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["chunk_grid"]["configuration"].update(chunk_shape=[2**40, 2**40]), "is larger than"),
        (lambda c: c.update(shape=[2**60, 9]), "sizes or type outside the limits"),
        (lambda c: c.update(data_type="object"), "sizes or type outside the limits"),
        (lambda c: c["codecs"].append({"name": "numcodecs.pickle"}), "codecs"),
        (lambda c: c.update(chunk_grid={"name": "rectilinear"}), "another grid of chunks"),
        (lambda c: c.update(storage_transformers=[{"name": "x"}]), "another encoding of chunk keys"),
        (lambda c: c["codecs"][1]["configuration"].update(cname="snappy"), "another compressor"),
        (lambda c: c["codecs"][0].update(configuration={"endian": "big"}), "big-endian"),
        (lambda c: c.update(shape=["a", 9]), "shapes are not shapes"),
        (lambda c: c.update(zarr_format=2), "no zarr v3 array"),
        (lambda c: c["chunk_grid"]["configuration"].update(chunk_shape=[2, 3]), "has chunks of another form"),
    ],
)
def test_hostile_array(original: tuple[Recording, Path], store: Path, change: Any, message: str) -> None:
    changed(store, change, "theta-0/zarr.json")
    with pytest.raises(CorruptBlockError, match=message):
        opened(original[0], store).store.read(0)


def test_links_are_not_followed(original: tuple[Recording, Path], store: Path, tmp_path: Path) -> None:
    file = store / "theta-0" / "c" / "1" / "0"
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(CorruptBlockError, match="is a link or lies behind one"):
        opened(original[0], store).store.read(2)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        pack(1)[:-1],
        b"\x10\0\0\0\0\0\0\0" + b'{"tensors":[1,2]',
        *(
            len(text).to_bytes(8, "little") + text.encode()
            for text in (
                '{"tensors":[["float64",[1000000000000],0]],"value":{"tensor":0}}',
                '{"tensors":[["object",[1],0]],"value":{"tensor":0}}',
                '{"tensors":[["float64",[1],-8]],"value":{"tensor":0}}',
                '{"tensors":[],"value":{"pickle":"x"}}',
                '{"tensors":[],"value":{"float":"00"}}',
                '{"tensors":[],"value":' + "[" * 100_000 + "]" * 100_000 + "}",
            )
        ),
    ],
)
def test_hostile_records(raw: bytes) -> None:
    with pytest.raises(PackingError):
        unpack(raw)


def test_what_has_no_form_is_refused() -> None:
    for value, message in ((object(), "a builtins.object"), (torch.eye(2).to_sparse(), "sparse")):
        with pytest.raises(RecordingError, match=message):
            pack({"value": value})


def test_identity(original: tuple[Recording, Path], store: Path) -> None:
    run = original[0]
    data, loss = (run.X, run.y), run.loss
    good: dict[str, Any] = {"model": run.model, "loss": loss, "data": data}
    wider = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    other_rows = run.X.clone()
    other_rows[3, 1] += 1e-6
    for change, message in (
        ({"model": wider}, r"model: `0\.weight` is \(6, 4\) float32, not \(5, 4\) float32"),
        ({"model": run.start}, "weights: they are not those at the end"),
        ({"loss": torch.nn.MSELoss()}, r"loss: name is torch\.nn\.modules\.loss\.MSELoss"),
        ({"data": (other_rows, run.y)}, "data: its content differs"),
        ({"data": (run.X[:9], run.y[:9])}, "data: count is 9, not 10"),
        ({"regularizers": {"l2": lambda p: p}}, r"regularizers: \['l2'\], not \[\]"),
    ):
        with pytest.raises(ModelMismatchError, match=message):
            pk.Trajectory.open(store, **{**good, **change})
    from pathkernel.update_rules.sgd import SGD

    with pytest.raises(StoreError, match=r"recorded under the update rule 'Adam'.*SGD was passed"):
        pk.Trajectory.open(store, **good, rule=SGD())


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        DiskStore.open(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"flush_every": 0}, "flush_every=0"), ({"on_error": "x"}, "on_error='x'"), ({"compression": 3}, "compression=3")],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DiskStore("x", **options)


def test_a_store_that_is_there_is_not_overwritten(original: tuple[Recording, Path], store: Path) -> None:
    with pytest.raises(StoreError, match="holds a store already"):
        DiskStore(store).begin(original[0].trajectory.run)


def test_folder_that_cannot_be_written(original: tuple[Recording, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        DiskStore(tmp_path / "file" / "run").begin(original[0].trajectory.run)
    with pytest.raises(StoreError, match="cannot be written"):
        Group.create(tmp_path / "file" / "run", {})


@pytest.mark.parametrize("on_error", ["stop", "raise"])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: str) -> None:
    full = False
    plain = arrays.write_atomically

    def writing(path: Path, pieces: Any, durable: bool = False) -> None:
        if full and "c" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(path, pieces, durable)

    monkeypatch.setattr(arrays, "write_atomically", writing)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    X, y = torch.randn(10, 4), torch.randint(3, (10,))
    loss = torch.nn.CrossEntropyLoss()
    store = DiskStore(tmp_path / "run", flush_every=2, on_error=on_error)
    recorder = pk.KernelRecorder(model, optimizer, loss, data=(X, y), store=store)
    recorder.start()

    def train(steps: int) -> None:
        nonlocal full
        for s in range(steps):
            full = full or len(store) >= 6
            x, target = recorder.batch([s % 10, 1])
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()

    train(6)
    store.flush()
    before = model.weight.clone()
    if on_error == "raise":
        with pytest.raises(StoreError, match=r"No space left on device.*first 6 steps are kept"):
            train(40)
        return
    with pytest.warns(RuntimeWarning, match=r"No space left on device; .* MB free\).*first 6 steps are kept") as seen:
        train(40)
        recorder.close()
    assert len(seen) == 1 and not torch.equal(before, model.weight)
    assert store.stopped and len(store) == 6
    again = DiskStore.open(tmp_path / "run")
    assert len(again) == 6 and not again.verify()


def test_what_the_writer_meets_surfaces(tmp_path: Path) -> None:
    run = record(optimizer="sgd")
    store = DiskStore(tmp_path / "run", flush_every=1)
    trajectory = run.trajectory
    store.begin(trajectory.run)
    store.append(trajectory.store.read(0))
    store.append(replace(trajectory.store.read(1), hyperparameters=({"lr": object()},)))
    with pytest.raises(RecordingError, match=r"A step holds a builtins\.object"):
        store.flush()
    store.close()
    assert len(DiskStore.open(tmp_path / "run")) == 1


def small_training(store: DiskStore) -> tuple[pk.KernelRecorder, Any]:
    torch.manual_seed(0)
    model, loss = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pk.KernelRecorder(
        model, optimizer, loss, data=(torch.randn(10, 4), torch.randint(3, (10,))), store=store, audit_every=0
    )

    def take(steps: int) -> None:
        for s in range(steps):
            x, target = recorder.batch([s % 10, 1])
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()

    return recorder, take


def test_store_that_is_moved_while_it_is_written(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "run", flush_every=2)
    recorder, take = small_training(store)
    with recorder:
        take(4)
        store.flush()
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.warns(RuntimeWarning, match="first 4 steps are kept") as seen:
            take(12)
            store.flush()
    assert len(seen) == 1 and not (tmp_path / "run").exists()
    again = DiskStore.open(tmp_path / "elsewhere")
    assert len(again) == 4 and not again.verify()


def test_disk_full_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writing(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(arrays, "write_atomically", writing)
    recorder, _ = small_training(DiskStore(tmp_path / "run"))
    with pytest.raises(StoreError, match=r"cannot be written \(No space left on device\)"):
        recorder.start()
    monkeypatch.undo()
    recorder, take = small_training(DiskStore(tmp_path / "run"))
    with recorder:  # nobody holds the lock
        take(3)
    assert len(DiskStore.open(tmp_path / "run")) == 3


def test_nothing_is_written_behind_a_link(original: tuple[Recording, Path], tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "run", flush_every=1)
    recorder, take = small_training(store)
    with recorder:
        take(2)
        outside = tmp_path / "outside"
        outside.mkdir()
        (tmp_path / "run" / "theta-0" / "c" / "2").symlink_to(outside)
        with pytest.raises(CorruptBlockError, match="is a link, behind which nothing is written"):
            take(2)
    assert not list(outside.iterdir())


def interrupted(path: Path, place: tuple[str, int] | None) -> tuple[int, list[tuple[str, int]]]:
    """Train until Ctrl-C comes before the second visit to a line; the steps that were taken, and all lines visited."""
    visited: list[tuple[str, int]] = []

    def trace(frame: Any, event: str, _: Any) -> Any:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        written = file in (disk.__file__, step_writer.__file__) and function in ("append", "_complete", "flush")
        if file != writer.__file__ and not written:
            return None
        if event == "line":
            visited.append((file, frame.f_lineno))
            if visited[-1] == place and visited.count(place) == 2:
                raise KeyboardInterrupt
        return trace

    store, taken = DiskStore(path, flush_every=2), 0
    recorder, take = small_training(store)
    with contextlib.suppress(KeyboardInterrupt), recorder:
        sys.settrace(trace)
        try:
            while taken < 7:
                take(1)
                taken += 1
            store.flush()
        finally:
            sys.settrace(None)
    return taken, visited


@pytest.mark.slow
def test_ctrl_c_at_any_line_of_the_store_loses_no_step(tmp_path: Path) -> None:
    _, lines = interrupted(tmp_path / "whole", None)
    assert len(set(lines)) > 30
    for number, place in enumerate(dict.fromkeys(lines)):
        path = tmp_path / str(number)
        taken, _ = interrupted(path, place)
        store = DiskStore.open(path)
        assert len(store) >= taken and not store.verify(), place


def test_record_that_is_none(original: tuple[Recording, Path], store: Path) -> None:
    """With checksums that are right."""
    opened = DiskStore.open(store)
    blocks = opened._there.blocks
    commit = blocks.commit(0)
    for value in (torch.zeros(3), [1], {"block": 0, "first": 0, "steps": [{}, {}], "streams": [], "checksums": {}}):
        raw = pack(value)
        _write_bytes(blocks.array("log"), commit.log_start, raw)
        blocks._write_commit(replace(commit, log_bytes=len(raw), log_checksum=crc32c(raw)))
        again = DiskStore.open(store)
        for read, *more in ((again.read,), (again.vector,), (again.columns, [slice(0, 2)])):
            with pytest.raises(CorruptBlockError, match=r"\(steps 0–1\)"):
                read(0, *more)
        assert again.verify()
