"""Rows of `recording/test_refusals.py` for networks without a tangent kernel, copies, replays, contracts and extras."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from cases import LOSSES, OPTIMIZERS, SAMPLES, make_inputs, make_model
from test_testing import ByHand, CutOff, Descent, Reversed, Sign, TooShort, momentum, with_options
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors, testing
from pathkernel.runtime.extras import require_extra
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.replay import Replay, ReplayStore
from pathkernel.trajectory.run import Extension
from pathkernel.trajectory.step import Step
from pathkernel.update_rules.rule import UpdateRule

Row = tuple[Callable[[], Any], type[Exception], tuple[str, str, str]]
Unsupported = errors.UnsupportedModelError


class Odd(nn.Module):
    """A layer whose outputs another function goes over."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(4, 2), change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x))


class InTuple(nn.Module):
    """Reads its weight from where no copy can put another one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(4, 2)), nn.Linear(2, 2)
        self.pair = (self.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.pair[0])


def never_alone(z: Tensor) -> Tensor:
    if len(z) == 1:
        raise ValueError("one sample")
    return z


def kernel_of(change: Callable[[Tensor], Tensor]) -> Any:
    return pk.TangentKernel(Odd(change))(torch.randn(8, 4))


def holding(value: Any) -> nn.Module:
    model = nn.Linear(4, 2)
    model.held = value
    return model


def in_three_processes() -> None:
    """What one of three processes records, here without the others."""
    distributed = torch.distributed
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/met", rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(make_model())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with mock.patch.object(distributed, "get_world_size", return_value=3):
                pk.KernelRecorder(model, optimizer, LOSSES["ce_mean"].loss, data=9)
        finally:
            distributed.destroy_process_group()


class Uncopied:
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("there is one of me")


def recorded(**options: Any) -> pk.Trajectory:
    model, case = make_model(), LOSSES["ce_mean"]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    data = make_inputs(SAMPLES), case.targets(SAMPLES)
    with pk.KernelRecorder(model, optimizer, case.loss, data=data, **options) as recorder:
        for ids in ([0, 1], [2, 3]):
            x, target = recorder.announce(ids)
            optimizer.zero_grad()
            case.loss(model(x), target).backward()
            optimizer.step()
    return recorder.trajectory


def with_another_layer() -> None:
    trajectory = recorded()
    trajectory.model[1] = nn.ReLU()
    pk.PathKernel(trajectory)


class Fails(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise KeyError("momentum")


class Rests(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        pass


def replayed_by(optimizer: type[torch.optim.Optimizer]) -> Step:
    store = recorded(schedule=pk.Keyframes(4)).store
    assert isinstance(store, ReplayStore)
    store.replay.kind = optimizer
    return store.read(0)


def joined() -> None:
    run = recorded().run
    pad = Extension(run, {"late": torch.ones(2)})
    ReplayStore(MemoryStore(), Replay(run, torch.optim.SGD)).extend(pad.tail, pad)


class Forgetful(MemoryStore):
    def __len__(self) -> int:
        return max(0, super().__len__() - 1)


def check(rule: type[UpdateRule], make: Any = momentum) -> None:
    testing.check_update_rule(rule(), make, steps=2)


MODELS: dict[str, Row] = {
    # networks
    "a lazy layer": (
        lambda: pk.TangentKernel(nn.LazyLinear(2)),
        Unsupported, ("Parameter `weight` has no shape yet", "laid out", "one batch through the lazy modules"),
    ),
    "a network without values": (
        lambda: pk.TangentKernel(nn.Linear(4, 2, device="meta")),
        Unsupported, ("on the device `meta`", "has its numbers", "model.to_empty"),
    ),
    "training in several processes": (
        in_three_processes,
        Unsupported, ("DistributedDataParallel for 3 processes", "this process announces", "training in one process"),
    ),
    "a complex network": (
        lambda: pk.TangentKernel(nn.Linear(4, 2, dtype=torch.complex64)),
        Unsupported, ("`weight` is complex", "real parameters", "as two real parameters"),
    ),
    "an embedding that changes its weights": (
        lambda: pk.TangentKernel(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0))),
        Unsupported, ("`max_norm=1.0`", "does not change weights", "without `max_norm`"),
    ),
    "a scripted network": (
        lambda: pk.TangentKernel(nn.Sequential(torch.jit.script(nn.Linear(4, 2)))),
        Unsupported, ("`0` is scripted", "a scripted one has none", "given to `torch.jit.script`"),
    ),
    "a parameter in a tuple": (
        lambda: pk.TangentKernel(InTuple())(torch.randn(3, 4)),
        Unsupported, ("reads `weight` in a way that no copy", "must not reach the module itself", "through `self`"),
    ),
    "a network that draws": (
        lambda: kernel_of(lambda z: z + torch.rand_like(z)),
        Unsupported, ("draws random numbers in evaluation", "the same outputs", "if self.training:"),
    ),
    "a network for two samples or more": (
        lambda: kernel_of(never_alone),
        Unsupported, ("but not one alone (ValueError: one sample)", "a batch of one", "batches of any size"),
    ),
    "a sample with outputs of its own": (
        lambda: kernel_of(lambda z: z if len(z) > 1 else torch.cat([z, z], dim=1)),
        Unsupported, ("For one sample the network returned 4 numbers, and 2", "whether alone or not", "squeeze()"),
    ),
    "outputs that depend on the batch": (
        lambda: kernel_of(lambda z: z - z.mean(dim=0)),
        Unsupported, ("depends on the samples that it is passed together with", "batch statistics", "running"),
    ),
    "outputs that depend on a large batch": (
        lambda: kernel_of(lambda z: 2 * z if len(z) > 5 else z),
        Unsupported, ("depends on the samples that it is passed together with", "a capacity", "along the first axis"),
    ),
    "a scripted module that is not registered": (
        lambda: pk.TangentKernel(holding([torch.jit.script(nn.Linear(4, 2))])),
        Unsupported, ("The module 'held' is scripted", "copies of its structure", "before `torch.jit.script`"),
    ),
    "an attribute that cannot be copied": (
        lambda: pk.TangentKernel(holding(Uncopied())),
        Unsupported, ("`held` of the model (Uncopied) cannot be copied: there is one", "a copy", "__deepcopy__"),
    ),
    "a network with another layer": (
        with_another_layer,
        errors.ModelMismatchError, ("the recorded parameters and other outputs", "What `forward` depends on", "Put"),
    ),
    # steps that are trained again
    "parameters that join a replay": (
        joined, errors.RecordingError, ("2 parameters joined the optimizer", "when recording began", "every=1"),
    ),
    "a replay that fails": (
        lambda: replayed_by(Fails),
        errors.TrajectoryError, ("Steps from 0 on cannot be trained again (KeyError", "must be those", "verify"),
    ),
    "a replay that differs": (
        lambda: replayed_by(Rests),
        errors.TrajectoryError, ("Step 0 came out differently", "to the last bit", "torch.set_num_threads"),
    ),
    # contracts
    "a step that is not linear": (
        lambda: check(Sign),
        testing.UpdateRuleError, ("`Sign.step` is not linear", "without a constant term", "`displacement_sources`"),
    ),
    "a step without its derivative": (
        lambda: check(CutOff),
        testing.UpdateRuleError, ("the adjoint of `CutOff.step` fails", "⟨q, Δ⟩", "Leave out `detach`"),
    ),
    "a step that is not elementwise": (
        lambda: check(Reversed),
        testing.UpdateRuleError, ("`Reversed` calls itself elementwise", "one vector", "`elementwise = False`"),
    ),
    "a step that was not taken": (
        lambda: check(TooShort, with_options(torch.optim.Adam)),
        testing.UpdateRuleError, ("`TooShort` is off by", "what the optimizer did", "term by term"),
    ),
    "outputs that are missed": (
        lambda: check(Descent, lambda parameters: ByHand(parameters, 5.0)),
        testing.UpdateRuleError, ("shares and channels miss outputs", "is left over", "the steps are small"),
    ),
    "a store that forgets": (
        lambda: testing.check_store(Forgetful, steps=2),
        testing.StoreContractError, ("`len` is 0 after 1 steps", "to the last bit", "MemoryStore"),
    ),
    # libraries, and what can be saved
    "an extra that is missing": (
        lambda: require_extra("plot", "A picture", "no_such_library"),
        errors.MissingExtraError, ("A picture needs `no_such_library`", "extra `[plot]`", "pip install"),
    ),
    "a kernel of a lambda": (
        lambda: pickle.dumps(pk.TangentKernel(nn.Linear(4, 2), outputs=lambda z: z[0])),
        errors.InputError, ("`outputs` cannot be pickled", "found by its name", "at the top of a module"),
    ),
}  # fmt: skip
