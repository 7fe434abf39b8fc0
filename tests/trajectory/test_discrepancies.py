"""Optimizers whose memory, state, settings or gradients are edited behind the recorder's back.

Shares are compared with a loop of autograd over samples that carries the optimizer's memory sample by sample, forward,
and knows of every edit; or, for hooks, with a run that does the same in the open.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import make_inputs, make_model
from torch import Tensor, nn
from torch.optim import Optimizer

import pathkernel as pk
from pathkernel.errors import CertificateWarning, RecordingError, TrajectoryError
from pathkernel.trajectory.batch_gradients import RecordedGradients

N, STEPS, NODES = 8, 12, 4
LOSS = nn.CrossEntropyLoss()
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2, 1, 0])


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).double().clone() for tensor in tensors])


Edit = Callable[[int, Optimizer, nn.Module], None]
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.02),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.8),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}
SLOT = {"momentum": "momentum_buffer", "dampened": "momentum_buffer", "nesterov": "momentum_buffer"}
SLOT |= {"rmsprop": "momentum_buffer", "adam": "exp_avg", "fused adam": "exp_avg", "adamw": "exp_avg"}


FEW = ("nesterov", "adam")


def cases(names: Any, throughout: str, every: slice = slice(None)) -> list[Any]:
    """One name with every optimizer, the others with a few.

    Always run are ``every`` optimizer with the first, and the others with one of the few in turn.
    """
    rows = []
    for k, name in enumerate(names):
        always = list(OPTIMIZERS)[every] if name == throughout else [FEW[k % len(FEW)]]
        for kind in OPTIMIZERS if name == throughout else FEW:
            marks = () if kind in always else pytest.mark.exhaustive
            rows.append(pytest.param(name, kind, marks=marks))
    return rows


def batch(s: int) -> list[int]:
    return [(3 * s + k) % N for k in range(3)]


@dataclass
class Rows:
    """The optimizer's memory and displacements, sample by sample, in the published formulas.

    Rows 0 … N − 1 are samples, row N is weight decay, row N + 1 has no name.
    """

    optimizer: Optimizer
    kind: str
    parameters: list[nn.Parameter]

    def __post_init__(self) -> None:
        self.memory = torch.zeros(N + 2, sum(p.numel() for p in self.parameters), dtype=torch.float64)

    def state(self, key: str) -> Tensor:
        state = self.optimizer.state
        held = [state[p].get(key) if p in state else None for p in self.parameters]
        return flat(torch.zeros_like(p) if m is None else m for m, p in zip(held, self.parameters, strict=True))

    def edited(self, scale: Tensor | float | None) -> None:
        """Multiply all rows, or book what the optimizer's memory has more than the rows as without a name."""
        if scale is None:
            self.memory[N + 1] += self.state(SLOT[self.kind]) - self.memory.sum(0)
        else:
            self.memory *= scale

    def moved(self, gradients: Tensor, theta: Tensor, fresh: Tensor) -> Tensor:
        """Displacement of every row, after the optimizer's step; ``fresh``: which entries had no memory."""
        group = self.optimizer.param_groups[0]
        lr, g = float(group["lr"]), gradients
        none = torch.zeros_like(g)
        if self.kind in ("momentum", "dampened", "nesterov"):
            g[N] += group["weight_decay"] * theta
            mu, damping = group["momentum"], 1 - group["dampening"]
            self.memory = torch.where(fresh, g, mu * self.memory + damping * g)
            return -lr * (g + mu * self.memory if group["nesterov"] else self.memory)
        if self.kind == "rmsprop":
            self.memory = group["momentum"] * self.memory + g / (self.state("square_avg").sqrt() + group["eps"])
            return -lr * self.memory
        beta, beta2 = group["betas"]
        t = self.state_number("step")
        self.memory = beta * self.memory + (1 - beta) * g
        denominator = (self.state("exp_avg_sq") / (1 - beta2**t)).sqrt() + group["eps"]
        moved = -lr / (1 - beta**t) * self.memory / denominator
        if self.kind == "adamw":
            none[N] = -lr * group["weight_decay"] * theta
        return moved + none

    def state_number(self, key: str) -> Tensor:
        state = self.optimizer.state
        return flat(torch.full(p.shape, float(state[p][key]), dtype=torch.float64) for p in self.parameters)


def averaged(model: nn.Module, before: Tensor, after: Tensor, X: Tensor) -> Tensor:
    """∇f_0 at each query, averaged over a step, (Q, P)."""
    other = copy.deepcopy(model).double()
    times, weights = np.polynomial.legendre.leggauss(NODES)
    total = torch.zeros(len(X), len(before), dtype=torch.float64)
    for t, weight in zip((times + 1) / 2, weights / 2, strict=True):
        nn.utils.vector_to_parameters(before + t * (after - before), other.parameters())
        for q, x in enumerate(X.double()):
            total[q] += weight * flat(torch.autograd.grad(other(x[None])[0, 0], list(other.parameters())))
    return total


@dataclass
class Run:
    trajectory: pk.Trajectory
    model: nn.Module
    queries: Tensor
    shares: np.ndarray
    unnamed: np.ndarray

    def explained(self, **options: Any) -> pk.Attributions:
        machine = pk.KernelMachine(self.trajectory, unexplained=np.inf, quadrature=pk.GaussLegendre(NODES), **options)
        return machine.explain(self.queries, outputs=0)

    def outputs(self) -> np.ndarray:
        with torch.no_grad():
            return self.model(self.queries).double().numpy()


def train(
    kind: str | Callable[[Any], Optimizer],
    edit: Edit | None = None,
    scale: Callable[[int, nn.Module], Any] | None = None,
    made: Edit | None = None,
    before: Edit | None = None,
    dtype: torch.dtype = torch.float64,
    oracle: bool = True,
    **options: Any,
) -> Run:
    """Train and record; ``edit`` comes after every step, ``before`` before it, ``made`` once before recording.

    ``scale`` says what an edit after step s multiplied the memory by: 1 for nothing, None for something else.
    """
    model = make_model("tanh", 3, dtype)
    X, queries = make_inputs(N, dtype=dtype), make_inputs(2, dtype=dtype, seed=3)
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[kind](parameters) if isinstance(kind, str) else kind(parameters)
    rows = Rows(optimizer, kind, parameters) if oracle and isinstance(kind, str) else None
    shares, unnamed = np.zeros((2, N)), np.zeros(2)
    if made is not None:
        made(0, optimizer, model)
    with pk.KernelRecorder(model, optimizer, LOSS, data=(X, TARGETS), audit_every=1, **options) as recorder:
        for s in range(STEPS):
            x, target = recorder.batch(batch(s))
            optimizer.zero_grad()
            if rows is not None:
                gradients = torch.zeros_like(rows.memory)
                for i, a, b in zip(batch(s), x, target, strict=True):
                    gradients[i] += flat(torch.autograd.grad(LOSS(model(a[None]), b[None]), parameters)) / len(x)
                if s and scale is not None:
                    rows.edited(scale(s - 1, model))
                state = optimizer.state
                missing = [p not in state or state[p].get(SLOT[kind]) is None for p in parameters]
                fresh = flat(torch.full(p.shape, float(m)) for p, m in zip(parameters, missing, strict=True)) > 0
            LOSS(model(x), target).backward()
            if before is not None:
                before(s, optimizer, model)
            theta = flat(parameters)
            optimizer.step()
            if rows is not None:
                q = averaged(model, theta, flat(parameters), queries)
                found = (q @ rows.moved(gradients, theta, fresh).T).numpy()
                shares, unnamed = shares + found[:, :N], unnamed + found[:, N + 1]
            if edit is not None:
                edit(s, optimizer, model)
    return Run(recorder.trajectory, model, queries, shares, unnamed)


def assert_complete(run: Run, tolerance: float = 1e-9) -> None:
    """By both sweeps."""
    for options in ({}, {"form": "chord"}):
        machine = pk.KernelMachine(run.trajectory, unexplained=np.inf, **options)
        why = machine.explain(run.queries, outputs="all")
        scale = np.abs(run.outputs()).max()
        assert np.abs(why.left_over).max() <= tolerance * scale
        assert np.abs(machine.decision_function(run.queries) - run.outputs()).max() <= tolerance * scale


def assert_shares(run: Run, tolerance: float = 1e-8, channel: str = "unexplained") -> None:
    why = run.explained()
    scale = np.abs(run.shares).max()
    np.testing.assert_allclose(why.shares, run.shares, rtol=0, atol=tolerance * scale)
    assert not {"unexplained", "loaded"} & (set(why.channels) - {channel})
    found = why.channels.get(channel, np.zeros(len(run.queries)))
    np.testing.assert_allclose(found, run.unnamed, rtol=0, atol=tolerance * scale)


# -- edits of the optimizer's memory ---------------------------------------------------------------------------------


def slots(optimizer: Optimizer) -> list[Tensor]:
    keys = ("momentum_buffer", "exp_avg")
    return [state[key] for state in optimizer.state.values() for key in keys if key in state]


def at(step: int, do: Callable[[Optimizer, nn.Module], None]) -> Edit:
    def edit(s: int, optimizer: Optimizer, model: nn.Module) -> None:
        if s == step:
            with torch.no_grad():
                do(optimizer, model)

    return edit


def times(number: float) -> Callable[[Optimizer, nn.Module], None]:
    return lambda optimizer, _: [slot.mul_(number) for slot in slots(optimizer)] and None


def halve(s: int, optimizer: Optimizer, model: nn.Module) -> None:
    times(0.5)(optimizer, model)


def clear(optimizer: Optimizer, model: nn.Module) -> None:
    optimizer.state.clear()


def zero_first_layer(optimizer: Optimizer, model: nn.Module) -> None:
    for p in model[0].parameters():
        for key in ("momentum_buffer", "exp_avg"):
            if key in optimizer.state[p]:
                optimizer.state[p][key] = torch.zeros_like(p)


def but_first_layer(model: nn.Module) -> Tensor:
    return torch.cat([torch.full((p.numel(),), float(n[0] != "0")).double() for n, p in model.named_parameters()])


def through_data(optimizer: Optimizer, model: nn.Module) -> None:
    for slot in slots(optimizer):
        slot.data.zero_()  # which torch does not count as writing on the tensor


SCALED: dict[str, tuple[Edit, Callable[[int, nn.Module], Any]]] = {
    "zeroed": (at(5, times(0.0)), lambda s, _: 0.0 if s == 5 else 1.0),
    "zeroed through .data": (at(5, through_data), lambda s, _: 0.0 if s == 5 else 1.0),
    "halved after each step": (halve, lambda s, _: 0.5),
    "turned round": (at(7, times(-1.0)), lambda s, _: -1.0 if s == 7 else 1.0),
    "doubled twice": (
        lambda s, o, m: times(2.0)(o, m) if s in (3, 8) else None,
        lambda s, _: 2.0 if s in (3, 8) else 1.0,
    ),
    "state cleared": (at(5, clear), lambda s, _: 0.0 if s == 5 else 1.0),
    "one layer replaced by zeros": (at(6, zero_first_layer), lambda s, m: but_first_layer(m) if s == 6 else 1.0),
}


@pytest.mark.parametrize(("name", "kind"), cases(SCALED, "zeroed"))
def test_memory_that_is_multiplied_is_multiplied_for_every_sample(name: str, kind: str) -> None:
    edit, scale = SCALED[name]
    run = train(kind, edit, scale)
    assert_complete(run)
    assert_shares(run)


class Loader:
    """Loads the state of an earlier step, or writes its memory by hand, of which the recorder is not told."""

    def __init__(self, by_hand: bool = False) -> None:
        self.by_hand = by_hand

    def __call__(self, s: int, optimizer: Optimizer, model: nn.Module) -> None:
        if s == 3:
            self.saved = copy.deepcopy(optimizer.state_dict())
            self.slots = copy.deepcopy(slots(optimizer))
        if s == 9 and self.by_hand:
            for slot, saved in zip(slots(optimizer), self.slots, strict=True):
                slot.copy_(saved)
        elif s == 9:
            optimizer.load_state_dict(self.saved)


def noise(optimizer: Optimizer, model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for slot in slots(optimizer):
        slot.add_(0.3 * slot.abs().mean() * torch.randn(slot.shape, generator=generator, dtype=slot.dtype))


def one_entry(optimizer: Optimizer, model: nn.Module) -> None:
    slots(optimizer)[0].view(-1)[2] += 0.05


REPLACED: dict[str, tuple[Callable[[], Edit], set[int]]] = {
    "state of an earlier step": (Loader, {9}),
    "memory of an earlier step": (lambda: Loader(by_hand=True), {9}),
    "noise on all": (lambda: at(6, noise), {6}),
    "one entry": (lambda: at(6, one_entry), {6}),
    "noise after each step": (lambda: lambda s, o, m: at(s, noise)(s, o, m), set(range(STEPS))),
}


@pytest.mark.parametrize(("name", "kind"), cases(REPLACED, "state of an earlier step", slice(0, None, 2)))
def test_what_is_added_to_the_memory_has_its_channel_for_as_long_as_it_acts(name: str, kind: str) -> None:
    """Without a name it is unexplained; what `load_state_dict` put there is loaded."""
    make, steps = REPLACED[name]
    run = train(kind, make(), lambda s, _: None if s in steps else 1.0)
    assert_complete(run)
    assert_shares(run, channel="loaded" if name == "state of an earlier step" else "unexplained")
    assert np.abs(run.unnamed).max() > 1e-5


def test_a_large_part_without_a_name_is_refused_with_the_step() -> None:
    run = train("adam", Loader(by_hand=True), oracle=False)
    machine = pk.KernelMachine(run.trajectory)
    for ask in (machine.explain, machine.decision_function, machine.predict):
        with pytest.raises(TrajectoryError) as caught:
            ask(run.queries)
        assert "is unexplained; most of it is at step 10, which moved `" in caught.value.found
        assert "otherwise than Adam does with the recorded gradients" in caught.value.found
        assert 'the channel "memory"' in caught.value.write and "unexplained=1.0" in caught.value.write


@pytest.mark.parametrize(
    ("name", "kind"),
    cases(["zeroed", "halved after each step", "state of an earlier step", "nothing"], "nothing", slice(1, None, 2)),
)
def test_in_single_precision_outputs_are_right_to_rounding(name: str, kind: str) -> None:
    edit = {**{key: value[0] for key, value in SCALED.items()}, "state of an earlier step": Loader()}.get(name)
    run = train(kind, edit, dtype=torch.float32, oracle=False)
    assert_complete(run, 3e-6)
    if name == "nothing":
        assert "unexplained" not in run.explained().channels


# -- edits of the rest of the state: on record with every step -------------------------------------------------------


def step_counters(optimizer: Optimizer, model: nn.Module) -> None:
    for state in optimizer.state.values():
        state["step"] = torch.ones_like(state["step"])


def second_moments(optimizer: Optimizer, model: nn.Module) -> None:
    for state in optimizer.state.values():
        state["square_avg" if "square_avg" in state else "exp_avg_sq"].mul_(4.0)


@pytest.mark.parametrize(
    ("kind", "do"),
    [
        ("adam", step_counters),
        ("fused adam", step_counters),
        ("adamw", step_counters),
        ("adam", second_moments),
        ("adamw", second_moments),
        ("rmsprop", second_moments),
    ],
)
def test_what_is_frozen_is_what_the_step_used(kind: str, do: Callable[[Optimizer, nn.Module], None]) -> None:
    run = train(kind, at(5, do), lambda s, _: 1.0)
    assert_complete(run)
    assert_shares(run)
    assert not run.unnamed.any() and "unexplained" not in run.explained().channels


# -- hooks of others: the same as in the open ------------------------------------------------------------------------


def clip(optimizer: Optimizer, model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def in_pre_hook(do: Callable[[Optimizer, nn.Module], None]) -> Edit:
    return lambda s, o, m: o.register_step_pre_hook(lambda optimizer, *_: do(optimizer, m)) and None


def in_post_hook(do: Callable[[Optimizer, nn.Module], None]) -> Edit:
    return lambda s, o, m: o.register_step_post_hook(lambda optimizer, *_: do(optimizer, m)) and None


def once(edit: Edit, step: int) -> Edit:
    return lambda s, o, m: edit(s, o, m) if s == step else None


def decay_rate(optimizer: Optimizer, model: nn.Module) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].mul_(0.8)
        else:
            group["lr"] *= 0.8


def more_decay(optimizer: Optimizer, model: nn.Module) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] += 0.05


def lr_tensor(p: Any) -> Optimizer:
    return torch.optim.Adam(p, lr=torch.tensor(0.02, dtype=torch.float64), foreach=False)


def always(do: Callable[[Optimizer, nn.Module], None]) -> Edit:
    return lambda s, o, m: do(o, m)


HOOKS: dict[str, tuple[Any, dict[str, Edit], dict[str, Edit]]] = {
    # The optimizer, what the hooked run is given, and what the run in the open is given.
    **{
        f"rate decays in a post-hook made earlier, {kind}": (
            kind, {"made": in_post_hook(decay_rate)}, {"edit": always(decay_rate)},
        )
        for kind in ("momentum", "adamw")
    },
    **{
        f"gradients clipped in a pre-hook made later, {kind}": (
            kind, {"before": once(in_pre_hook(clip), 4)}, {"before": lambda s, o, m: clip(o, m) if s >= 4 else None},
        )
        for kind in ("nesterov", "adam", "rmsprop")
    },
    "rate set in a pre-hook made later": (
        "momentum",
        {"before": once(in_pre_hook(decay_rate), 3)},
        {"before": lambda s, o, m: decay_rate(o, m) if s >= 3 else None},
    ),
    "weight decay set in a pre-hook made later": (
        "adamw",
        {"before": once(in_pre_hook(more_decay), 3)},
        {"before": lambda s, o, m: more_decay(o, m) if s >= 3 else None},
    ),
    "a rate that is a tensor decays in a post-hook": (
        lr_tensor, {"made": in_post_hook(decay_rate)}, {"edit": always(decay_rate)},
    ),
    "memory zeroed in a post-hook": (
        "nesterov", {"made": in_post_hook(times(0.3))}, {"edit": always(times(0.3))},
    ),
    "memory zeroed in a pre-hook made later": (
        "adam",
        {"before": once(in_pre_hook(times(0.3)), 3)},
        {"before": lambda s, o, m: at(s, times(0.3))(s, o, m) if s >= 3 else None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_others_are_seen_as_the_same_edits_in_the_open(name: str) -> None:
    kind, hooked, plain = HOOKS[name]
    run, other = train(kind, oracle=False, **hooked), train(kind, oracle=False, **plain)
    assert torch.equal(run.trajectory.final, other.trajectory.final)  # it is the same training
    assert_complete(run)
    why, expected = run.explained(), other.explained()
    np.testing.assert_allclose(why.shares, expected.shares, rtol=0, atol=1e-9 * np.abs(expected.shares).max())
    assert why.channels.keys() == expected.channels.keys() and "unexplained" not in why.channels


def shrink(optimizer: Optimizer, model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.98)


@pytest.mark.parametrize(
    "options",
    [
        {"made": in_post_hook(shrink)},
        {"before": once(in_post_hook(shrink), 4)},
        {"before": once(in_pre_hook(shrink), STEPS - 1)},  # between the recorder's reading of θ and the step
    ],
)
@pytest.mark.parametrize("kind", ["momentum", "fused adam"])
def test_weights_changed_in_a_hook_are_unexplained(kind: str, options: dict[str, Edit]) -> None:
    run = train(kind, oracle=False, **options)
    assert_complete(run)
    assert np.abs(run.explained().channels["unexplained"]).max() > 1e-3
    with pytest.raises(TrajectoryError, match="is unexplained"):
        pk.KernelMachine(run.trajectory).decision_function(run.queries)


@pytest.mark.parametrize("step", [0, 4])
def test_weights_changed_before_a_step_in_a_pre_hook_are_not_those_of_the_gradient(step: int) -> None:
    with pytest.raises(RecordingError, match="the gradient differs from that of the announced samples"):
        train("momentum", before=once(in_pre_hook(shrink), step), oracle=False)


def test_noise_on_gradients_in_a_pre_hook_made_later_is_refused() -> None:
    def disturb(optimizer: Optimizer, model: nn.Module) -> None:
        for p in model.parameters():
            p.grad.add_(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p))

    with pytest.raises(RecordingError, match="gradient"):  # from the second step on the recorder comes after the noise
        train("momentum", before=once(in_pre_hook(disturb), 4), oracle=False)
    run = train("momentum", before=once(in_pre_hook(disturb), STEPS - 1), oracle=False)
    with pytest.raises(TrajectoryError, match=f"At step {STEPS - 1} the samples on record explain the gradient"):
        pk.KernelMachine(run.trajectory).decision_function(run.queries)


def test_swapped_parameter_groups_are_followed() -> None:
    def two(p: list[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD([{"params": p[:2], "lr": 0.1}, {"params": p[2:], "lr": 0.02}], momentum=0.9)

    def swap(optimizer: Optimizer, model: nn.Module) -> None:
        first, second = optimizer.param_groups
        first["params"], second["params"] = second["params"], first["params"]

    run = train(two, at(5, swap), oracle=False)
    assert_complete(run)
    assert "unexplained" not in run.explained().channels


class Restless(torch.optim.SGD):
    """Changes its own rate after it has used it."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.8


def test_settings_are_those_that_the_step_used() -> None:
    from pathkernel.update_rules.sgd import SGD

    run = train(lambda p: Restless(p, lr=0.1, momentum=0.9), oracle=False, rule=SGD())
    assert [step.hyperparameters[0]["lr"] for step in run.trajectory.steps()][:2] == pytest.approx([0.1, 0.08])
    assert_complete(run)
    assert "unexplained" not in run.explained().channels


# -- the sum is over samples, not over displacements -----------------------------------------------------------------


def swapped(run: Run, one: int, other: int) -> None:
    """Swap the inputs of two samples in a finished record."""
    inputs = run.trajectory.data._inputs
    inputs[[one, other]] = inputs[[other, one]]


def test_two_samples_that_are_swapped_are_not_the_samples_of_the_gradient() -> None:
    run = train("momentum", oracle=False)
    swapped(run, 0, 4)
    with pytest.raises(TrajectoryError, match="the samples on record explain the gradient only up to"):
        pk.KernelMachine(run.trajectory).decision_function(run.queries)


def test_outputs_are_summed_from_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    run = train("momentum", oracle=False)
    machine = pk.KernelMachine(run.trajectory)
    expected = machine.decision_function(run.queries)
    # Without the comparison of gradients, so that what they add up to is all there is.
    stage = RecordedGradients._stage
    monkeypatch.setattr(RecordedGradients, "_stage", lambda *a, compare, **k: stage(*a, compare=False, **k))
    np.testing.assert_allclose(machine.decision_function(run.queries), expected, rtol=0, atol=1e-9)
    swapped(run, 0, 4)
    curve = machine._curve(machine._selection.every_output(run.queries))
    found = sum(machine._forward(curve).channels.values()).reshape(-1, 3)
    assert np.abs(found.numpy() - expected).max() > 1e-3 * np.abs(expected).max()
    with pytest.raises(TrajectoryError, match=r"up to .* off those of the network at the end of the record"):
        machine.decision_function(run.queries)
    with pytest.warns(CertificateWarning, match=r"The residual is"):
        machine.explain(run.queries)
