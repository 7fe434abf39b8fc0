"""A network with the recorded parameters and another forward pass is not taken for the recorded one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import generator, make_inputs
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import ModelMismatchError
from pathkernel.runtime.checksum import condensed
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import Group
from pathkernel.trajectory.reference_outputs import ReferenceOutputs
from pathkernel.trajectory.schedule import Schedule

CE = nn.CrossEntropyLoss()
N = 16


class Powered(nn.Module):
    """Its parameters do not say what it does."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, outputs))
        self.power, self.temperature, self.activation = 1, 1.0, torch.nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.net(x) ** self.power / self.temperature)


class Plain(Powered):
    """Without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def made(cls: Any = Powered, *arguments: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(*arguments).to(dtype)


def arrays(dtype: torch.dtype = torch.float32, outputs: int = 3) -> tuple[Tensor, Tensor]:
    return make_inputs(N, dtype=dtype), torch.randint(outputs, (N,), generator=generator(2))


def recorded(
    model: nn.Module, store: Any = None, *, data: Any = None, schedule: Schedule | None = None, steps: int = 6
) -> pk.KernelRecorder:
    """A recording that was closed; batches are passed by hand where they are not the data as they stand."""
    optimizer, order = torch.optim.Adam(model.parameters(), lr=0.02), generator(3)
    dtype = next(model.parameters()).dtype
    X, y = arrays(dtype)
    recorder = pk.KernelRecorder(
        model, optimizer, CE, data=data or (X, y), store=store, schedule=schedule, audit_every=0
    )
    recorder.start()
    for _ in range(steps):
        ids = torch.randint(N, (6,), generator=order)
        recorder.batch(ids, inputs=X[ids], targets=y[ids])
        optimizer.zero_grad()
        CE(model(X[ids]), y[ids]).backward()
        optimizer.step()
    recorder.close()
    return recorder


def opened(model: nn.Module, path: Path, data: Any = None) -> pk.Trajectory:
    return pk.Trajectory.open(path, model=model, loss=CE, data=data or arrays(next(model.parameters()).dtype))


def refused(call: Any) -> str:
    with pytest.raises(ModelMismatchError) as caught:
        call()
    return str(caught.value)


CHANGES: dict[str, Any] = {
    "power": lambda model: setattr(model, "power", 3),
    "temperature": lambda model: setattr(model, "temperature", 1.01),
    "layer without parameters": lambda model: setattr(model.net, "2", nn.ReLU()),
    "method": lambda model: setattr(model, "forward", lambda x: model.net(x) + x[:, :3]),
    "hook": lambda model: model.net[0].register_forward_hook(lambda _, __, outputs: 2 * outputs),
    "option of a layer": lambda model: setattr(model.net[1], "eps", 0.1),
}
LEVELS = {
    "full": None,
    "keyframes": Schedule(keyframes=3),
    "thinned": Schedule(every=4),
    "weights": Schedule(keep="weights"),
}


@pytest.mark.filterwarnings("ignore:The batches of step")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_forward_pass_is_found(change: str, level: str, tmp_path: Path) -> None:
    model = made()
    trajectory = recorded(model, tmp_path / "run", schedule=LEVELS[level]).trajectory
    training, state = model.training, {name: value.clone() for name, value in model.state_dict().items()}
    again = opened(model, tmp_path / "run")
    for path in (trajectory, again):
        pk.PathKernel(path)
    CHANGES[change](model)
    kernels = [lambda path=path: pk.PathKernel(path) for path in (trajectory, again)]
    if level == "full":
        kernels += [lambda path=path: pk.KernelMachine(path) for path in (trajectory, again)]
    for kernel in kernels:
        message = refused(kernel)
        assert "Kernel` found a network that has the recorded parameters and other outputs" in message or (
            "KernelMachine` found a network" in message
        )
        assert "output" in message and "of training sample" in message and "must be what it was" in message
        assert "Put back what was changed since" in message
    if change == "layer without parameters":
        assert "`net.2` is torch.nn.modules.activation.ReLU" in refused(lambda: opened(model, tmp_path / "run"))
    else:
        message = refused(lambda: opened(model, tmp_path / "run"))
        assert f"`Trajectory.open('{tmp_path / 'run'}')` found a network" in message and "at the end of" in message
    assert model.training == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_message_says_which_output_is_another(tmp_path: Path) -> None:
    model = made()
    trajectory = recorded(model).trajectory
    plain = model.forward
    with torch.no_grad():
        model.eval()
        expected = model(arrays()[0][[8]])[0, 1].item()
        model.forward = lambda x: plain(x) + torch.tensor([0.0, 5.0, 0.0]) * (x[:, :1] == arrays()[0][8, 0])
    message = refused(lambda: pk.PathKernel(trajectory))
    assert f"at the end of the recording output 1 of training sample 8 is {expected + 5:.5g}"[:-1] in message
    assert "at the start of the recording output 1 of training sample 8 is" in message


def test_a_small_output_beside_a_large_one() -> None:
    class Uneven(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor([1.0, 1e-3, 1e6])

    model = made(Uneven)
    trajectory = recorded(model).trajectory
    pk.PathKernel(trajectory)
    plain = model.forward
    model.forward = lambda x: plain(x) * torch.tensor([1.0, 1.01, 1.0])
    assert "output 1 of training sample" in refused(lambda: pk.PathKernel(trajectory))


def test_a_network_that_fails_now(tmp_path: Path) -> None:
    model = made()
    recorded(model, tmp_path / "run")
    model.forward = lambda x: model.net(x) @ torch.ones(4, 4)
    message = refused(lambda: opened(model, tmp_path / "run"))
    assert "at the end of the recording it fails on training sample 0" in message
    model.forward = lambda x: model.net(x)[:, :2]
    assert "it has 2 outputs, not 3" in refused(lambda: opened(model, tmp_path / "run"))


def test_only_the_start_tells(tmp_path: Path) -> None:
    """Where outputs at the end agree, a kernel or machine is refused, for the start."""

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = made(Affine)
    recorder = recorded(model, tmp_path / "run", steps=2)
    trajectory, plain = recorder.trajectory, model.net.forward
    first, last = (trajectory.parameters(s)["net.weight"] for s in (0, -1))
    after = lambda weight: (weight - first).norm() > (weight - last).norm()  # noqa: E731
    model.net.forward = lambda x: plain(x) * (1.0 if after(model.net.weight) else 2.0)
    again = opened(model, tmp_path / "run")
    for path in (trajectory, again):
        assert "at the start of the recording" in refused(lambda path=path: pk.KernelMachine(path))


# -- what is not told apart, and must not be ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_change(dtype: torch.dtype, tmp_path: Path) -> None:
    class Branches(nn.Module):
        """Two equal branches, one subtracted from the other: outputs at the start are nothing but rounding."""

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
            self.other = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))
            self.other.load_state_dict(self.one.state_dict())
            self.order = torch.arange(64)

        def forward(self, x: Tensor) -> Tensor:
            def branch(net: nn.Sequential, order: Tensor) -> Tensor:
                hidden = net[1](net[0](x))[:, order]
                products = hidden[:, None, :] * net[2].weight[:, order]
                return products.cumsum(2)[..., -1] + net[2].bias

            return branch(self.one, self.order) - branch(self.other, torch.arange(64))

    model = made(Branches, dtype=dtype)
    trajectory = recorded(model, tmp_path / "run", steps=1).trajectory
    assert trajectory.reference is not None and trajectory.reference.initial.abs().max() == 0
    model.order = torch.randperm(64, generator=generator(0))  # the same sums in another order
    pk.PathKernel(trajectory)
    again = opened(model, tmp_path / "run")
    pk.PathKernel(again)
    again = pk.Trajectory(again.run, again.store, replace(again.end, outputs=None))
    pk.PathKernel(again)  # with nothing but the start to compare with


def test_training_mode_and_generators_stay_as_they_are(tmp_path: Path) -> None:
    states = []
    for audited in (True, False):
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        model = made()
        if not audited:
            ReferenceOutputs.of = classmethod(lambda cls, *_: None)  # type: ignore[method-assign]
        try:
            trajectory = recorded(model, tmp_path / f"run-{audited}").trajectory
        finally:
            if not audited:
                ReferenceOutputs.of = PLAIN  # type: ignore[method-assign]
        assert model.training and (trajectory.reference is not None) == audited
        states.append((trajectory.final, torch.get_rng_state(), np.random.random(), random.random()))
    for one, other in zip(*states, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


PLAIN = ReferenceOutputs.of


class Images(torch.utils.data.Dataset):
    """Items as they come from the disk: the loop brings them into the network's form."""

    def __init__(self, augmented: bool = False, shape: tuple[int, ...] = (4,)) -> None:
        self.X, self.y = arrays()
        self.augmented, self.shape = augmented, shape

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.X[i] + (torch.rand(()) + random.random() + np.random.random() if self.augmented else 0)
        return x.reshape(self.shape), self.y[i]


def test_samples_that_the_loop_transforms_are_left_alone(tmp_path: Path) -> None:
    model = made()
    trajectory = recorded(model, tmp_path / "run", data=Images(shape=(2, 2))).trajectory
    assert trajectory.reference is None
    model.power = 3
    opened(model, tmp_path / "run", Images(shape=(2, 2)))
    assert Group.open(tmp_path / "run").attributes()["outputs"] is None


@pytest.mark.parametrize("augmented", [False, True])
def test_datasets(augmented: bool, tmp_path: Path) -> None:
    """Where items differ from look to look, the samples themselves are kept."""
    model = made()
    trajectory = recorded(model, tmp_path / "run", data=Images(augmented)).trajectory
    assert trajectory.reference is not None and trajectory.reference.varying == augmented
    again = opened(model, tmp_path / "run", Images(augmented))
    pk.PathKernel(again)
    kept = DiskStore.open(tmp_path / "run").start_values()["reference_inputs"]
    assert (kept is not None) == augmented
    assert torch.equal(again.reference.inputs, trajectory.reference.inputs)
    model.power = 3
    assert "other outputs" in refused(lambda: opened(model, tmp_path / "run", Images(augmented)))
    assert "other outputs" in refused(lambda: pk.PathKernel(again))


def test_networks_that_draw_random_numbers_have_none(tmp_path: Path) -> None:
    class Noisy(Powered):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(3)

    model = made(Noisy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=arrays(), store=tmp_path / "run") as recorder:
        # … which would refuse the network with the first batch.
        assert recorder.trajectory.reference is None


def test_statistics_that_move_in_evaluation_stay_as_they_are() -> None:
    class Counting(Powered):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                self.seen += 1
            return super().forward(x) * self.seen.clamp(max=1)

    model = made(Counting)
    trajectory = recorded(model).trajectory
    assert trajectory.constants["seen"].item() == 0 == model.seen.item()
    trajectory.check_model("A test")


@pytest.mark.parametrize("outputs", [3, 32, 33, 1000])
def test_many_outputs_take_little_room(outputs: int, tmp_path: Path) -> None:
    model = made(Powered, outputs)
    data = arrays(outputs=outputs)
    trajectory = recorded(model, tmp_path / "run", data=data).trajectory
    reference = trajectory.reference
    assert reference is not None and reference.final is not None
    assert reference.initial.shape == reference.final.shape == (3, min(outputs, 32))
    assert len(json.dumps(Group.open(tmp_path / "run").attributes()["outputs"])) < 4000
    pk.PathKernel(opened(model, tmp_path / "run", data), outputs=0)
    plain = model.forward
    model.forward = lambda x: plain(x).roll(1, dims=1)
    assert "other outputs" in refused(lambda: pk.PathKernel(trajectory, outputs=0))


def test_weighted_sums() -> None:
    values = torch.randn(3, 100, dtype=torch.float64, generator=generator(0))
    padded = np.zeros((3, 128))
    padded[:, :100] = values.numpy() * np.cos(np.arange(100))
    assert np.allclose(condensed(values, 32).numpy(), padded.reshape(3, 32, 4).sum(axis=2))
    assert condensed(values, 100) is values


def test_one_and_two_samples() -> None:
    for n in (1, 2):
        model, X = nn.Linear(4, 1), make_inputs(n, dtype=torch.float32)
        optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss()
        with pk.KernelRecorder(model, optimizer, loss, data=(X, torch.zeros(n, 1))) as recorder:
            for x, y in recorder.batches(1):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
        assert recorder.trajectory.reference.samples == tuple(range(n))
        recorder.trajectory.check_model("A test")


# -- the life of a recording ----------------------------------------------------------------------------------------


def test_while_recording_only_the_start_is_compared(tmp_path: Path) -> None:
    model = made()
    recorder = recorded(model, tmp_path / "run")
    trajectory = recorder.trajectory
    assert trajectory.reference.final is not None
    with torch.no_grad():
        recorder.start()
        assert trajectory.reference.final is None
        with recorder.channel("shrink"):
            model.net[0].weight.mul_(0.5)
        pk.PathKernel(recorder.trajectory)
        recorder.close()
    pk.PathKernel(trajectory)
    expected = model.eval()(arrays()[0][[0, 8, 15]]).detach().double()
    assert torch.allclose(trajectory.reference.final, expected, rtol=1e-5)
    pk.PathKernel(opened(model, tmp_path / "run"))


CHILD = """
import importlib.util, sys
sys.path.insert(0, {tests!r})
import torch
spec = importlib.util.spec_from_file_location({name!r}, {file!r})
t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
model = t.made(t.Plain)
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
recorder = t.pk.KernelRecorder(model, optimizer, t.CE, data=t.arrays(), store=t.DiskStore({path!r}, flush_every=1))
recorder.start()
for s in range(4):
    x, y = recorder.batch([s, s + 1, s + 2, s + 3])
    optimizer.zero_grad()
    t.CE(model(x), y).backward()
    optimizer.step()
if {killed}:
    t.os.kill(t.os.getpid(), t.signal.SIGKILL)
"""


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store but the lock, which names the process that last held it."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"}


@pytest.mark.parametrize("killed", [True, False])
def test_a_recording_that_nobody_closed(killed: bool, tmp_path: Path) -> None:
    """Its end is not known; its start is compared, from the store and where it goes on."""
    places = {"tests": str(Path(__file__).parent.parent), "name": __name__, "file": __file__}
    code = CHILD.format(**places, path=str(tmp_path / "run"), killed=killed)
    child = subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False, capture_output=True)
    assert child.returncode == (-signal.SIGKILL if killed else 0), child.stderr.decode()
    header = DiskStore.open(tmp_path / "run").header
    assert header is not None and header.outputs is not None and (header.end is None) == killed
    model = made(Plain)
    store = DiskStore.open(tmp_path / "run")
    layout, last = store.header.layouts[-1], store.read(3)
    model.load_state_dict(layout.unflatten(last.after))
    again = opened(model, tmp_path / "run")
    pk.PathKernel(again)
    model.power = 3
    if killed:
        assert "at the start of" in refused(lambda: opened(model, tmp_path / "run"))
    assert "at the start of" in refused(lambda: pk.PathKernel(again))
    other = made(Plain)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.02)
    other.power = 3
    kept = contents(tmp_path / "run")
    recorder = pk.KernelRecorder(other, optimizer, CE, data=arrays(), store=tmp_path / "run")
    if killed:
        message = refused(recorder.start)
        assert "`KernelRecorder` found a network" in message and "at the start of" in message
        assert contents(tmp_path / "run") == kept and len(DiskStore.open(tmp_path / "run")) == 4


def test_a_recording_that_goes_on_keeps_its_start(tmp_path: Path) -> None:
    class Training:
        def __init__(self) -> None:
            self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

        def record(self, steps: int) -> pk.Trajectory:
            data = arrays()
            with pk.KernelRecorder(self.model, self.optimizer, CE, data=data, store=tmp_path / "run") as recorder:
                for s in range(steps):
                    x, y = recorder.batch([s, s + 1])
                    self.optimizer.zero_grad()
                    CE(self.model(x), y).backward()
                    self.optimizer.step()
            return recorder.trajectory

    one, other = Training(), Training()
    first = one.record(3).reference
    other.model.load_state_dict(one.model.state_dict())
    both = other.record(2)
    assert len(both) == 5 and torch.equal(both.reference.initial, first.initial)
    assert not torch.equal(both.reference.final, first.final)
    pk.KernelMachine(both)
    pk.KernelMachine(opened(other.model, tmp_path / "run"))


# -- stores that were written before --------------------------------------------------------------------------------

OLD = Path(__file__).parent.parent / "data" / "store_02ae756"


def test_a_store_of_commit_02ae756_opens(tmp_path: Path) -> None:
    """Written by that commit's package: two steps of SGD on a linear layer, by hand 0.5 − 0.25 · ∂L/∂w and so on."""
    path = shutil.copytree(OLD, tmp_path / "run")
    model = nn.Linear(2, 1)
    X, y = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.25, -2.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    w, b = np.array([0.5, -0.25]), 0.125
    for ids in ([0, 1], [1, 2]):
        x, target = X[ids].double().numpy(), y[ids, 0].double().numpy()
        left = x @ w + b - target
        w, b = w - 0.25 * left @ x, b - 0.25 * left.sum()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w[None]))
        model.bias.fill_(b)
    trajectory = pk.Trajectory.open(path, model=model, loss=nn.MSELoss(), data=(X, y))
    assert trajectory.reference is None and len(trajectory) == 2
    assert pk.KernelMachine(trajectory).explain(X).relative_residual < 1e-6
    assert not trajectory.store.verify()
