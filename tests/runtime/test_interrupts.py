"""Ctrl-C comes when nothing is half set, and is never taken for something else."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.recording.step_capture import StepCapture
from pathkernel.runtime.interrupts import defer_interrupts, deliver_interrupt, result_or_error
from pathkernel.storage.format import Lock
from pathkernel.testing import interrupted

INTERRUPTS = [16, pytest.param(80, marks=pytest.mark.exhaustive)]
"""Moments tried of each kind of work, spread over all of it."""


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal; a shell that puts the tests in the background leaves it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_waits_until_the_outermost_end() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        with defer_interrupts():
            press()
            reached.append("inner")
        reached.append("outer")
    assert reached == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_presses_twice_is_not_kept_waiting() -> None:
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        press()
        with pytest.raises(KeyboardInterrupt):
            press()


def test_it_may_come_earlier_where_that_is_said() -> None:
    with defer_interrupts(divisible=True):
        deliver_interrupt()  # there is none
        press()
        with pytest.raises(KeyboardInterrupt):
            deliver_interrupt()
        deliver_interrupt()  # it came once


def test_it_does_not_come_into_the_work_of_who_let_it_wait_first() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        with defer_interrupts():
            press()
            deliver_interrupt()
        reached.append("outer")
    assert reached == ["outer"]


def test_it_comes_into_the_work_of_who_lets_it_be_divided() -> None:
    with pytest.raises(KeyboardInterrupt), defer_interrupts(divisible=True), defer_interrupts(divisible=True):
        press()
        deliver_interrupt()
        pytest.fail("it was not delivered")


def test_it_does_not_come_between_passes_of_what_is_done_whole() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        with defer_interrupts(divisible=True):
            press()
            deliver_interrupt()
            reached.append("inner")
        deliver_interrupt()
        reached.append("outer")
    assert reached == ["inner", "outer"]


def test_a_function_can_be_decorated() -> None:
    reached = []

    @defer_interrupts()
    def work() -> None:
        press()
        reached.append("end")

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work()
    assert reached == ["end", "end"]


RIM = {
    "kernel_machine": {"backward_sweep.py", "forward_sweep.py", "self_shares.py", "sweeps_in_step.py"},
    "tangent_kernel": {"operators.py"},
    "tangent_kernel/engines": {"auto.py", "jacobian.py", "layerwise.py", "projection.py"},
    "gradients": {"model_function.py"},
    "recording": {"forward.py", "joint_capture.py", "loading.py", "recorder.py", "step_capture.py"},
    "storage/format": {"arrays.py", "lock.py"},
    "runtime": {"interrupts.py", "lazy.py"},
}
"""Where interrupts are deferred; `pathkernel.runtime.interrupts` says why. A new place is one to think about."""


def test_interrupts_are_deferred_at_the_rim_and_nowhere_else() -> None:
    package = Path(pk.__file__).parent
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        if "defer_interrupts" in path.read_text(encoding="utf-8"):
            found.setdefault(path.parent.relative_to(package).as_posix(), set()).add(path.name)
    assert found == RIM


def test_one_that_came_before_is_not_delivered_again() -> None:
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        press()
    with defer_interrupts():
        deliver_interrupt()


def test_an_error_gives_way_to_it() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, defer_interrupts():
        press()
        raise ValueError
    assert isinstance(caught.value.__context__, ValueError)


def test_a_handler_of_the_users_own_is_called() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with defer_interrupts():
        press()
        assert not seen
    assert seen == [signal.SIGINT]


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with defer_interrupts():
        press()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_handler_that_is_set_inside_stays() -> None:
    mine: Callable[[int, FrameType | None], Any] = lambda number, frame: None  # noqa: E731
    with defer_interrupts():
        signal.signal(signal.SIGINT, mine)
    assert signal.getsignal(signal.SIGINT) is mine


def test_other_threads_leave_it_alone() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with defer_interrupts():
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
                deliver_interrupt()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


# -- what is not an answer --------------------------------------------------------------------------------------------


def test_an_attempt_tells_results_from_failures() -> None:
    assert result_or_error(lambda: 3, (ValueError,)) == 3
    assert isinstance(result_or_error(lambda: int("three"), (ValueError,)), ValueError)
    with pytest.raises(ZeroDivisionError):
        result_or_error(lambda: 1 // 0, (ValueError,))


def test_ctrl_c_that_comes_out_as_another_error_is_ctrl_c() -> None:
    def work() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            [].pop()

    with pytest.raises(KeyboardInterrupt):
        result_or_error(work, (IndexError,))


def test_what_is_done_because_of_ctrl_c_can_fail_as_ever() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert isinstance(result_or_error(lambda: int("three"), (ValueError,)), ValueError)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no room"), RuntimeError("std::bad_alloc")])
def test_that_no_memory_is_left_is_not_an_answer(error: Exception) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        result_or_error(work, (RuntimeError, MemoryError))


def test_a_network_for_which_no_memory_is_left_is_not_taken_for_one_without_rules() -> None:
    class Hungry(nn.Linear):
        full = False

        def forward(self, x: Tensor) -> Tensor:
            full, self.full = self.full, False  # another process gives some back
            if full:
                torch.empty(1 << 50)
            return super().forward(x)

    trained = Trained(Hungry(3, 2))
    trained.model.full = True
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        pk.PathKernel(trained.trajectory)(trained.X)


# -- at any moment ----------------------------------------------------------------------------------------------------


class Trained:
    """A small network, trained on record."""

    def __init__(self, model: nn.Module | None = None, store: Path | None = None, train: bool = True) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
        self.model = model or nn.Sequential(*layers)
        self.X, self.y = torch.randn(8, 3), torch.randint(2, (8,))
        self.optimizer, self.loss = torch.optim.AdamW(self.model.parameters(), lr=0.01), nn.CrossEntropyLoss()
        self.recorder = pk.KernelRecorder(self.model, self.optimizer, self.loss, data=(self.X, self.y), store=store)
        self.taken = 0
        if train:
            self.train()

    def train(self) -> None:
        with self.recorder:
            for ids in ([0, 1, 2], [3, 4], [5, 6, 7]):
                x, y = self.recorder.batch(ids)
                self.optimizer.zero_grad()
                self.loss(self.model(x), y).backward()
                self.optimizer.step()
                self.taken += 1

    @property
    def trajectory(self) -> pk.Trajectory:
        return self.recorder.trajectory

    def standing(self) -> list[Any]:
        """What must be as it was, here and in torch."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        modules = [(m.training, len(m._forward_hooks), "forward" in vars(m)) for m in self.model.modules()]
        flags = torch.is_grad_enabled(), torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
        modes = len(torch.overrides._get_current_function_mode_stack())
        sdpa = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        random, autocast = torch.get_rng_state().sum().item(), torch.is_autocast_enabled("cpu")
        return [*((name, id(v), v.tolist()) for name, v in named), modules, flags, modes, sdpa, random, autocast]


def spread(many: int, interrupts: int) -> list[int]:
    """Some moments of many, never the same place in a loop's turn."""
    return sorted({1 + (k * many) // interrupts + k % 7 for k in range(interrupts)})


def in_handling_of_modes(frame: FrameType) -> bool:
    """Where torch puts the mode back that it has taken off for the time of a call."""
    names = frame.f_code.co_name, frame.f_back and frame.f_back.f_code.co_name
    return names == ("__exit__", "handle_torch_function")


def test_ctrl_c_while_torch_handles_its_modes_is_not_taken_for_a_network_without_rules() -> None:
    trained = Trained()
    whole, before = pk.PathKernel(trained.trajectory)(trained.X), trained.standing()
    work = lambda: pk.PathKernel(trained.trajectory)(trained.X)  # noqa: E731
    moments = interrupted(work, at=in_handling_of_modes)
    assert moments > 5
    for moment in range(1, 6):  # in the first pass, whose errors say that there is no rule
        with pytest.raises(KeyboardInterrupt):
            interrupted(work, moment, in_handling_of_modes)
        assert trained.standing() == before
    assert np.array_equal(work(), whole)


def outside_of_shape_checks(frame: FrameType) -> bool:
    """Where Ctrl-C may come: beartype takes a lock at "with", and one that comes there leaves it taken for good.

    Only the tests check shapes; a user's process runs neither library.
    """
    return not any(name in frame.f_code.co_filename for name in ("beartype", "jaxtyping"))


WORK: dict[str, Callable[[pk.Trajectory, Tensor, Path], np.ndarray]] = {
    "gram": lambda trajectory, X, path: pk.PathKernel(trajectory, quadrature="left")(X, store=path),
    "operator": lambda trajectory, X, _: pk.PathKernel(trajectory, quadrature="left").operator(X) @ np.ones(len(X)),
    "plain": lambda trajectory, X, _: pk.PathKernel(trajectory, quadrature="left", engine="jacobian")(X),
    "explain": lambda trajectory, X, _: np.asarray(pk.KernelMachine(trajectory).explain(X[:2], outputs=0).shares),
}


@pytest.mark.slow
@pytest.mark.parametrize("interrupts", INTERRUPTS)
@pytest.mark.parametrize("kind", WORK)
def test_after_ctrl_c_at_any_moment_all_is_as_before_and_the_same_call_goes_on(
    kind: str, interrupts: int, tmp_path: Path
) -> None:
    trained = Trained()
    work = lambda name: WORK[kind](trained.trajectory, trained.X, tmp_path / name)  # noqa: E731
    whole, before = work("whole"), trained.standing()
    for moment in spread(interrupted(lambda: work("counted"), at=outside_of_shape_checks), interrupts):
        with contextlib.suppress(KeyboardInterrupt):
            interrupted(lambda name=str(moment): work(name), moment, outside_of_shape_checks)
        assert trained.standing() == before, moment
        assert np.array_equal(work(str(moment)), whole), moment


@pytest.mark.slow
@pytest.mark.parametrize("interrupts", INTERRUPTS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_recording_stands_whole_after_ctrl_c_at_any_moment(on_disk: bool, interrupts: int, tmp_path: Path) -> None:
    def elsewhere(frame: FrameType) -> bool:
        itself = frame.f_code.co_filename == __file__ or frame.f_code is pk.KernelRecorder.__exit__.__code__
        return not itself and outside_of_shape_checks(frame)

    def run(moment: int) -> tuple[Trained, int]:
        trained = Trained(store=tmp_path / str(moment) if on_disk else None, train=False)
        with contextlib.suppress(KeyboardInterrupt):
            return trained, interrupted(trained.train, moment, elsewhere)
        torch.set_grad_enabled(True)  # torch's optimizers do not always
        return trained, 0

    whole, many = run(0)
    path = [(step.before.tolist(), step.after.tolist()) for step in whole.trajectory.steps()]
    for moment in spread(many, interrupts):
        trained = run(moment)[0]
        found = [(step.before.tolist(), step.after.tolist()) for step in trained.trajectory.steps()]
        assert found == path[: len(found)] and trained.taken <= len(found) <= trained.taken + 1, moment
        if found:
            trained.trajectory.check_model("The test")
        hooks = trained.optimizer._optimizer_step_pre_hooks, trained.optimizer._optimizer_step_post_hooks
        assert not any(hooks) and not trained.model._forward_hooks, moment
        if on_disk and (tmp_path / str(moment)).exists():
            Lock(tmp_path / str(moment)).acquire()  # it is free


def test_a_step_of_the_optimizer_that_ctrl_c_comes_into_is_a_change_outside_it() -> None:
    in_step = lambda frame: frame.f_code.co_name == "_single_tensor_adam"  # noqa: E731
    moments, trained = interrupted(Trained(train=False).train, at=in_step), Trained(train=False)
    with pytest.raises(KeyboardInterrupt):
        interrupted(trained.train, moments // 2, in_step)  # some parameters have moved
    torch.set_grad_enabled(True)
    assert 0 < len(trained.trajectory) == trained.taken < 3
    machine = pk.KernelMachine(trained.trajectory, unexplained=np.inf)
    why = machine.explain(trained.X, outputs=0)
    assert why.relative_residual < 1e-4


class Pressing(nn.Linear):
    """Presses Ctrl-C in one of its passes, counted from one."""

    passes, at = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        Pressing.passes += 1
        if Pressing.passes == Pressing.at:
            press()
        return super().forward(x)


BLOCKS: dict[str, Callable[[pk.Trajectory, Tensor], object]] = {
    "layerwise": lambda trajectory, X: pk.PathKernel(trajectory, memory="60KB")(X),
    "jacobian": lambda trajectory, X: pk.PathKernel(trajectory, engine="jacobian", memory=2000)(X),
    "autograd": lambda trajectory, X: pk.PathKernel(trajectory, engine="autograd")(X),
    "operator": lambda trajectory, X: pk.PathKernel(trajectory, engine="products").operator(X) @ np.ones(len(X)),
    "explain": lambda trajectory, X: pk.KernelMachine(trajectory).explain(X[:2], outputs=0),
    "predict": lambda trajectory, X: pk.KernelMachine(trajectory).predict(X[:2]),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_ctrl_c_within_a_pass_comes_before_the_next_one(kind: str) -> None:
    """A long computation ends soon, whatever its passes are the blocks of."""
    Pressing.at = 0
    trained = Trained(Pressing(3, 2))
    Pressing.passes = 0
    BLOCKS[kind](trained.trajectory, trained.X)
    whole, before = Pressing.passes, trained.standing()
    assert whole > 4
    for moment in (whole // 3, whole // 2):
        Pressing.passes, Pressing.at = 0, moment
        with pytest.raises(KeyboardInterrupt):
            BLOCKS[kind](trained.trajectory, trained.X)
        assert Pressing.passes == moment
        assert trained.standing() == before


def test_ctrl_c_within_a_pass_of_the_recorder_comes_after_its_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    Pressing.at = 0
    trained = Trained(Pressing(3, 2), train=False)
    see_before = StepCapture._see_before
    reached = []

    def pressed(self: StepCapture, *arguments: Any, **options: Any) -> None:
        Pressing.at = Pressing.passes + 1  # the first of several: the first step is taken apart
        see_before(self, *arguments, **options)
        reached.append(Pressing.passes - Pressing.at)

    monkeypatch.setattr(StepCapture, "_see_before", pressed)
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    assert reached and reached[0] > 0


@pytest.mark.parametrize("call", ["acquire", "release"])
def test_a_lock_is_taken_and_given_up_whole(tmp_path: Path, call: str) -> None:
    """filelock 4.2.0 leaves it taken where an error comes between the system's lock and its note of it."""
    lock, reached = Lock(tmp_path), []
    if call == "release":
        lock.acquire()
    itself = getattr(lock._lock, call)

    def pressed() -> None:
        itself()
        press()
        reached.append(call)

    setattr(lock._lock, call, pressed)
    with pytest.raises(KeyboardInterrupt):
        getattr(lock, call)()
    assert reached == [call]
    Lock(tmp_path).acquire()


def test_a_lock_that_nobody_refers_to_any_more_is_given_up(tmp_path: Path) -> None:
    lock: Any = Lock(tmp_path)
    lock.acquire()
    lock.itself = lock
    del lock
    Lock(tmp_path).acquire()


COMPRESSING = """
import contextlib, multiprocessing.synchronize, sys
from pathlib import Path
import numpy as np
from pathkernel.storage.format import Group
from pathkernel.testing import interrupted

array = Group.create(Path(sys.argv[1]), {}).create_array("a", (4,), (4,), "float64")
write, read = (lambda: array.write((0,), np.arange(4.0))), lambda: array.read((0,))
in_locks = lambda frame: frame.f_code.co_filename == multiprocessing.synchronize.__file__
write()
for call in (write, read):
    moments = interrupted(call, at=in_locks)
    for moment in range(1, moments + 1):
        with contextlib.suppress(KeyboardInterrupt):
            interrupted(call, moment, in_locks)
        write(), read()
    print(moments)
"""


def test_no_lock_of_the_compressor_stays_taken(tmp_path: Path) -> None:
    """The next call would wait for ever."""
    command = [sys.executable, "-c", COMPRESSING, str(tmp_path / "group")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(found.stdout.split()[0]) >= 2  # of writing


IMPORTING = """
import signal, sys
import pathkernel as pk

def trace(frame, event, _):
    if "scipy" in frame.f_code.co_filename:
        sys.settrace(None)
        signal.raise_signal(signal.SIGINT)
    return trace

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.settrace(trace)
try:
    pk.kernels.RepairedKernel
except KeyboardInterrupt:
    print("interrupted", "scipy.linalg" in sys.modules)
print(pk.kernels.RepairedKernel.__name__)
"""


def test_ctrl_c_while_a_name_is_imported_comes_after_it() -> None:
    found = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.split() == ["interrupted", "True", "RepairedKernel"]
