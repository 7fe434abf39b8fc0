"""Ctrl-C at a moment, in a session that goes on afterwards: what stands as it stood, and does the same call go on?

A moment is the beginning of a line of Python or of a function, in the package, in torch or anywhere else.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from _faults_table import FAILED, LOST, SURVIVED, WRONG, Bench, Fault, Outcome, first_sentence
from _faults_training import Training, bits, reference

import pathkernel as pk
from pathkernel.errors import ModelMismatchError
from pathkernel.storage import being_written, disk, step_writer, stored_steps
from pathkernel.storage import writer_thread as writer
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import Lock
from pathkernel.testing import interrupted

STEPS = 12
THE_STORE = being_written, disk, step_writer, stored_steps, writer


def anywhere(frame: FrameType) -> bool:
    """Everywhere but in the user's own loop, and at the very entry of the end of its `with`."""
    ends = frame.f_code is pk.KernelRecorder.__exit__.__code__
    return not ends and frame.f_code.co_filename not in (__file__, Training.__init__.__code__.co_filename)


def in_the_store(frame: FrameType) -> bool:
    return frame.f_code.co_filename in {part.__file__ for part in THE_STORE}


@contextlib.contextmanager
def in_time(seconds: int = 30) -> Iterator[None]:
    """A lock that Ctrl-C left taken makes the next call wait for ever: that is a fault, and no reason to hang."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the call after Ctrl-C hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def recordings(at: Callable[[FrameType], bool], quick: int, full: int) -> Callable[[Bench], Iterator[Outcome]]:
    """Ctrl-C into a recording, which is then read, and gone on with in the same session."""

    def train(training: Training, store: DiskStore) -> None:
        with training.recorder(store, audit_every=5) as recorder:
            for _ in training.train(recorder, STEPS):
                pass

    def trials(bench: Bench) -> Iterator[Outcome]:
        whole = reference("momentum", STEPS)
        many = interrupted(lambda: train(Training("momentum"), DiskStore(bench.place(), flush_every=4)), at=at)
        for moment in sorted(bench.random.sample(range(1, many), bench.count(quick, full))):
            path, training = bench.place(), Training("momentum")
            with torch.enable_grad():  # torch's optimizers do not always put it back
                try:
                    interrupted(lambda: train(training, DiskStore(path, flush_every=4)), moment, at)  # noqa: B023
                except KeyboardInterrupt:
                    pass
                except Exception as error:
                    yield Outcome(FAILED, f"moment {moment}: {first_sentence(error)}")
                    continue
            with in_time():
                outcome = examined(path, training, whole.steps, moment)
                if outcome.verdict == SURVIVED:
                    outcome = goes_on(path, training, whole.steps, moment) or outcome
            yield outcome
            if "hangs" in outcome.gets:
                return

    return trials


def examined(path: Path, training: Training, steps: list[str], moment: int) -> Outcome:
    """Whether all steps that were taken are on disk, and model and folder are free."""
    hooks = training.optimizer._optimizer_step_pre_hooks, training.optimizer._optimizer_step_post_hooks
    if any(hooks) or any(module._forward_hooks for module in training.model.modules()):
        return Outcome(FAILED, f"moment {moment}: hooks are left behind")
    try:
        if path.exists():
            with Lock(path):
                pass
        if not (path / "zarr.json").exists():
            return Outcome(LOST if training.step else SURVIVED, "no store yet: recording begins anew", training.step)
        store = DiskStore.open(path)
        found = [bits(store.read(i)) for i in range(len(store))]
        if found != steps[: len(found)] or store.verify():
            return Outcome(WRONG, f"moment {moment}: other steps")
        if len(found) < training.step:
            return Outcome(LOST, f"moment {moment}: {training.step - len(found)} steps", training.step - len(found))
        if found:
            training.opened(path).check_model("This benchmark")
    except Exception as error:
        return Outcome(FAILED, f"moment {moment}: {first_sentence(error)}")
    return Outcome(SURVIVED, "KeyboardInterrupt; every step that was taken is on disk; the session goes on")


def goes_on(path: Path, training: Training, steps: list[str], moment: int) -> Outcome | None:
    """Train on where the session stands; what is to be said of it."""
    before = len(DiskStore.open(path)) if (path / "zarr.json").exists() else 0
    try:
        with training.recorder(DiskStore(path)) as recorder:
            for _ in training.train(recorder, training.step + 2):
                pass
        found = [bits(step) for step in recorder.trajectory.steps()]
        recorder.trajectory.check_model("This benchmark")
    except ModelMismatchError as error:
        torn = "the optimizer's state is not" in str(error)  # within its step: half of its memory has moved on
        gets = "every step that was taken is on disk; going on asks for a checkpoint, for the optimizer's step is torn"
        return Outcome(SURVIVED, gets) if torn else Outcome(FAILED, f"moment {moment}: {first_sentence(error)}")
    except Exception as error:
        return Outcome(FAILED, f"moment {moment}: going on: {first_sentence(error)}")
    same = found[:before] == steps[:before] and len(found) == before + 2
    return None if same else Outcome(WRONG, f"moment {moment}: going on changed the path")


WORK: dict[str, Callable[[pk.Trajectory, torch.Tensor, Path], np.ndarray]] = {
    "gram": lambda trajectory, X, path: pk.PathKernel(trajectory, quadrature="left", steps=3)(X, store=path),
    "explain": lambda trajectory, X, _: np.asarray(pk.KernelMachine(trajectory).explain(X[:2], outputs=0).shares),
}


def computations(kind: str, quick: int, full: int) -> Callable[[Bench], Iterator[Outcome]]:
    """Ctrl-C into a computation, and then the same call in the same session."""

    def trials(bench: Bench) -> Iterator[Outcome]:
        training = Training("adamw")
        trajectory = training.recorded(bench.place(), STEPS)
        X = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
        work = lambda path: WORK[kind](trajectory, X, path)  # noqa: E731
        whole, before, counted = work(bench.place()), standing(training), bench.place()
        many = interrupted(lambda: work(counted))
        for moment in sorted(bench.random.sample(range(1, many), bench.count(quick, full))):
            path = bench.place()
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    interrupted(lambda: work(path), moment)  # noqa: B023
                if standing(training) != before:
                    yield Outcome(WRONG, f"moment {moment}: the model, or torch, is not as it was")
                    return
                with in_time():
                    same = work(path).tobytes() == whole.tobytes()
                gets = "KeyboardInterrupt; the model is as it was, and the same call goes on to the same bits"
                yield Outcome(SURVIVED, gets) if same else Outcome(WRONG, f"moment {moment}: another result")
            except TimeoutError as error:
                yield Outcome(FAILED, f"moment {moment}: {first_sentence(error)}")
                return
            except Exception as error:
                yield Outcome(FAILED, f"moment {moment}: {first_sentence(error)}")

    return trials


def standing(training: Training) -> list[Any]:
    """What a computation uses of the session and has to put back."""
    tensors = [*training.model.parameters(), *training.model.buffers()]
    flags = torch.is_grad_enabled(), torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    modes = len(torch.overrides._get_current_function_mode_stack()), torch.backends.cuda.flash_sdp_enabled()
    modules = [(m.training, len(m._forward_hooks), "forward" in vars(m)) for m in training.model.modules()]
    return [bits(tensors, torch.get_rng_state()), [id(tensor) for tensor in tensors], flags, modes, modules]


FAULTS = [
    Fault("Ctrl-C at any line of the store", "none", recordings(in_the_store, 8, 250)),
    Fault("Ctrl-C at any moment of a recording", "none", recordings(anywhere, 8, 300)),
    Fault("Ctrl-C at any moment of a Gram matrix", "the sum in hand", computations("gram", 5, 300)),
    Fault("Ctrl-C at any moment of an attribution", "all of it", computations("explain", 3, 100)),
]
