"""Thinned records and records with keyframes on disk, against the same runs in memory and opened in a new process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, generator, make_inputs
from stores import same
from torch import nn

import pathkernel as pk
from pathkernel import errors
from pathkernel.runtime.checksum import checksum
from pathkernel.storage import being_written
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.encoding import BlockEncoder
from pathkernel.storage.header import Header
from pathkernel.trajectory.replay import ReplayStore
from pathkernel.trajectory.schedule import Schedule
from pathkernel.trajectory.step import Step

CE = nn.CrossEntropyLoss()
STEPS, EVERY = 14, 4
KEYFRAMES = Schedule(keyframes=EVERY)
LEVELS = {"keyframes": KEYFRAMES, "every": Schedule(every=3), "weights": Schedule(keep="weights")}


def model_of(width: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.4), nn.Linear(width, 3)
        )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    return make_inputs(20, dtype=torch.float32), torch.randint(3, (20,), generator=generator(2))


def train(
    store: Any,
    schedule: Schedule | None,
    optimizer: Any = "adamw",
    *,
    parts: int = 1,
    clip: tuple[int, ...] = (),
    shrink: tuple[int, ...] = (),
    closure: bool = False,
    steps: int = STEPS,
    width: int = 8,
    **options: Any,
) -> pk.Trajectory:
    model, order = model_of(width), generator(3)
    opt = (OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer)(model.parameters())
    torch.manual_seed(4)

    def passes() -> torch.Tensor:
        opt.zero_grad()
        for _ in range(parts):
            x, target = recorder.batch(torch.randint(20, (5,), generator=order))
            value = CE(model(x), target)
            (value / parts).backward()
        return value

    with pk.KernelRecorder(model, opt, CE, data=data(), store=store, schedule=schedule, **options) as recorder:
        for step in range(steps):
            if closure:
                opt.step(passes)
            else:
                passes()
                if step in clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                opt.step()
            if step in shrink:
                with recorder.channel("shrink"), torch.no_grad():
                    model[0].weight.mul_(0.9)
    model.eval()
    return recorder.trajectory


def opened(run: pk.Trajectory, path: Path, **options: Any) -> pk.Trajectory:
    return pk.Trajectory.open(path, model=run.model, loss=CE, data=data(), **options)


def unordered(step: Step) -> Step:
    """The same for every order in which a set was filled."""
    return replace(step, active=frozenset(sorted(step.active)))


def same_paths(one: pk.Trajectory, other: pk.Trajectory) -> None:
    """Every number of every step to the last bit, and the same tensors shared."""
    assert one.schedule == other.schedule and len(one) == len(other)
    for name in ("initial", "constants", "initial_memory", "tail", "final_buffers", "layout"):
        same(getattr(one, name), getattr(other, name), name)
    steps = list(one.steps()), list(other.steps())
    for step, again in zip(*steps, strict=True):
        same(unordered(step), unordered(again), f"step {step.index}")
    for (a, b), (c, d) in zip(pairwise(steps[0]), pairwise(steps[1]), strict=True):
        assert (a.after is b.before) == (c.after is d.before) and (a.buffers is b.buffers) == (c.buffers is d.buffers)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"parts": 3},
    "clipped": {"clip": tuple(range(STEPS))},
    "clipped_once": {"clip": (6,)},
    "changed": {"shrink": (2, 3, 7, STEPS - 1)},
    "closure": {"closure": True},
}


@pytest.mark.filterwarnings("ignore:The batches of step")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_level_on_disk_is_the_level_in_memory(tmp_path: Path, level: str, variant: str) -> None:
    path, options = tmp_path / "run", VARIANTS[variant]
    in_memory = train(None, LEVELS[level], **options)
    on_disk = train(DiskStore(path, flush_every=3), LEVELS[level], **options)
    again = opened(on_disk, path)
    same_paths(in_memory, on_disk)
    same_paths(in_memory, again)
    for one, other in zip(again.segments(reverse=True), in_memory.segments(reverse=True), strict=True):
        same((one.start, one.end, one.channel, one.buffers), (other.start, other.end, other.channel, other.buffers))
    assert not DiskStore.open(path).verify()


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "Adamax", "NAdam", "RAdam", "Adagrad", "RMSprop", "amsgrad", "lr"])
def test_the_state_of_every_optimizer(tmp_path: Path, optimizer: str) -> None:
    own = {
        "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
        "lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.013), foreach=False),
    }
    made = optimizer if optimizer in OPTIMIZERS else own.get(optimizer) or getattr(torch.optim, optimizer)
    in_memory, on_disk = (train(store, KEYFRAMES, made) for store in (None, tmp_path / "run"))
    same_paths(in_memory, opened(on_disk, tmp_path / "run"))


@pytest.mark.slow  # a new process imports torch
def test_shares_and_kernels_of_a_new_process(tmp_path: Path) -> None:
    paths = {level: tmp_path / level for level in LEVELS}
    runs = {level: train(path, LEVELS[level]) for level, path in paths.items()}
    torch.save(runs["keyframes"].model.state_dict(), tmp_path / "model.pt")  # each level trains to the same bits
    script = (
        "import sys, numpy as np, torch, pathkernel as pk\n"
        "from storage.test_levels_on_disk import CE, LEVELS, data, model_of, results\n"
        "model = model_of().eval()\n"
        f"model.load_state_dict(torch.load({str(tmp_path / 'model.pt')!r}))\n"
        f"folder = {str(tmp_path)!r}\n"
        "runs = {n: pk.Trajectory.open(f'{folder}/{n}', model=model, loss=CE, data=data()) for n in LEVELS}\n"
        "np.savez(folder + '/results.npz', **results(runs))\n"
    )
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    folders = [str(Path(__file__).parents[1]), str(Path(pk.__file__).parents[1])]
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    again = np.load(tmp_path / "results.npz")
    in_memory = results({level: train(None, schedule) for level, schedule in LEVELS.items()})
    assert set(again.files) == set(in_memory)
    for name, expected in in_memory.items():
        np.testing.assert_array_equal(again[name], expected)


def results(runs: dict[str, pk.Trajectory]) -> dict[str, np.ndarray]:
    """Shares where a level serves them, and the Gram matrix."""
    X = make_inputs(3, dtype=torch.float32, seed=9)
    grams = {f"{level} gram": np.asarray(pk.PathKernel(run)(X)) for level, run in runs.items()}
    shares = pk.KernelMachine(runs["keyframes"]).explain(X).shares
    return {**grams, "keyframes shares": np.asarray(shares)}


def test_schedules_are_found_again(tmp_path: Path) -> None:
    for level, schedule in LEVELS.items():
        run = train(tmp_path / level, schedule)
        again = opened(run, tmp_path / level)
        assert again.schedule == schedule and isinstance(again.store, ReplayStore) == (level == "keyframes")
        if level != "keyframes":
            with pytest.raises(errors.TrajectoryError, match="`KernelMachine` needs"):
                pk.KernelMachine(again)
        assert torch.equal(DiskStore.open(tmp_path / level).final(), again.final)


def test_little_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine a block would not fill in time, and be written in parts.
    monkeypatch.setattr("pathkernel.storage.writer_thread.PERIOD", 1000.0)

    def allocated(path: Path, *parts: str) -> float:
        files = [file for part in parts for file in path.glob(f"{part}/**/*") if file.is_file()]
        return sum(file.stat().st_size for file in files) / 32

    size = train(None, KEYFRAMES, width=4000, steps=1).layout.size
    for level, schedule in {"full": None, "keyframes": Schedule(keyframes=16), "every": Schedule(every=8)}.items():
        train(tmp_path / level, schedule, width=4000, steps=32)
    full, keyframes, every = (allocated(tmp_path / name, "*-0") for name in ("full", "keyframes", "every"))
    assert full > 9 * size
    assert keyframes < 1.05 * (3 * 4 * size / 16) and every < 4 * size * (4 + 1) / 32
    names = {path.name for path in (tmp_path / "keyframes").iterdir() if path.is_dir()}
    assert names == {"commit", "log", "start", "optimizer", "end-1", "extra-0"}
    assert not (tmp_path / "every" / "gradient-0").exists()


class Tired(torch.optim.SGD):
    """SGD that steps by less from its seventh step on, and forgets how many it took when it is copied."""

    def step(self, closure: Any = None) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p -= (group["lr"] if self.calls < 7 else 0.1 * group["lr"]) * p.grad


@pytest.mark.parametrize("flush_every", [3, 5, 16])
def test_steps_in_full_after_abridged_ones(tmp_path: Path, flush_every: int) -> None:
    runs = []
    for store in (None, DiskStore(tmp_path / "run", flush_every=flush_every)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options = {"rule": "elementwise", "audit_every": 1}
            runs.append(train(store, KEYFRAMES, lambda p: Tired(p, lr=0.1), **options))
        assert len(caught) == 1 and "Step 6 of elementwise convention does not come out" in str(caught[0].message)
    again = opened(runs[1], tmp_path / "run", optimizer=Tired, rule=None)
    same_paths(*runs)
    same_paths(runs[0], again)
    stored = [again.store.inner.read(s) for s in range(STEPS)]  # type: ignore[attr-defined]
    assert [step.replay is not None for step in stored] == [s < 6 for s in range(STEPS)]
    assert [s.index for s in stored if s.replay and s.before.numel()] == [0, EVERY]


def test_a_recording_that_was_cut_off_is_replayed_as_far_as_it_was_written(tmp_path: Path) -> None:
    full, model, X, y = train(None, None), model_of(), *data()
    opt, order = OPTIMIZERS["adamw"](model.parameters()), generator(3)
    torch.manual_seed(4)
    store = DiskStore(tmp_path / "run", flush_every=3)
    with pk.KernelRecorder(model, opt, CE, data=(X, y), store=store, schedule=KEYFRAMES) as recorder:
        for _ in range(7):
            x, target = recorder.batch(torch.randint(20, (5,), generator=order))
            opt.zero_grad()
            CE(model(x), target).backward()
            opt.step()
        store.flush()
        shutil.copytree(tmp_path / "run", tmp_path / "cut")
        again = opened(recorder.trajectory, tmp_path / "cut")
        assert len(again) == 7
        assert "θ at step 7 was asked of" in refusal(DiskStore.open(tmp_path / "cut").final)
        for s in range(7):
            for name in ("before", "after", "gradient"):
                assert torch.equal(getattr(again.store.read(s), name), getattr(full.store.read(s), name))


def test_the_last_stretch_is_written_when_the_process_ends(tmp_path: Path) -> None:
    run = train(None, LEVELS["every"], steps=5)
    model, X, y = model_of(), *data()
    opt, order = OPTIMIZERS["adamw"](model.parameters()), generator(3)
    torch.manual_seed(4)
    store = DiskStore(tmp_path / "run")
    recorder = pk.KernelRecorder(model, opt, CE, data=(X, y), store=store, schedule=LEVELS["every"])
    recorder.start()
    for _ in range(5):
        x, target = recorder.batch(torch.randint(20, (5,), generator=order))
        opt.zero_grad()
        CE(model(x), target).backward()
        opt.step()
    being_written._AT_EXIT[store]()
    assert len(DiskStore.open(tmp_path / "run")) == 2
    assert torch.equal(DiskStore.open(tmp_path / "run").final(), run.final)
    recorder.close()


# -- what is refused, and damage -----------------------------------------------------------------------------------


def refusal(act: Any) -> str:
    with pytest.raises(errors.StoreError) as caught:
        act()
    return str(caught.value)


def test_an_optimizer_of_your_own_has_to_be_passed_again(tmp_path: Path) -> None:
    run = train(tmp_path / "run", KEYFRAMES, lambda p: Tired(p, lr=0.1), steps=5, rule="elementwise")
    assert "Tired, and none was passed" in refusal(lambda: opened(run, tmp_path / "run"))
    message = refusal(lambda: opened(run, tmp_path / "run", optimizer=torch.optim.SGD))
    assert "torch.optim.sgd.SGD was passed" in message and "optimizer=YourOptimizer" in message
    same_paths(run, opened(run, tmp_path / "run", optimizer=Tired))


def test_points_between_keyframes_are_not_read_without_a_replay(tmp_path: Path) -> None:
    run = train(tmp_path / "run", KEYFRAMES)
    store = DiskStore.open(tmp_path / "run")
    assert torch.equal(store.vector(EVERY), run.vector(EVERY))
    message = refusal(lambda: store.vector(5))
    assert "θ at step 5 was asked of" in message and "Trajectory.open(path" in message


@pytest.mark.parametrize("level", LEVELS)
def test_a_record_goes_on_as_it_began(tmp_path: Path, level: str) -> None:
    train(tmp_path / "run", LEVELS[level])
    message = refusal(lambda: train(tmp_path / "run", None))
    assert f"holds a recording with `{LEVELS[level]!r}`" in message and "another path" in message
    with pytest.raises(errors.StoreError, match="the weights are those of its start"):
        train(tmp_path / "run", LEVELS[level])


def test_steps_in_full_that_are_copied_to_a_store_need_no_replay(tmp_path: Path) -> None:
    from stores import written

    run = train(None, KEYFRAMES)
    written(run, tmp_path / "run")
    again = opened(run, tmp_path / "run")
    assert again.schedule == Schedule() and isinstance(again.store, DiskStore)
    for step, other in zip(run.steps(), again.steps(), strict=True):
        same(step, other)


@pytest.mark.parametrize("array", ["extra-0", "log", "optimizer", "end-1"])
def test_damage_is_found(tmp_path: Path, array: str) -> None:
    run = train(DiskStore(tmp_path / "run", flush_every=3), KEYFRAMES)
    file = max(path for path in (tmp_path / "run" / array / "c").rglob("*") if path.is_file())
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)
    assert DiskStore.open(tmp_path / "run").verify()
    with pytest.raises(errors.CorruptBlockError):
        list(opened(run, tmp_path / "run").segments())


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": {"every": 0}}, {"schedule": {"each": 1}}, {"replay": None}, {"replay": {"optimizer": 3}}],
    ids=str,
)
def test_a_header_that_makes_no_sense(tmp_path: Path, wrong: dict[str, Any]) -> None:
    from pathkernel.storage.format import Group

    train(tmp_path / "run", KEYFRAMES, steps=2)
    group = Group(tmp_path / "run")
    group.set_attributes({**group.attributes(), **wrong})
    with pytest.raises(errors.CorruptBlockError, match="the header makes no sense"):
        DiskStore.open(tmp_path / "run")


def test_notes_survive(tmp_path: Path) -> None:
    run = train(tmp_path / "run", KEYFRAMES)
    notes = [DiskStore.open(tmp_path / "run").read(s).replay for s in range(STEPS)]
    assert [note.keyframe for note in notes] == [EVERY * (s // EVERY) for s in range(STEPS)]
    assert max(note.checksum for note in notes) >= 2**31 and len(run) == STEPS  # as unsigned numbers
    first = run.store.read(0)
    assert notes[0].gradient == checksum(run.layout.unflatten(first.gradient).values())
    assert notes[0].checksum == checksum(run.layout.unflatten(first.after).values())


# -- the length of a step ----------------------------------------------------------------------------------------------


def test_a_setting_of_the_users_own_is_no_length(tmp_path: Path) -> None:
    """An optimizer's groups may hold anything; measured by its length, the path is the same."""

    def own(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": list(parameters), "steps": 7, "length": 9}], lr=0.1)

    plain = pk.PathKernel(train(None, None, "sgd"), measure="uniform")
    X = data()[0]
    for level in (None, *LEVELS.values()):
        for store in (None, tmp_path / repr(level)):
            run = train(store, level, own)
            expected = [3] * 4 + [2] if level is not None and level.every == 3 else [1] * STEPS
            assert [step.length for step in run.steps()] == expected
            settings = [step.hyperparameters[0] for step in run.steps()]
            assert {(group["steps"], group["length"]) for group in settings} == {(7, 9)}
            kernel = pk.PathKernel(run, measure="uniform")
            assert kernel.total_weight == STEPS
            if level is None or level.every == 1:
                assert np.array_equal(kernel(X), plain(X))


def as_version_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write lengths as version 1 of the format did: among the settings of every group."""
    encode, to_json = BlockEncoder.encode, Header.to_json

    def old(self: BlockEncoder, steps: Any, previous: Any) -> Any:
        hidden = [
            replace(step, hyperparameters=tuple({**group, "steps": step.length} for group in step.hyperparameters))
            for step in steps
        ]
        block = encode(self, hidden, previous)
        for entry in block.record["steps"]:
            del entry["length"]
        return block

    monkeypatch.setattr(BlockEncoder, "encode", old)
    monkeypatch.setattr(Header, "to_json", lambda self: {**to_json(self), "version": 1})


@pytest.mark.parametrize("level", ["every", "weights"])
def test_thinned_stores_of_version_1_are_read(level: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        as_version_1(patched)
        run = train(tmp_path / "old", LEVELS[level])
    old, new = opened(run, tmp_path / "old"), train(tmp_path / "new", LEVELS[level])
    assert json.loads((tmp_path / "old" / "zarr.json").read_text())["attributes"]["version"] == 1
    assert json.loads((tmp_path / "new" / "zarr.json").read_text())["attributes"]["version"] == 4
    for one, other in zip(old.steps(), new.steps(), strict=True):
        assert one.length == other.length and one.hyperparameters == other.hyperparameters
    for measure in ("uniform", "learning_rate"):
        kernels = [pk.PathKernel(path, measure=measure)(data()[0]) for path in (old, new)]
        assert np.array_equal(*kernels)


def test_steps_that_were_pickled_without_a_length() -> None:
    for level in (None, *LEVELS.values()):
        for step in train(None, level).steps():
            state = {key: value for key, value in vars(step).items() if key not in ("length", "frozen")}
            if step.after.numel() and not step.gradient.numel():
                state["hyperparameters"] = tuple({**group, "steps": step.length} for group in step.hyperparameters)
            old = Step.__new__(Step)
            old.__setstate__(state)
            assert (old.length, old.hyperparameters) == (step.length, step.hyperparameters)


@pytest.mark.parametrize("length", [0, -1, 1.5, "3", True])
def test_a_length_that_makes_no_sense_is_damage(tmp_path: Path, length: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        encode = BlockEncoder.encode

        def wrong(self: BlockEncoder, steps: Any, previous: Any) -> Any:
            return encode(self, [replace(step, length=length) for step in steps], previous)

        patched.setattr(BlockEncoder, "encode", wrong)
        run = train(tmp_path / "wrong", LEVELS["every"])
    with pytest.raises(errors.CorruptBlockError, match=r"record of step 0 makes no sense .*length"):
        opened(run, tmp_path / "wrong").store.read(0)
