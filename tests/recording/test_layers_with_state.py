"""Layers that couple a batch or draw random numbers: every pass is run again as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import generator, make_inputs
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors, reference

CE = nn.CrossEntropyLoss()
SAMPLES = 12
BATCHES = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9, 10, 11), (2, 9, 9), (5, 0, 1, 7))
RATE, MU = 0.05, 0.8


class Residual(nn.Module):
    """Dropout as a function, inside a residual block, next to dropout as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.enter(x)))
        h = h + F.dropout(torch.tanh(self.inner(h)), 0.4, self.training)
        return self.leave(h)


class Noisy(nn.Module):
    """Adds noise of its own to its hidden units in training."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        if self.training:
            h = h + 0.3 * torch.randn(h.shape, dtype=h.dtype)
        return self.leave(h)


class Attention(nn.Module):
    """Self-attention with dropout on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.leave = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.attention(x, x, x, need_weights=False)
        return self.leave((x + h).mean(dim=1))


class Recurrent(nn.Module):
    """Two recurrent layers with dropout between them."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrent, self.leave = kind(4, 3, num_layers=2, dropout=0.4, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.recurrent(x)[0][:, -1])


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def cnn(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


NORMALISED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch_norm_1d": (lambda: mlp(nn.BatchNorm1d(6)), (4,)),
    "batch_norm_2d": (lambda: cnn(nn.BatchNorm2d(4)), (2, 3, 3)),
    "batch_norm_cumulative": (lambda: mlp(nn.BatchNorm1d(6, momentum=None)), (4,)),
    "batch_norm_twice": (lambda: mlp(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 6), nn.BatchNorm1d(6)), (4,)),
    "batch_norm_and_dropout": (lambda: mlp(nn.BatchNorm1d(6), nn.Dropout(0.3)), (4,)),
    "instance_norm": (lambda: cnn(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), (2, 3, 3)),
}
RANDOM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: mlp(nn.Dropout(0.3)), (4,)),
    "dropout_2d": (lambda: cnn(nn.Dropout2d(0.3)), (2, 3, 3)),
    "functional_dropout": (Residual, (4,)),
    "noise": (Noisy, (4,)),
    "attention": (Attention, (3, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), (3, 4)),
    "gru": (lambda: Recurrent(nn.GRU), (3, 4)),
}
LAYERS = {**NORMALISED, **RANDOM}


class Run:
    """A recorded run, with buffers and the state of the random generator noted before every pass by the loop itself."""

    def __init__(
        self,
        name: str,
        *,
        make: Callable[[], nn.Module] | None = None,
        sample: tuple[int, ...] = (4,),
        prepare: Callable[[nn.Module], Any] = lambda model: model.train(),
        batches: Sequence[Sequence[int]] = BATCHES,
        audit_every: int = 1,
    ) -> None:
        make, sample = LAYERS[name] if make is None else (make, sample)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = make().double()
            self.X = make_inputs(SAMPLES, sample) + 0.5
            self.y = torch.randint(3, (SAMPLES,), generator=generator(2))
            self.queries = make_inputs(3, sample, seed=8)
            prepare(self.model)
            optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=MU)
            self.batches, self.states, self.buffers, self.modes, self.gradients = batches, [], [], [], []
            recorder = pk.KernelRecorder(self.model, optimizer, CE, data=(self.X, self.y), audit_every=audit_every)
            with recorder:
                for ids in batches:
                    x, target = recorder.batch(list(ids))
                    optimizer.zero_grad()
                    self.states.append(torch.random.get_rng_state())
                    self.buffers.append({n: b.clone() for n, b in self.model.named_buffers()})
                    self.modes.append({n: m.training for n, m in self.model.named_modules()})
                    CE(self.model(x), target).backward()
                    self.gradients.append(torch.cat([p.grad.reshape(-1) for p in self.model.parameters()]))
                    optimizer.step()
            self.trajectory = recorder.trajectory
            self.model.eval()

    def twin(self, s: int, buffers: dict[str, Tensor]) -> nn.Module:
        """The network at step s in the modes of training."""
        twin = copy.deepcopy(self.model)
        twin.load_state_dict({**self.trajectory.parameters(s), **buffers})
        for name, module in twin.named_modules():
            module.training = self.modes[s][name]
        return twin

    def rows(self, s: int) -> Tensor:
        """∂L/∂z of each sample pulled back alone, (B, P): the whole batch ran as it did in the loop."""
        ids, twin = list(self.batches[s]), self.twin(s, self.buffers[s])
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(self.states[s])
            z = twin(self.X[ids])
        (slopes,) = torch.autograd.grad(CE(z, self.y[ids]), z, retain_graph=True)
        rows = []
        for i in range(len(ids)):
            parts = torch.autograd.grad((z[i] * slopes[i]).sum(), list(twin.parameters()), retain_graph=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(rows)

    def oracle(self) -> np.ndarray:
        """Shares (Q, N) of output 0, with a momentum buffer for every sample; q under the buffers of each step."""
        held = torch.zeros(SAMPLES, self.trajectory.layout.size, dtype=torch.float64)
        shares = torch.zeros(len(self.queries), SAMPLES, dtype=torch.float64)
        for s, ids in enumerate(self.batches):
            held = (MU * held).index_add(0, torch.tensor(ids), self.rows(s))
            # What a pass in train mode did to the statistics is in force when the step is walked.
            after = self.buffers[s + 1] if s + 1 < len(self.batches) else dict(self.model.named_buffers())
            twin = copy.deepcopy(self.model)
            twin.load_state_dict({**self.trajectory.parameters(s), **after})
            twin.eval()
            for q, x in enumerate(self.queries):
                ends = self.trajectory.parameters(s), self.trajectory.parameters(s + 1)
                shares[q] -= RATE * held @ reference.discrete_gradient(twin, *ends, x, 0)
        return shares.numpy()

    def complete(self) -> pk.Attributions:
        """Explain output 0, once nothing is left over and the machine says what the live network says in eval mode."""
        machine = pk.KernelMachine(self.trajectory)
        why = machine.explain(self.queries, outputs=0)
        with torch.no_grad():
            live = self.model(self.queries).numpy()
        assert why.relative_residual <= 1e-10
        np.testing.assert_allclose(machine.decision_function(self.queries), live, rtol=1e-9)
        np.testing.assert_allclose(why.reconstruction, live[:, 0], rtol=1e-9)
        moved = np.abs(why.output - why.initial).max()
        assert np.abs(why.channels["rounding"]).max() <= 1e-10 * moved
        return why


@pytest.mark.parametrize("name", LAYERS)
def test_rows_add_up_to_the_gradient_and_shares_are_those_of_the_oracle(name: str) -> None:
    run = Run(name)
    for s, gradient in enumerate(run.gradients):
        torch.testing.assert_close(run.rows(s).sum(dim=0), gradient, rtol=1e-10, atol=1e-13)  # the oracle is right
    why = run.complete()
    np.testing.assert_allclose(why.shares, run.oracle(), rtol=0, atol=1e-10)
    assert ("buffers" in why.channels) == (name in NORMALISED)


@pytest.mark.parametrize("name", NORMALISED)
def test_running_statistics_have_a_channel(name: str) -> None:
    run = Run(name)
    why = run.complete()
    moved = np.abs(why.output - why.initial).max()
    assert np.abs(why.channels["buffers"]).max() > 1e-3 * moved
    # With the untrained statistics the trained weights are another network.
    untrained = copy.deepcopy(run.model)
    untrained.load_state_dict(run.buffers[0], strict=False)
    assert (untrained(run.queries) - run.model(run.queries)).abs().max() > 1e-3


def test_the_channel_of_running_statistics_step_by_step() -> None:
    run = Run("batch_norm_1d")
    ends = [*run.buffers[1:], dict(run.model.named_buffers())]
    moved = 0
    for s, (before, after) in enumerate(zip(run.buffers, ends, strict=True)):
        values = []
        for buffers in (before, after):
            twin = copy.deepcopy(run.model)
            twin.load_state_dict({**run.trajectory.parameters(s), **buffers})
            values.append(twin.eval()(run.queries)[:, 0].detach().numpy())
        moved = moved + values[1] - values[0]
    np.testing.assert_allclose(run.complete().channels["buffers"], moved, atol=1e-12)


def test_frozen_batch_norm_is_an_ordinary_layer() -> None:
    def freeze(model: nn.Module) -> None:
        model.train()
        model[1].running_mean.fill_(0.1)
        model[1].eval()

    run = Run("batch_norm_1d", prepare=freeze)
    modes = [batch.state.modes for step in run.trajectory.steps() for batch in step.batches]
    assert all(mode[""] and mode["0"] and not mode["1"] for mode in modes)
    why = run.complete()
    assert "buffers" not in why.channels
    np.testing.assert_allclose(why.shares, run.oracle(), rtol=0, atol=1e-10)
    # Its samples are not coupled: the rows of a batch are those of its samples alone.
    model, (ids, parameters) = run.twin(0, run.buffers[0]), (list(BATCHES[0]), run.trajectory.parameters(0))
    alone = reference.sample_gradients_from_losses(model, parameters, CE, run.X[ids], run.y[ids])
    torch.testing.assert_close(run.rows(0), alone, rtol=1e-10, atol=1e-13)


def test_batch_norm_frozen_on_the_way() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(nn.BatchNorm1d(6)).double().train()
        X, y = make_inputs(SAMPLES), torch.randint(3, (SAMPLES,), generator=generator(2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        with pk.KernelRecorder(model, optimizer, CE, data=(X, y), audit_every=1) as recorder:
            for k, ids in enumerate(BATCHES):
                if k == 3:
                    model[1].eval()
                x, target = recorder.batch(list(ids))
                optimizer.zero_grad()
                CE(model(x), target).backward()
                optimizer.step()
    steps = list(recorder.trajectory.steps())
    assert steps[3].buffers is steps[4].buffers and steps[1].buffers is not steps[2].buffers
    model.eval()
    why = pk.KernelMachine(recorder.trajectory).explain(X[:3], outputs=0)
    assert why.relative_residual <= 1e-10
    np.testing.assert_allclose(why.reconstruction, model(X[:3])[:, 0].detach(), rtol=1e-9)


def test_accumulated_micro_batches_see_the_statistics_of_their_own_batch() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp(nn.BatchNorm1d(6), nn.Dropout(0.2)).double().train()
        X, y = make_inputs(SAMPLES), torch.randint(3, (SAMPLES,), generator=generator(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with pk.KernelRecorder(model, optimizer, CE, data=(X, y), audit_every=1) as recorder:
            for micros in (((0, 1, 2), (3, 4, 5)), ((6, 7, 8), (9, 10, 11))):
                optimizer.zero_grad()
                for ids in micros:
                    x, target = recorder.batch(list(ids))
                    (CE(model(x), target) / 2).backward()
                optimizer.step()
    model.eval()
    machine = pk.KernelMachine(recorder.trajectory)
    assert machine.explain(X[:3]).relative_residual <= 1e-10
    np.testing.assert_allclose(machine.decision_function(X[:3]), model(X[:3]).detach(), rtol=1e-9)


@pytest.mark.parametrize("name", ["dropout", "noise", "batch_norm_and_dropout"])
def test_explaining_leaves_generators_modes_and_statistics_alone(name: str) -> None:
    run = Run(name)
    run.model.train()
    held = copy.deepcopy(run.model.state_dict())
    state = torch.random.get_rng_state()
    machine = pk.KernelMachine(run.trajectory)
    first = machine.explain(run.queries).shares
    machine.decision_function(run.queries)
    pk.PathKernel(run.trajectory)(run.queries)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in run.model.modules())
    assert all(torch.equal(value, held[key]) for key, value in run.model.state_dict().items())
    torch.rand(5)  # what is drawn comes from the record alone
    np.testing.assert_array_equal(pk.KernelMachine(run.trajectory).explain(run.queries).shares, first)


@pytest.mark.parametrize("name", ["dropout", "noise", "batch_norm_1d"])
def test_recording_and_audits_do_not_change_training(name: str) -> None:
    run = Run(name)
    make, _ = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = make().double().train()
        optimizer = torch.optim.SGD(plain.parameters(), lr=RATE, momentum=MU)
        for ids in BATCHES:
            optimizer.zero_grad()
            CE(plain(run.X[list(ids)]), run.y[list(ids)]).backward()
            optimizer.step()
    assert all(torch.equal(value, run.model.state_dict()[key]) for key, value in plain.state_dict().items())


def test_states_of_generators_are_kept_only_where_they_were_used() -> None:
    for name, kept in (("dropout", True), ("batch_norm_1d", False)):
        states = [batch.state for step in Run(name).trajectory.steps() for batch in step.batches]
        assert [bool(state.generators) for state in states] == [kept] * len(BATCHES)


class NumpyNoise(nn.Module):
    """Draws from numpy, whose state nobody records."""

    def __init__(self, source: Any = None) -> None:
        super().__init__()
        self.linear, self.source = nn.Linear(4, 3), source or np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = self.source.standard_normal(tuple(x.shape)) if self.training else 0.0
        return self.linear(x + torch.as_tensor(noise, dtype=x.dtype))


def test_noise_that_cannot_be_repeated_is_refused_before_the_step() -> None:
    with pytest.raises(errors.SampleIdError) as caught:
        Run("", make=NumpyNoise)
    assert "At step 0 the gradient differs from that of the announced samples" in caught.value.found
    assert "the optimizer has not moved" in caught.value.expected
    run = Run("", make=NumpyNoise, audit_every=0)
    with pytest.raises(errors.TrajectoryError, match="random layers draw from torch's own generators"):
        pk.KernelMachine(run.trajectory).explain(run.queries)


@pytest.mark.parametrize(
    "source",
    [
        lambda: np.random.Generator(np.random.MT19937(0)),
        lambda: np.random.Generator(np.random.PCG64(0)),
        lambda: np.random.RandomState(0),
    ],
    ids=["mersenne twister", "pcg64", "random state"],
)
def test_generators_of_numpy_that_a_pass_drew_from_are_named(source: Callable[[], Any]) -> None:
    with np.printoptions(threshold=3), pytest.raises(errors.SampleIdError) as caught:  # however arrays are printed
        Run("", make=lambda: NumpyNoise(source()))
    assert "The network drew from `source`, whose state no record holds" in caught.value.found


class BatchMean(nn.Module):
    """Couples the samples of a batch in a way that no list of layers knows."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        return self.leave(h - h.mean(dim=0) if self.training else h)


def test_coupling_by_a_module_that_nobody_knows_is_found() -> None:
    run = Run("", make=BatchMean)
    np.testing.assert_allclose(run.complete().shares, run.oracle(), rtol=0, atol=1e-10)


def test_outputs_without_the_samples_along_their_first_axis_are_refused() -> None:
    class Summary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.linear(x)
            return z, z.mean()

    model, X = Summary().double(), make_inputs(SAMPLES)
    y = torch.randint(3, (SAMPLES,), generator=generator(2))
    loss, optimizer = lambda z, target: CE(z[0], target) + z[1] ** 2, torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pk.KernelRecorder(model, optimizer, loss, data=(X, y))
    with pytest.raises(errors.InputError) as caught, recorder:
        recorder.batch([0, 1, 2])  # before training
    assert "the model returned tensors of shapes (3, 3), ()" in caught.value.found
    assert "the samples of the batch along its first axis" in caught.value.expected
    assert "compute what belongs to the whole batch inside the loss" in caught.value.write


def test_buffers_that_a_pass_reads_before_it_writes_them() -> None:
    # Spectral normalisation iterates on its buffers in each pass of train mode: replayed from where the pass began.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        normed = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
        model = nn.Sequential(normed, nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4).sin(), torch.arange(8) % 3
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for _ in range(2):
            for x, target in recorder.batches(batch_size=4):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain(X[:3], outputs=0)
    assert why.relative_residual < 1e-12
    assert np.abs(why.channels["rounding"]).max() < 1e-12


class WithTable(nn.Module):
    """Weighs its hidden units by a table that is made, or made longer, by the forward pass that needs it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(4, 5), nn.Linear(5, 3), kind
        if kind == "none at first":
            self.register_buffer("table", None)
        elif kind == "grows":
            self.register_buffer("table", torch.ones(1, 5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = len(x) if self.kind == "grows" else 1
        table = getattr(self, "table", None)
        if table is None or len(table) < length:
            made = torch.linspace(0.5, 1, 5, dtype=x.dtype).expand(length, 5).clone()
            if self.kind == "registered late":
                self.register_buffer("table", made, persistent=False)
            else:
                self.table = made
        return self.last(self.first(x).tanh() * self.table[:length])


def shares_by_hand(
    before: nn.Module, after: nn.Module, x: Tensor, y: Tensor, queries: Tensor, rate: float
) -> np.ndarray:
    """What each sample of a step of SGD moved output 0, (Q, B): gradients sample by sample, eight nodes on the step."""
    rows = []
    for k in range(len(x)):
        gradients = torch.autograd.grad(CE(before(x[k : k + 1]), y[k : k + 1]) / len(x), list(before.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    start, end = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (before, after))
    moved, shares = copy.deepcopy(before), torch.zeros(len(queries), len(x), dtype=x.dtype)
    for node, weight in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        nn.utils.vector_to_parameters(start + (node + 1) / 2 * (end - start), moved.parameters())
        for q in range(len(queries)):
            gradients = torch.autograd.grad(moved(queries[q : q + 1])[0, 0], list(moved.parameters()))
            slope = torch.cat([g.reshape(-1) for g in gradients])
            shares[q] -= weight / 2 * rate * torch.stack(rows) @ slope
    return shares.numpy()


@pytest.mark.parametrize("schedule", [None, pk.Schedule(keyframes=2)], ids=["every step", "keyframes"])
@pytest.mark.parametrize("kind", ["none at first", "registered late", "grows"])
def test_buffers_that_a_forward_pass_makes(kind: str, schedule: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WithTable(kind).double()
    if kind == "grows":
        model.table.copy_(torch.linspace(0.5, 1, 5))
    X, y = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4).sin(), torch.arange(8) % 3
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=0.3), np.zeros((3, 8))
    options = {"task": "classification", "audit_every": 1, **({} if schedule is None else {"schedule": schedule})}
    with pk.KernelRecorder(model, optimizer, data=(X, y), **options) as recorder:
        for ids in ([0, 1], [2, 3, 4, 5], [6, 7], [1, 3, 5, 7]):
            recorder.batch(ids)
            optimizer.zero_grad()
            CE(model(X[ids]), y[ids]).backward()
            before = copy.deepcopy(model)
            optimizer.step()
            expected[:, ids] += shares_by_hand(before, model, X[ids], y[ids], X[:3], 0.3)
    why = pk.KernelMachine(recorder.trajectory, quadrature=pk.GaussLegendre(6)).explain(X[:3], outputs=0)
    assert why.relative_residual < 1e-12
    np.testing.assert_allclose(why.shares, expected, atol=1e-12)
