"""λ = ∂L/∂(outputs) as the training pass itself brings it, for loops of many forms, against autograd by hand."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pathkernel as pk
from pathkernel import errors

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def network(seed: int = 0, outputs: int = 3, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)).to(dtype)


def samples(n: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def batches(n: int = 24, size: int = 4) -> Iterator[Tensor]:
    yield from torch.randperm(n, generator=torch.Generator().manual_seed(2)).split(size)


@dataclass
class Run:
    """A recorded run, and the slopes that autograd gives by hand: one list of (ids, λ) for each step."""

    trajectory: pk.Trajectory
    model: nn.Module
    expected: list[list[tuple[Tensor, Tensor]]]

    def check(self, tolerance: float = 1e-12) -> None:
        steps = list(self.trajectory.steps())
        assert len(steps) == len(self.expected) > 2
        for step, wanted in zip(steps, self.expected, strict=True):
            assert len(step.batches) == len(wanted)
            for batch, (ids, slopes) in zip(step.batches, wanted, strict=True):
                assert torch.equal(batch.ids, ids)
                assert batch.cotangents is not None
                assert (batch.cotangents - slopes).abs().max() <= tolerance * slopes.abs().max()
        why = pk.KernelMachine(self.trajectory).explain(samples()[0][:3], outputs=1)
        assert why.relative_residual < 1e-9
        assert not why.split_error > 1e-9  # torch cannot tell of reentrant checkpoints: not checked
        assert set(why.channels) <= {"initial", "rounding", "weight_decay", "buffers"}


def slopes_by_hand(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    z = copy.deepcopy(model)(x).detach().requires_grad_(True)
    return torch.autograd.grad(loss(z), z)[0]


def run(
    step: Callable[[Any, nn.Module, torch.optim.Optimizer, Tensor, Tensor, Tensor], list[tuple[Tensor, Tensor]]],
    model: nn.Module | None = None,
    loop: Callable[[nn.Module], nn.Module] | None = None,
    loss: Any = None,
    **options: Any,
) -> Run:
    """Train by ``step(recorder, called, optimizer, ids, x, y)``, which returns λ by hand."""
    model = network() if model is None else model
    called = model if loop is None else loop(model)
    X, y = samples()
    optimizer, expected = sgd(model), []
    with pk.KernelRecorder(called, optimizer, loss, data=(X, y), audit_every=1, **options) as recorder:
        for ids in batches():
            expected.append(step(recorder, called, optimizer, ids, X[ids], y[ids]))
            optimizer.step()
            optimizer.zero_grad()
    return Run(recorder.trajectory, model, expected)


# -- loops of many forms ----------------------------------------------------------------------------------------------


def plain(recorder, model, optimizer, ids, x, y):
    recorder.batch(ids)
    CE(model(x), y).backward()
    return [(ids, slopes_by_hand(model, x, lambda z: CE(z, y)))]


def in_place(recorder, model, optimizer, ids, x, y):
    recorder.batch(ids)
    z = model(x)
    z.mul_(3.0)
    z[:, 0] += 1
    CE(z, y).backward()
    shift = torch.tensor([1.0, 0.0, 0.0], dtype=x.dtype)
    return [(ids, slopes_by_hand(model, x, lambda z: CE(3 * z + shift, y)))]


def two_backward_calls(recorder, model, optimizer, ids, x, y):
    recorder.batch(ids)
    z = model(x)
    CE(z, y).backward(retain_graph=True)
    (0.1 * z.square().sum()).backward()
    return [(ids, slopes_by_hand(model, x, lambda z: CE(z, y) + 0.1 * z.square().sum()))]


def accumulated(recorder, model, optimizer, ids, x, y):
    found = []
    for part in torch.arange(4).split(2):
        recorder.batch(ids[part])
        (CE(model(x[part]), y[part]) / 2).backward()
        found.append((ids[part], slopes_by_hand(model, x[part], lambda z, part=part: CE(z, y[part]) / 2)))
    return found


def many_passes_with_one_backward(recorder, model, optimizer, ids, x, y):
    total, found = torch.zeros((), dtype=x.dtype), []
    for k in range(6):
        part = torch.tensor([k % 4])
        recorder.batch(ids[part])
        total = total + (k + 1) * CE(model(x[part]), y[part])
        found.append((ids[part], slopes_by_hand(model, x[part], lambda z, p=part, k=k: (k + 1) * CE(z, y[p]))))
    total.backward()
    return found


def announced_after_the_pass(recorder, model, optimizer, ids, x, y):
    z = model(x)
    recorder.batch(ids)
    CE(z, y).backward()
    return [(ids, slopes_by_hand(model, x, lambda z: CE(z, y)))]


def with_passes_between(recorder, model, optimizer, ids, x, y):
    recorder.batch(ids)
    z = model(x)
    with torch.no_grad():
        model(x[:1])
    model(x[:2]).sum()  # a graph that nobody uses
    torch.autograd.grad(model(x[:3]).sum(), list(model.parameters()))  # adds nothing to the gradients
    CE(z, y).backward()
    return [(ids, slopes_by_hand(model, x, lambda z: CE(z, y)))]


def cleared_and_again(recorder, model, optimizer, ids, x, y):
    recorder.batch(ids.flip(0))
    CE(model(x.flip(0)), y.flip(0)).backward()
    optimizer.zero_grad()  # the batch is left out, as after an overflow
    recorder.batch(ids)
    CE(model(x), y).backward()
    return [(ids, slopes_by_hand(model, x, lambda z: CE(z, y)))]


def cleared_to_zeros(recorder, model, optimizer, ids, x, y):
    recorder.batch(ids.flip(0))
    CE(model(x.flip(0)), y.flip(0)).backward()
    optimizer.zero_grad(set_to_none=False)
    recorder.batch(ids)
    CE(model(x), y).backward()
    return [(ids, slopes_by_hand(model, x, lambda z: CE(z, y)))]


def two_views_of_one_batch(recorder, model, optimizer, ids, x, y):
    recorder.batch(ids)
    (CE(model(x), y) + 2 * CE(model(x), y)).backward()
    one = slopes_by_hand(model, x, lambda z: CE(z, y))
    return [(ids, one), (ids, 2 * one)]


def maximised(recorder, model, optimizer, ids, x, y):
    recorder.batch(ids)
    (-CE(model(x), y)).backward()
    return [(ids, slopes_by_hand(model, x, lambda z: -CE(z, y)))]


class Counting(nn.Module):
    calls = 0

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return CE(z, y) * (1 + 0.1 * self.calls)


def test_a_loss_with_a_state_is_not_evaluated_by_anybody_else() -> None:
    loss = Counting()

    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        loss(model(x), y).backward()
        scale = 1 + 0.1 * loss.calls
        return [(ids, slopes_by_hand(model, x, lambda z: CE(z, y) * scale))]

    recorded = run(step, loss=loss)
    assert loss.calls == len(recorded.expected)
    recorded.check()
    assert loss.calls == len(recorded.expected)


LOOPS = (
    plain,
    in_place,
    two_backward_calls,
    accumulated,
    many_passes_with_one_backward,
    announced_after_the_pass,
    with_passes_between,
    cleared_and_again,
    cleared_to_zeros,
    two_views_of_one_batch,
    maximised,
)


@pytest.mark.parametrize("loss", [None, CE], ids=["without a loss", "with a loss"])
@pytest.mark.parametrize("step", LOOPS, ids=lambda step: step.__name__)
def test_slopes_are_those_of_the_training_pass(step, loss) -> None:
    run(step, loss=loss).check()


def test_a_wrapper_that_the_loop_calls() -> None:
    run(plain, loop=lambda model: torch.compile(model, backend="aot_eager")).check()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = network(outputs=4), nn.Linear(4, 3).double(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True) if self.reentrant else x
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_runs_parts_again(reentrant: bool) -> None:
    torch.manual_seed(0)
    run(plain, Checkpointed(reentrant)).check()


def test_a_generator_through_a_live_discriminator_and_the_discriminator() -> None:
    """Each recorder sees its own network in the backward passes of both; gradients that were cleared are nobody's."""
    real, noise = samples()[0], torch.randn(24, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.manual_seed(0)
    G = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    D = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1)).double()
    opt_g, opt_d = torch.optim.Adam(G.parameters(), lr=1e-2), torch.optim.Adam(D.parameters(), lr=1e-2)
    bce, ones, zeros = nn.BCEWithLogitsLoss(), torch.ones(4, 1).double(), torch.zeros(4, 1).double()
    rec_d = pk.KernelRecorder(D, opt_d, data=(real, torch.ones(24, 1)), audit_every=1)
    rec_g = pk.KernelRecorder(G, opt_g, data=(noise, torch.ones(24, 1)), audit_every=1)
    with rec_d, rec_g:
        for ids in batches():
            opt_d.zero_grad()
            rec_d.batch(ids)
            bce(D(real[ids]), ones).backward()
            rec_g.batch(ids)
            fake = G(noise[ids])
            rec_d.batch(ids, inputs=fake)
            bce(D(fake.detach()), zeros).backward()
            opt_d.step()
            opt_g.zero_grad()
            bce(D(fake), ones).backward()
            opt_g.step()
    for recorder, queries in ((rec_d, real), (rec_g, noise)):
        why = pk.KernelMachine(recorder.trajectory).explain(queries[:3], outputs=0)
        assert len(recorder.trajectory) == 6 and why.relative_residual < 1e-9
        assert {len(step.batches) for step in recorder.trajectory.steps()} == {2 if recorder is rec_d else 1}


# -- what the network returns -----------------------------------------------------------------------------------------


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class WithLoss(nn.Module):
    """Returns its own loss besides its outputs."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = network(), form

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = self.net(x)
        loss = F.cross_entropy(z, y) + 0.1 * z.square().mean()
        if self.form == "pair":
            return z, loss
        return {"loss": loss, "logits": z} if self.form == "dict" else Output(loss, z)


FORMS = {"pair": 0, "dict": "logits", "dataclass": "logits", "function": lambda returned: returned.logits}


@pytest.mark.parametrize("declared", [None, "returned", CE], ids=["no loss", "returned", "given"])
@pytest.mark.parametrize("form", FORMS)
def test_a_network_that_returns_its_own_loss(form: str, declared: Any) -> None:
    X, y = samples()
    model, returns = WithLoss(form), FORMS[form]
    optimizer = sgd(model)
    with pk.KernelRecorder(
        model, optimizer, declared, data=((X, y), y), returns=returns, audit_every=1, task="classification"
    ) as recorder:
        for ids in batches():
            recorder.batch(ids)
            returned = model(X[ids], y[ids])
            loss = returned[1] if form == "pair" else returned["loss"] if form == "dict" else returned.loss
            (2 * loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] *= 0.9
    machine = pk.KernelMachine(recorder.trajectory)
    queries = (X[:3], y[:3])
    with torch.no_grad():
        live = model.net(X[:3])
    why = machine.explain(queries, outputs="all")
    assert why.relative_residual < 1e-9 and why.split_error < 1e-9
    np.testing.assert_allclose(machine.decision_function(queries), live.numpy(), atol=1e-9)
    assert np.array_equal(machine.predict(queries), live.argmax(1).numpy())


class Wide(nn.Module):
    """More outputs than parameters: λ is too large to be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.grid = network(), torch.linspace(-1, 1, 2000, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.net(x).sum(1, keepdim=True) * self.grid)
        return z, (z - 0.5).square().mean()


@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_slopes_that_take_too_much_room_are_computed_again(scale: float) -> None:
    X, y = samples()
    shares = []
    for declared in ("returned", lambda z, _: (z - 0.5).square().mean(), None):
        torch.manual_seed(0)
        model = Wide()
        optimizer = sgd(model)
        with pk.KernelRecorder(
            model, optimizer, declared, data=((X, y), y), returns=0, audit_every=1, task="regression"
        ) as recorder:
            for ids in batches():
                recorder.batch(ids)
                (scale * model(X[ids], y[ids])[1]).backward()
                optimizer.step()
                optimizer.zero_grad()
        batch = recorder.trajectory.store.read(0).batches[0]
        assert (batch.cotangents is None) == (declared is not None)
        assert declared is None or (batch.sampled_cotangents is not None and batch.sampled_cotangents.numel() == 256)
        why = pk.KernelMachine(recorder.trajectory).explain((X[:2], y[:2]), outputs=7)
        assert why.relative_residual < 1e-8
        shares.append(why.shares)
    np.testing.assert_allclose(shares[1], shares[0], atol=1e-9)
    np.testing.assert_allclose(shares[2], shares[0], atol=1e-9)


def test_a_loss_that_is_none_of_the_loop_is_seen_where_slopes_are_computed_again() -> None:
    X, y = samples()
    model = Wide()
    optimizer = sgd(model)
    recorder = pk.KernelRecorder(
        model, optimizer, lambda z, _: z.abs().mean(), data=((X, y), y), returns=0, audit_every=1, task="regression"
    )
    with recorder, pytest.raises(errors.TrajectoryError, match="other slopes"):
        recorder.batch([0, 1, 2, 3])
        model(X[:4], y[:4])[1].backward()
        optimizer.step()


def test_too_many_slopes_and_no_loss_are_refused_with_their_bytes() -> None:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight[0] * torch.ones(len(x), 2**19) + self.weight[1]

    model = Huge()
    optimizer = sgd(model)
    X = torch.zeros(4, 1)
    with pk.KernelRecorder(model, optimizer, data=(X, X), audit_every=0) as recorder:
        recorder.batch([0, 1, 2, 3])
        model(X).sum().backward()
        with pytest.raises(errors.RecordingError, match="8,388,608 bytes"):
            optimizer.step()


def test_outputs_that_are_computed_from_others_are_counted_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.net(x)
            return {"probabilities": z.softmax(1), "logits": z, "again": z, "first": z[:, :1]}

    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        returned = model(x)
        (CE(returned["logits"], y) + returned["probabilities"].square().sum() + returned["first"].sum()).backward()
        return []

    recorded = run(step, Both())
    why = pk.KernelMachine(recorded.trajectory).explain(samples()[0][:2], outputs=4)
    assert why.relative_residual < 1e-9 and set(why.channels) <= {"initial", "rounding"}


class Layered(nn.Module):
    """Returns three layers, each computed from the one before, and its logits twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = network(outputs=4), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.net(x)
        z = self.head(torch.tanh(h)) + h[:, :3]
        return h, z, z.softmax(1), z


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (2,), (0, 2), (0,)], ids=str)
def test_slopes_at_outputs_that_are_computed_from_each_other(used: tuple[int, ...]) -> None:
    """Each output's own slope, as if the others were constants: what goes through another is that one's."""
    weights = [torch.linspace(-1, 1, width, dtype=torch.float64) for width in (4, 3, 3)]

    def loss(outputs: tuple[Tensor, ...]) -> Tensor:
        return sum((outputs[k] * weights[k]).square().mean() for k in used)

    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        outputs = model(x)
        loss(outputs).backward()
        leaves = [z.detach().requires_grad_(True) for z in outputs[:3]]
        given = torch.autograd.grad(loss(leaves), leaves, allow_unused=True)
        own = [torch.zeros_like(z) if g is None else g for z, g in zip(leaves, given, strict=True)]
        return [(ids, torch.cat([*own, torch.zeros_like(own[1])], dim=1))]

    torch.manual_seed(0)
    model = Layered()
    if used == (0,):  # parameters that get no gradient are skipped
        model.head.requires_grad_(False)
    run(step, model, task="regression").check(1e-10)


class Warming(nn.Module):
    """Returns its hidden layer and logits; what the logits send back stops at the hidden layer while it warms up."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = network(outputs=4), nn.Linear(4, 3).double()
        self.register_buffer("warm", torch.tensor(False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net(x)
        return h, self.head(h if self.warm or not self.training else h.detach())


@pytest.mark.parametrize("by", ["a buffer", "the mode"])
def test_outputs_that_begin_to_be_computed_from_each_other(by: str) -> None:
    def step(recorder, model, optimizer, ids, x, y):
        if by == "a buffer":
            model.warm.fill_(bool(ids[0] % 2))
        recorder.batch(ids)
        found = []
        for training in (True,) if by == "a buffer" else (True, False):
            h, z = model.train(training)(x)
            (CE(z, y) + h.square().mean()).backward()
            leaf = z.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(CE(leaf, y), leaf)
            found.append((ids, torch.cat([2 * h.detach() / h.numel(), slope], dim=1)))
        return found

    torch.manual_seed(0)
    run(step, Warming(), task="regression").check(1e-10)


def test_a_loss_on_what_is_not_picked_is_told_of_returns() -> None:
    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        h, z = model(x)
        (CE(z, y) + h.square().mean()).backward()
        return []

    torch.manual_seed(0)
    with pytest.raises(errors.SampleIdError, match="a loss on the rest goes round these outputs"):
        run(step, Warming(), returns=1, task="regression")


# -- what cannot be explained is refused ------------------------------------------------------------------------------


def refused(step, loss: Any = None, **options: Any) -> errors.PathKernelError:
    with pytest.raises(errors.PathKernelError) as caught:
        run(step, loss=loss, **options)
    return caught.value


def test_a_pass_of_samples_that_were_not_announced() -> None:
    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        CE(model(x), y).backward()
        CE(model(x.flip(0) + 1), y).backward()
        return []

    # A second pass after one announcement is taken for another one of the same samples.
    assert "the gradient differs from that of the announced samples" in refused(step).found


def test_gradients_that_go_round_the_outputs() -> None:
    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        (CE(model(x), y) + 1e-3 * sum(p.square().sum() for p in model.parameters())).backward()
        return []

    error = refused(step)
    assert isinstance(error, errors.SampleIdError) and "regularizers" in error.write


def test_one_wrong_sample_among_many() -> None:
    X = torch.randn(512, 5, generator=torch.Generator().manual_seed(3))
    y = torch.randint(3, (512,), generator=torch.Generator().manual_seed(4))
    for wrong in (False, True):
        model = network(dtype=torch.float32)
        optimizer = sgd(model)
        announced = torch.arange(512)
        if wrong:
            announced[77] = 78
        with pk.KernelRecorder(model, optimizer, data=(X, y), audit_every=1) as recorder:
            recorder.batch(announced)
            CE(model(X), y).backward()
            if wrong:
                with pytest.raises(errors.SampleIdError, match="the gradient differs"):
                    optimizer.step()
            else:
                optimizer.step()


def test_a_gradient_that_grew_in_between() -> None:
    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        CE(model(x), y).backward()
        for p in model.parameters():
            p.grad.mul_(2.0)
        return []

    assert "is 2 times that of the announced samples" in refused(step).found


def test_the_difference_is_told_as_it_was_judged() -> None:
    """With a factor for each parameter a difference would look like rounding where every parameter is one number."""
    X = torch.rand(12, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    optimizer = sgd(model)
    with pk.KernelRecorder(model, optimizer, MSE, data=(X, 3 * X + 1), audit_every=1) as recorder:
        x, y = recorder.batch(torch.arange(12))
        (MSE(model(x), y) + 0.2 * sum(p.square().sum() for p in model.parameters())).backward()
        with pytest.raises(errors.SampleIdError) as caught:
            optimizer.step()
    told = caught.value.found.split("samples by ")[1].split(" of its norm")[0]
    assert 1e-3 < float(told) < 1


def test_batches_that_are_announced_one_too_early_are_named() -> None:
    X, y = samples()
    model = network()
    optimizer = sgd(model)
    with (
        pk.KernelRecorder(model, optimizer, data=(X, y)) as recorder,
        pytest.raises(errors.SampleIdError, match="announced one too early"),
    ):
        source = recorder.batches(4)
        waiting = next(source)
        for following in source:
            optimizer.zero_grad()
            CE(model(waiting[0]), waiting[1]).backward()
            optimizer.step()
            waiting = following


def test_parameters_that_another_optimizer_moves_are_named() -> None:
    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        CE(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        return []

    assert "other ones at the forward pass than at the step" in refused(step).found


def test_a_state_in_attributes_is_named() -> None:
    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.passes = network(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += self.training
            return self.net(x) / (1 + 0.02 * self.passes)

    assert "a state in its attributes" in refused(plain, model=Annealed()).found


def closed(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    value = CE(model(x), y)
    value.backward()
    return value


def test_a_closure_is_audited_too() -> None:
    X, y = samples()
    for shift in (0, 1):
        model = network()
        optimizer = sgd(model)
        with pk.KernelRecorder(model, optimizer, data=(X, y), audit_every=1) as recorder:
            ids = torch.arange(4)
            closure = partial(closed, model, optimizer, X[ids], y[ids])
            recorder.batch(ids + shift)
            if shift:
                with pytest.raises(errors.SampleIdError, match="moved already"):
                    optimizer.step(closure)
            else:
                optimizer.step(closure)
                assert len(recorder.trajectory) == 1


# -- the objects of the user ------------------------------------------------------------------------------------------


def test_outputs_and_networks_can_be_copied_and_saved_while_recording() -> None:
    X, y = samples()
    model = network()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pk.KernelRecorder(model, optimizer, data=(X, y)) as recorder:
            recorder.batch([0, 1])
            z = model(X[:2])
            torch.save(z, io.BytesIO())
            CE(z, y[:2]).backward()
            optimizer.step()
            again = copy.deepcopy(model)
            torch.save(again, io.BytesIO())
            torch.save(model, io.BytesIO())
    for one in (model, again):
        assert not any(p._post_accumulate_grad_hooks for p in one.parameters())
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_batches_that_are_only_looked_at_are_forgotten() -> None:
    X, y = samples()
    model = network()
    with pk.KernelRecorder(model, sgd(model), data=(X, y)) as recorder:
        for _ in range(20):
            for x, _ in recorder.batches(4):
                model(x)
        assert len(recorder._capture.pending._announced) <= 2


def test_loss_scaling_with_a_named_regularizer() -> None:
    X, y = samples(dtype=torch.float32)
    model = network(dtype=torch.float32)
    optimizer = sgd(model)

    def penalty(parameters):
        return 0.05 * sum(p.square().sum() for p in parameters.values())

    with pk.KernelRecorder(model, optimizer, data=(X, y), regularizers={"l2": penalty}, audit_every=1) as recorder:
        for ids in batches():
            recorder.batch(ids)
            (1024 * (CE(model(X[ids]), y[ids]) + penalty(dict(model.named_parameters())))).backward()
            for p in model.parameters():
                p.grad.div_(1024)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
    why = pk.KernelMachine(recorder.trajectory).explain(X[:3], outputs=0)
    assert why.relative_residual < 1e-5 and abs(why.channels["l2"]).max() > 1e-4


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_without_a_loss_the_task_says_what_is_predicted(task: str) -> None:
    X, y = samples()
    model = network()
    optimizer = sgd(model)
    with pk.KernelRecorder(model, optimizer, data=(X, y), task=task) as recorder:
        recorder.batch([0, 1, 2])
        CE(model(X[:3]), y[:3]).backward()
        optimizer.step()
    machine = pk.KernelMachine(recorder.trajectory)
    assert machine.predict(X[:4]).shape == ((4,) if task == "classification" else (4, 3))
    assert len(machine.explain(X[:4]).output) == (4 if task == "classification" else 12)
    for ask in (lambda: machine.predict_proba(X), lambda: machine.explain((X[:2], y[:2]), outputs="loss")):
        with pytest.raises(errors.InputError, match="needs the loss as a function"):
            ask()
    with pytest.raises(errors.InputError, match="where a loss is at hand"):
        pk.PathKernel(recorder.trajectory, outputs="loss")


# -- gradients that go round the outputs, under a name ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:In no step would a wrong training sample")
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("together", [True, False])
def test_a_gradient_penalty_has_a_channel(together: bool, clip: float | None) -> None:
    """Against the same training with the penalty's own gradient taken by hand."""
    X, y = samples()

    def penalty(model: nn.Module, x: Tensor) -> Tensor:
        x = (x + 0.1).requires_grad_(True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return 0.5 * (slope.norm(dim=1) - 1).square().mean()

    model = network()
    optimizer, by_hand = sgd(model), []
    with pk.KernelRecorder(model, optimizer, data=(X, y), audit_every=1, task="regression") as recorder:
        for ids in batches():
            x, target = recorder.batch(ids)
            twin = copy.deepcopy(model)
            gradients = torch.autograd.grad(penalty(twin, x), list(twin.parameters()), allow_unused=True)
            if together:
                with recorder.channel("gradient_penalty"):
                    (CE(model(x), target) + penalty(model, x)).backward()
            else:
                CE(model(x), target).backward()
                with recorder.channel("gradient_penalty"):
                    penalty(model, x).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip) if clip else None
            factor = 1.0 if clip is None else min(1.0, clip / (norm.item() + 1e-6))
            flat = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, model.parameters(), strict=True)]
            by_hand.append(factor * torch.cat([g.reshape(-1) for g in flat]))
            optimizer.step()
            optimizer.zero_grad()
    trajectory = recorder.trajectory
    why = pk.KernelMachine(trajectory, quadrature=pk.GaussLegendre(8)).explain(X[:2], outputs=1)
    assert why.relative_residual < 1e-9 and set(why.channels) <= {"initial", "rounding", "gradient_penalty"}
    expected = np.zeros(2)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    for step, gradient in zip(trajectory.steps(), by_hand, strict=True):
        for node, weight in zip(nodes, weights, strict=True):
            theta = step.before + (node + 1) / 2 * (step.after - step.before)
            twin = network()
            nn.utils.vector_to_parameters(theta, twin.parameters())
            for q in range(2):
                row = torch.autograd.grad(twin(X[q : q + 1])[0, 1], list(twin.parameters()))
                expected[q] -= 0.1 * weight / 2 * (torch.cat([g.reshape(-1) for g in row]) @ gradient).item()
    np.testing.assert_allclose(why.channels["gradient_penalty"], expected, rtol=1e-8)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_penalty_that_was_cleared_is_forgotten(times: int, set_to_none: bool) -> None:
    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        for k in range(times + 1):
            optimizer.zero_grad(set_to_none=set_to_none)
            x = x.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            with recorder.channel("gradient_penalty"):
                (0.01 * (k + 1) * slope.square().sum()).backward()
        if ids[0] % 2:
            optimizer.zero_grad(set_to_none=set_to_none)
        CE(model(x), y).backward()
        return [(ids, slopes_by_hand(model, x, lambda z: CE(z, y)))]

    recorded = run(step, task="regression")
    for one in recorded.trajectory.steps():
        assert set(one.gradient_changes) == (set() if one.batches[0].ids[0] % 2 else {"gradient_penalty"})
    why = pk.KernelMachine(recorded.trajectory).explain(samples()[0][:2], outputs=1)
    assert why.relative_residual < 1e-9 and why.samples_checked == 1


@pytest.mark.parametrize("apart", [False, True], ids=["loss in the channel", "loss outside"])
@pytest.mark.parametrize("audit_every", [1, 0])
def test_a_channel_hides_no_wrong_samples(apart: bool, audit_every: int) -> None:
    """What samples do not explain of a backward pass in a channel is the channel's, of wrong samples, too."""
    X, y = samples()

    def train(shift: int) -> pk.Trajectory:
        model = network()
        optimizer = sgd(model)
        with pk.KernelRecorder(model, optimizer, data=(X, y), audit_every=audit_every, task="regression") as recorder:
            for ids in batches():
                recorder.batch((ids + shift) % 24)
                x = X[ids].clone().requires_grad_(True)
                z = model(x)
                (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
                loss, penalty = CE(z, y[ids]), 0.1 * slope.square().sum(1).mean()
                if apart:
                    loss.backward(retain_graph=True)
                with recorder.channel("gradient_penalty"):
                    (penalty if apart else loss + penalty).backward()
                optimizer.step()
                optimizer.zero_grad()
        return recorder.trajectory

    told = nullcontext() if apart else pytest.warns(errors.CertificateWarning, match="all of them came in channels")
    with told:
        assert pk.KernelMachine(train(0)).explain(X[:2], outputs=1).samples_checked == float(apart)
    if audit_every:
        found = "the gradient differs" if apart else "in the channel `gradient_penalty`"
        with pytest.raises(errors.SampleIdError, match=found):
            train(1)
    elif apart:
        with pytest.raises(errors.TrajectoryError, match="the samples on record explain the gradient only"):
            pk.KernelMachine(train(1)).explain(X[:2], outputs=1)


@pytest.mark.filterwarnings("ignore:In no step would a wrong training sample")
def test_a_loss_on_a_hidden_layer_has_a_channel_or_is_refused() -> None:
    X, y = samples()
    for named in (True, False):
        model = network()
        optimizer = sgd(model)
        recorder = pk.KernelRecorder(model, optimizer, data=(X, y), audit_every=1, store=None)
        hidden: list[Tensor] = []
        model[1].register_forward_hook(lambda _, __, out, hidden=hidden: hidden.append(out))
        with recorder:
            for ids in batches():
                recorder.batch(ids)
                z = model(X[ids])
                if named:
                    with recorder.channel("sparsity"):
                        (CE(z, y[ids]) + 0.01 * hidden[-1].abs().mean()).backward()
                    optimizer.step()
                else:
                    (CE(z, y[ids]) + 0.01 * hidden[-1].abs().mean()).backward()
                    with pytest.raises(errors.SampleIdError, match="differs"):
                        optimizer.step()
                    break
                optimizer.zero_grad()
        if named:
            model[1]._forward_hooks.clear()
            why = pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=1)
            assert why.relative_residual < 1e-9 and abs(why.channels["sparsity"]).max() > 1e-6


# -- what the factors of a fit leave to compare ------------------------------------------------------------------------


class Scales(nn.Module):
    """Six parameters of one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([x[:, i] * w for i, w in enumerate(self.scales)], 1).tanh()
        return h[:, :3] + h[:, 3:]


def test_single_numbers_hide_no_wrong_samples() -> None:
    X = torch.rand(32, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    for shift in (0, 16):
        model = Scales()
        optimizer = sgd(model)
        with pk.KernelRecorder(model, optimizer, data=(X, 3 * X[:, :3]), audit_every=1) as recorder:
            recorder.batch((torch.arange(8) + shift) % 32)
            MSE(model(X[:8]), 3 * X[:8, :3]).backward()
            if shift:
                with pytest.raises(errors.SampleIdError, match="differs"):
                    optimizer.step()
            else:
                optimizer.step()


def test_one_parameter_hides_none_but_where_it_is_clipped() -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))

        def forward(self, z: Tensor) -> Tensor:
            return z * self.temperature

    generator = torch.Generator().manual_seed(4)
    Z, y = 2 * torch.randn(32, 3, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    for clip, expected in ((None, 1.0), (1e-3, 0.0)):
        model = Temperature()
        optimizer = sgd(model)
        with pk.KernelRecorder(model, optimizer, data=(Z, y), audit_every=1) as recorder:
            for ids in torch.arange(32).split(8):
                optimizer.zero_grad()
                recorder.batch(ids)
                CE(model(Z[ids]), y[ids]).backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.CertificateWarning)
            why = pk.KernelMachine(recorder.trajectory).explain(Z[:2], outputs=0)
        assert why.samples_checked == expected
        assert ("samples checked in 0% of the steps" in repr(why)) == (clip is not None)


def test_clipping_by_value_below_every_entry_is_said_not_to_be_checked() -> None:
    X = torch.rand(32, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    y = 10 + X.sum(1, keepdim=True)
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    optimizer = sgd(model)
    with pk.KernelRecorder(model, optimizer, data=(X, y), audit_every=1) as recorder:
        for ids in torch.arange(32).split(8):
            optimizer.zero_grad()
            recorder.batch(ids)
            MSE(model(X[ids]), y[ids]).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
    with pytest.warns(errors.CertificateWarning, match="In no step would a wrong training sample have been noticed"):
        why = pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=0)
    assert why.samples_checked == 0.0


# -- what strangers do to outputs, gradients and networks -------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda g: 2 * g, lambda g: g.clamp(-0.05, 0.05)], ids=["doubled", "clamped"])
def test_hooks_that_the_loop_puts_on_the_outputs(change: Callable[[Tensor], Tensor]) -> None:
    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        z = model(x)
        z.register_hook(change)
        CE(z, y).backward()
        return [(ids, change(slopes_by_hand(model, x, lambda z: CE(z, y))))]

    run(step).check()


@pytest.mark.parametrize("form", ["split", "unbind"])
def test_outputs_of_one_function_of_which_some_are_used(form: str) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            z = self.net(x)
            return z.split([1, 2], 1) if form == "split" else z.unbind(1)

    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        model(x)[1].square().mean().backward()
        z = model(x)[1].detach()
        slopes = torch.zeros(len(x), 3, dtype=x.dtype)
        slopes[:, 1 : 1 + z[0].numel()] = (2 * z / z.numel()).reshape(len(x), -1)
        return [(ids, slopes)]

    run(step, Several(), task="regression").check()


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_a_frozen_parameter_that_the_optimizer_has(name: str) -> None:
    """A weight goes with its bias through layers, and one of the two may not be stepped."""
    model = network()
    model.get_parameter(name).requires_grad_(False)
    run(plain, model).check()


def test_p_grad_set_by_hand_needs_a_loss() -> None:
    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        gradients = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        return []

    error = refused(step)
    assert isinstance(error, errors.SampleIdError) and "no backward pass came through the outputs" in error.found
    assert "loss=loss" in error.write and "not moved" in error.expected
    why = pk.KernelMachine(run(step, loss=CE).trajectory).explain(samples()[0][:2], outputs=1)
    assert why.relative_residual < 1e-9


def test_an_output_that_is_a_view_and_is_changed_in_place_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(outputs=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[:, 0]

    def step(recorder, model, optimizer, ids, x, y):
        recorder.batch(ids)
        z = model(x)
        z /= 2.0
        MSE(z, y.to(z)).backward()
        return []

    with pytest.raises(errors.SampleIdError, match="no backward pass came through the outputs") as caught:
        run(step, Flat(), task="regression")
    assert "in place" in caught.value.write


def test_a_hook_that_changes_outputs_put_on_after_the_start_is_refused_before_training() -> None:
    X, y = samples()
    model = network()
    optimizer, before = sgd(model), copy.deepcopy(model.state_dict())
    with pk.KernelRecorder(model, optimizer, data=(X, y)) as recorder:
        model.register_forward_hook(lambda module, arguments, z: 3 * z)
        recorder.batch([0, 1, 2])
        CE(model(X[:3]), y[:3]).backward()
        with pytest.raises(errors.ModelMismatchError, match="`KernelRecorder` found a network"):
            optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::pathkernel.errors.CertificateWarning")  # of bfloat16
@pytest.mark.parametrize(
    ("computes", "returns"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
def test_outputs_of_another_type_than_the_parameters(computes: torch.dtype, returns: torch.dtype) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(dtype=computes)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).to(returns)

    X, y = samples(dtype=computes)
    model = Cast()
    optimizer = sgd(model)
    with pk.KernelRecorder(model, optimizer, data=(X, y), audit_every=1, task="classification") as recorder:
        for ids in batches():
            recorder.batch(ids)
            CE(model(X[ids]), y[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for batch in (step.batches[0] for step in recorder.trajectory.steps()):
        assert batch.cotangents is not None and batch.cotangents.dtype == returns
    why = pk.KernelMachine(recorder.trajectory).explain(X[:3], outputs=1)
    assert why.relative_residual < (1e-4 if torch.bfloat16 not in (computes, returns) else 0.05)


@pytest.mark.parametrize("loss", [None, CE], ids=["without a loss", "with a loss"])
def test_steps_of_nothing_but_a_named_penalty(loss: Any) -> None:
    """As of a penalty on gradients that is lazily taken every few steps."""
    X, y = samples()
    model = network()
    optimizer = sgd(model)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1, task="classification") as recorder:
        for k, ids in enumerate(batches()):
            x, target = recorder.batch(ids)
            if k % 2:
                x = x.clone().requires_grad_(True)
                (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
                with recorder.channel("r1"):
                    (0.1 * slope.square().sum(1).mean()).backward()
            else:
                CE(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    penalised = torch.cat([step.batches[0].ids for step in recorder.trajectory.steps() if step.index % 2])
    why = pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=1)
    assert why.relative_residual < 1e-9 and set(why.channels) == {"initial", "rounding", "r1"}
    assert (why.shares[:, penalised] == 0).all() and abs(why.channels["r1"]).max() > 1e-6


# -- loss scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_scale", [65536.0, 0.25, 3.0])
@pytest.mark.parametrize("kind", ["adamw", "fused", "unscaled and clipped"])
def test_the_scale_of_the_loss_is_divided_out(kind: str, init_scale: float) -> None:
    """Also where it has shrunk below 1: gradients that grew in between are refused otherwise."""
    X, y = samples(dtype=torch.float32)
    model = network(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=kind == "fused")
    scaler, expected = torch.amp.GradScaler("cpu", init_scale=init_scale), []
    with pk.KernelRecorder(model, optimizer, data=(X, y), audit_every=1) as recorder:
        for k, ids in enumerate(batches()):
            recorder.batch(ids)
            optimizer.zero_grad()
            loss = CE(model(X[ids]), y[ids]) * (torch.inf if k == 2 else 1.0)
            scaler.scale(loss).backward()
            if kind == "unscaled and clipped":
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            if k != 2:
                expected.append((ids, slopes_by_hand(model, X[ids], lambda z, ids=ids: CE(z, y[ids]))))
            scaler.step(optimizer)
            scaler.update()
    for step, (ids, slopes) in zip(recorder.trajectory.steps(), expected, strict=True):
        assert torch.equal(step.batches[0].ids, ids)
        torch.testing.assert_close(step.batches[0].cotangents, slopes, rtol=1e-5, atol=1e-7)
    assert pk.KernelMachine(recorder.trajectory).explain(X[:3], outputs=1).relative_residual < 1e-5


# -- graphs that are kept ----------------------------------------------------------------------------------------------


def test_a_graph_that_is_differentiated_again_after_its_gradient_was_cleared() -> None:
    """What had arrived was cleared with the gradient, and is not counted a second time."""

    def step(recorder, model, optimizer, ids, x, y):
        first, second = torch.arange(2), torch.arange(2, 4)
        recorder.batch(ids[first])
        loss = CE(model(x[first]), y[first])
        loss.backward(retain_graph=True)
        optimizer.zero_grad()
        loss.backward()
        recorder.batch(ids[second])
        CE(model(x[second]), y[second]).backward()
        return [(ids[part], slopes_by_hand(model, x[part], lambda z, p=part: CE(z, y[p]))) for part in (first, second)]

    run(step).check()


def test_gradients_are_watched_as_before_beside_a_recorder() -> None:
    """The recorder's own hooks on the parameters are not those of others, which may write on gradients."""
    X, y = samples()
    model = network()
    optimizer = sgd(model)
    with pk.KernelRecorder(model, optimizer, data=(X, y), schedule=pk.Schedule(keyframes=4)) as recorder:
        for ids in batches():
            optimizer.zero_grad()
            recorder.batch(ids)
            CE(model(X[ids]), y[ids]).backward()
            optimizer.step()
        hooks = [len(p._post_accumulate_grad_hooks) for p in model.parameters()]
    assert hooks == [2, 1, 1, 1]  # that of the keyframes is on one parameter alone
