"""What was written to disk comes back to the last bit, lazily, and shared tensors are shared again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from cases import LOSSES, MODELS, OPTIMIZERS, SAMPLES, generator, make_inputs, make_model, record
from stores import opened, same, same_trajectories, written
from torch import nn

import pathkernel as pk
from pathkernel.storage.blocks import Region
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import Group
from pathkernel.storage.writer_thread import NICENESS, UnwrittenBlock, Writer

CE = nn.CrossEntropyLoss()


@pytest.mark.parametrize("flush_every", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(tmp_path: Path, flush_every: int, dtype: torch.dtype) -> None:
    run = record(optimizer="adam", dtype=dtype)
    written(run.trajectory, tmp_path / "run", flush_every=flush_every)
    same_trajectories(run.trajectory, opened(run, tmp_path / "run"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_round_trip_of_every_optimizer(tmp_path: Path, optimizer: str) -> None:
    run = record(optimizer=optimizer, dtype=torch.float32)
    written(run.trajectory, tmp_path / "run", flush_every=4)
    same_trajectories(run.trajectory, opened(run, tmp_path / "run"))


@pytest.mark.parametrize(("model", "loss"), [*((m, "ce_mean") for m in MODELS), *(("tanh", name) for name in LOSSES)])
def test_round_trip_of_every_model_and_loss(tmp_path: Path, model: str, loss: str) -> None:
    run = record(model=model, loss=loss)
    written(run.trajectory, tmp_path / "run")
    again = opened(run, tmp_path / "run")
    same_trajectories(run.trajectory, again)
    both = (run.trajectory, again)
    shares = [np.asarray(pk.KernelMachine(t).explain(run.queries).shares) for t in both]
    gram = [np.asarray(pk.PathKernel(t)(run.queries)) for t in both]
    assert np.array_equal(*shares) and np.array_equal(*gram)


def test_recorder_writes_what_it_would_remember(tmp_path: Path) -> None:
    def trained(store: Any) -> pk.Trajectory:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        X, y = make_inputs(SAMPLES, dtype=torch.float32), LOSSES["ce_mean"].targets(SAMPLES)
        recorder = pk.KernelRecorder(model, optimizer, CE, data=(X, y), averages={"ema": ema}, store=store)
        with recorder:
            for s in range(9):
                x, target = recorder.batch([s, 1, 2, 5], inputs=X[[s, 1, 2, 5]] * 1.5)
                if s == 4:
                    model[1].eval()
                optimizer.zero_grad()
                CE(model(x), target).backward()
                with recorder.channel("noise"):
                    if s % 3 == 0:
                        model[0].weight.grad += 0.1
                optimizer.step()
                with recorder.channel("clamp"), torch.no_grad():
                    if s % 2:
                        model[0].weight.clamp_(-0.3, 0.3)
                ema.update_parameters(model)
        return recorder.trajectory

    in_memory = trained(None)
    on_disk = trained(DiskStore(tmp_path / "run", flush_every=4))
    same_trajectories(in_memory, on_disk)
    again = opened(on_disk, tmp_path / "run")
    same_trajectories(in_memory, again)
    assert again.store.vector(3) is again.store.read(3).before
    shares = [pk.KernelMachine(t).explain(in_memory.data[torch.arange(2)][0]).shares for t in (in_memory, again)]
    assert np.array_equal(*map(np.asarray, shares))


def test_steps_can_be_read_while_they_wait(tmp_path: Path) -> None:
    run = record(optimizer="momentum")
    store = DiskStore(tmp_path / "run", flush_every=4)
    store.begin(run.trajectory.run)
    for step in run.trajectory.steps():
        store.append(step)
        for index in range(len(store)):
            same(run.trajectory.store.read(index), store.read(index), f"step {index} of {len(store)}")
    store.close()


def test_any_reader_of_zarr_sees_the_same_numbers(tmp_path: Path) -> None:
    run = record(optimizer="adam", dtype=torch.float32)
    written(run.trajectory, tmp_path / "run", flush_every=4)
    group = zarr.open_group(tmp_path / "run", mode="r", zarr_format=3)
    assert sorted(name for name, _ in group.arrays()) == Group(tmp_path / "run").arrays()
    rows = np.bitwise_xor.accumulate(group["theta-0"][0:5], axis=0).view(np.float32)
    for s in range(4):
        assert np.array_equal(rows[s], run.trajectory.vector(s).numpy())
    assert np.array_equal(group["gradient-0"][3].view(np.float32), run.trajectory.store.read(3).gradient.numpy())
    assert group["commit"][10:12].tolist() == [4, 2]


def test_late_parameters(tmp_path: Path) -> None:
    def trained(store: Any) -> pk.Trajectory:
        model = make_model("tanh", 3)
        head, rest = model[2], model[0]
        optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
        for p in rest.parameters():
            p.requires_grad_(False)
        X, y = make_inputs(SAMPLES), LOSSES["ce_mean"].targets(SAMPLES)
        with pk.KernelRecorder(model, optimizer, CE, data=(X, y), store=store) as recorder:
            for s in range(7):
                if s == 3:
                    for p in rest.parameters():
                        p.requires_grad_(True)
                    optimizer.add_param_group({"params": list(rest.parameters()), "lr": 0.02})
                x, target = recorder.batch([s, 1, 2])
                optimizer.zero_grad()
                CE(model(x), target).backward()
                optimizer.step()
        return recorder.trajectory

    in_memory, on_disk = trained(None), trained(DiskStore(tmp_path / "run", flush_every=2))
    same_trajectories(in_memory, on_disk)
    again = opened(on_disk, tmp_path / "run")
    same_trajectories(in_memory, again)
    whole = [slice(0, again.layout.size), slice(2, 9), slice(30, 43)]
    for s in range(7):
        for got, want in zip(opened(on_disk, tmp_path / "run").store.columns(s, whole), whole, strict=True):
            same(got, in_memory.vector(s)[want], f"columns of {s}")


class Counted(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.arange(4.0) + i, i % 3


def test_opening_reads_no_large_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathkernel.storage.format import arrays, files

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4000), nn.ReLU(), nn.Linear(4000, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pk.KernelRecorder(model, optimizer, CE, data=Counted(), store=tmp_path / "run", audit_every=0) as recorder:
        for _ in range(20):
            x, y = recorder.batch([1, 2, 3])
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    read: list[tuple[str, int]] = []
    plain = files.read_file

    def counting(root: Path, relative: str, limit: int) -> bytes:
        content = plain(root, relative, limit)
        read.append((relative, len(content)))
        return content

    monkeypatch.setattr(arrays, "read_file", counting)
    monkeypatch.setattr(files, "read_file", counting)
    trajectory = pk.Trajectory.open(tmp_path / "run", model=model, loss=CE, data=Counted())
    assert len(trajectory) == 20
    assert sum(size for _, size in read) < 20_000 < 0.01 * trajectory.store.size_bytes()
    assert not [name for name, _ in read if name.startswith(("theta", "gradient", "start"))]
    same(trajectory.initial, recorder.trajectory.initial)
    same(trajectory.final, recorder.trajectory.final)


def test_moved_store(tmp_path: Path) -> None:
    run = record()
    written(run.trajectory, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    same_trajectories(run.trajectory, opened(run, tmp_path / "elsewhere"))


def test_random_values(tmp_path: Path) -> None:
    from pathkernel.storage.packing import pack, unpack

    value = {
        "floats": (0.1, -0.0, float("inf"), float("nan"), 1e-320, 2**53 + 1.0),
        1: [True, 1, None, "text — ü", ()],
        "tensors": [torch.randn(3, 2, generator=generator(0)), torch.zeros(0, 4), torch.tensor(2.0).bfloat16()],
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "view": torch.arange(12.0).reshape(3, 4).T,
        "type": torch.float16,
    }
    same(value, unpack(pack(value)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_blocks_on_disk_are_let_go_of_and_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bytes, int]] = []
    advise = os.posix_fadvise

    def watched(descriptor: int, start: int, length: int, advice: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        asked.append((path.name, path.read_bytes(), advice))
        advise(descriptor, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", watched)
    model = nn.Linear(200, 100)
    optimizer, X = torch.optim.SGD(model.parameters(), lr=0.1), make_inputs(4, (200,), dtype=torch.float32)
    with pk.KernelRecorder(model, optimizer, nn.MSELoss(), data=(X, X[:, :100]), store=tmp_path / "run") as recorder:
        for _ in range(64):
            x, y = recorder.batch([0, 1, 2])
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    names = [name for name, _, _ in asked]
    assert {advice for _, _, advice in asked} == {os.POSIX_FADV_DONTNEED}
    assert sorted(set(names)) == ["0"], "chunks of θ and of gradients, one column of files each"
    # Four blocks of two arrays: each asked for once, and again when four more had been written.
    assert len(asked) == 8 + 4
    contents = [content for _, content, _ in asked]
    assert len(set(contents)) == 8, "what is asked for again is what it was"
    same_trajectories(recorder.trajectory, opened(recorder.trajectory, tmp_path / "run"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of single threads")
def test_the_writer_gives_way_to_training() -> None:
    mine, seen = os.getpriority(os.PRIO_PROCESS, 0), []
    writer = Writer(lambda block, steps: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
    trajectory = record().trajectory
    writer.begin(UnwrittenBlock(0, [trajectory.store.read(0)], None, Region(0, trajectory.layout)))
    writer.complete()
    writer.wait()
    writer.stop()
    assert seen == [max(mine, NICENESS)] and os.getpriority(os.PRIO_PROCESS, 0) == mine


RECORDING = """
import os, sys
import torch
from torch import nn
import pathkernel as pk

torch.set_num_threads(2)
model = nn.Conv2d(75, 200, 3).to(memory_format=torch.channels_last)  # whose state does not lie row by row
optimizer, X, y = torch.optim.AdamW(model.parameters()), torch.randn(8, 75, 3, 3), torch.randn(8, 200, 1, 1)
schedule = pk.Schedule(keyframes=2) if sys.argv[2] == "keyframes" else None
torch.randn(100_000).exp().sum()  # torch's own threads are there
recorder = pk.KernelRecorder(
    model, optimizer, nn.MSELoss(), data=(X, y), store=sys.argv[1], schedule=schedule
)
before = None
with recorder:
    for step in range(18):  # a block and a part of one
        x, target = recorder.batch([0, 1, 2])
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
        if before is None:
            before = len(os.listdir("/proc/self/task"))
    recorder.trajectory.store.flush()
    print(before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["steps", "keyframes"])
def test_writing_starts_no_threads_of_torch(tmp_path: Path, how: str) -> None:
    """Else there are more threads than cores, and OpenMP's go to sleep whenever they wait: three times as slow."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", RECORDING, str(tmp_path / "run"), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before == after
