"""Samples along another axis than the first, and loops that call parts of the network."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import pathkernel as pk
from pathkernel.errors import InputError, RecordingError

CE = nn.CrossEntropyLoss()
N, T, B = 12, 5, 4


class Recurrent(nn.Module):
    """A time-first recurrent network that hands its state on: (T, B, F), (1, B, H) -> (T, B, C), (1, B, H)."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.rnn, self.out = nn.RNN(3, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)

    def forward(self, x, state=None):
        h, state = self.rnn(x, state)
        return self.out(h), state


def sequences(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(N, T, 3, dtype=dtype), torch.randint(2, (N, T))


def recurrent(dtype=torch.float64):
    torch.manual_seed(1)
    return Recurrent(dtype)


def train(model, optimizer, recorder=None, carried=False):
    X, y = sequences(next(model.parameters()).dtype)
    state = None
    for i in torch.arange(N).split(B):
        if recorder is not None:
            recorder.announce(i)
        optimizer.zero_grad()
        z, new = model(X[i].transpose(0, 1), state)
        CE(z.flatten(0, 1), y[i].T.flatten()).backward()
        optimizer.step()
        state = new.detach() if carried else None


@pytest.mark.parametrize("axes", [1, (1, 1), {"x": 1, "state": 1, "outputs": 1}], ids=["int", "tuple", "dict"])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_time_first(axes, carried, tmp_path):
    (X, y), model, plain = sequences(), recurrent(), recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pk.KernelRecorder(
        model, optimizer, data=(X, y), outputs=0, batch_axis=axes, store=tmp_path / "run", audit_every=1
    ) as recorder:
        train(model, optimizer, recorder, carried)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.5), None, carried)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    batch = recorder.trajectory.store.read(1).batches[0]
    assert batch.cotangents.shape == (B, T * 2)
    if carried:
        assert batch.inputs[1].shape == (B, 1, 4)  # samples first
    opened = pk.Trajectory.open(tmp_path / "run", model=model, data=(X, y))
    assert opened.run.batch_axis == axes
    for record in (recorder.trajectory, opened, pickle.loads(pickle.dumps(recorder.trajectory))):
        machine = pk.KernelMachine(record)
        why = machine.explain(X[:3], outputs=3)
        assert max(*why.residual, why.split_error) <= 1e-10
        expected = model(X[:3].transpose(0, 1))[0].transpose(0, 1).flatten(1)[:, 3]
        assert torch.allclose(torch.as_tensor(why.output).flatten(), expected, atol=1e-12)


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.words, self.rnn, self.drop = nn.Embedding(7, 4), nn.LSTM(4, 5), nn.Dropout(0.2)
        self.out = nn.Linear(5, 7)

    def forward(self, x, hidden):
        h, hidden = self.rnn(self.drop(self.words(x)), hidden)
        return self.out(self.drop(h)), hidden


@pytest.mark.parametrize("schedule", [None, pk.Keyframes(2)], ids=["whole", "keyframes"])
def test_truncated_backpropagation_through_time(schedule):
    """Hidden states are carried on as inputs, (1, B, H) each; nothing is known of the data."""
    model, stream = Language(), torch.randint(7, (31, B))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    hidden = torch.zeros(1, B, 5), torch.zeros(1, B, 5)
    with pk.KernelRecorder(model, optimizer, outputs=0, batch_axis=1, schedule=schedule, audit_every=1) as recorder:
        for k in range(0, 30, 10):
            recorder.announce(torch.arange(B) + B * (k // 10))
            optimizer.zero_grad()
            z, hidden = model(stream[k : k + 10], tuple(h.detach() for h in hidden))
            CE(z.flatten(0, 1), stream[k + 1 : k + 11].flatten()).backward()
            optimizer.step()
    state = torch.zeros(B, 1, 5)
    why = pk.KernelMachine(recorder.trajectory).explain((stream[:10].T, (state, state)), outputs=5)
    assert why.shares.shape == (B, 3 * B)
    assert max(*why.residual, why.split_error) <= 1e-5


def test_samples_first_gives_the_same_shares():
    (X, y), model = sequences(), recurrent()

    class First(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.transpose(0, 1))[0].transpose(0, 1)

    other, shares = First(copy.deepcopy(model)), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pk.KernelRecorder(model, optimizer, data=(X, y), returns=0, batch_axis=1) as recorder:
        train(model, optimizer, recorder)
    shares.append(pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=1).shares)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.5)
    with pk.KernelRecorder(other, optimizer, data=(X, y)) as recorder:
        for i in torch.arange(N).split(B):
            recorder.announce(i)
            optimizer.zero_grad()
            CE(other(X[i]).transpose(0, 1).flatten(0, 1), y[i].T.flatten()).backward()
            optimizer.step()
    shares.append(pk.KernelMachine(recorder.trajectory).explain(X[:2], outputs=1).shares)
    assert torch.allclose(*map(torch.as_tensor, shares), atol=1e-12)


class Flat(nn.Module):
    """A recurrent network of two layers whose outputs have time first, flattened or not, or samples first."""

    def __init__(self, form, width):
        super().__init__()
        self.form, self.rnn, self.out = form, nn.RNN(3, 4, 2, dtype=torch.float64), nn.Linear(4, width).double()

    def forward(self, x, state):
        x = x.transpose(0, 1) if self.form == "samples" else x
        z = self.out(self.rnn(x, state)[0])
        z = z.squeeze(-1) if z.shape[-1] == 1 else z
        forms = {"time": z, "flat": z.flatten(0, 1), "samples": z.transpose(0, 1)}
        return forms[self.form]


@pytest.mark.parametrize("width", [1, 2, B, 2 * B])
@pytest.mark.parametrize("steps", [2, B, 2 * B])
def test_time_and_samples_flattened_are_taken_apart(steps, width):
    """Also where the number of outputs, steps, samples or layers is that of another."""
    torch.manual_seed(2)
    X, y = torch.randn(N, steps, 3, dtype=torch.float64), torch.randn(N, steps, width, dtype=torch.float64)
    shares = {}
    for form in ("samples", "time", "flat"):
        torch.manual_seed(1)
        model = Flat(form, width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        axes = {"state": 1} if form == "samples" else 1
        with pk.KernelRecorder(model, optimizer, data=N, batch_axis=axes, task="regression", audit_every=1) as recorder:
            for i in torch.arange(N).split(B):
                recorder.announce(i)
                optimizer.zero_grad()
                target = y[i] if form == "samples" else y[i].transpose(0, 1)
                z = model(X[i] if form == "samples" else X[i].transpose(0, 1), torch.zeros(2, len(i), 4).double())
                (z.reshape(target.shape) - target).square().mean().backward()
                optimizer.step()
        why = pk.KernelMachine(recorder.trajectory).explain((X[:3], torch.zeros(3, 2, 4).double()), outputs="all")
        assert max(*why.residual, why.split_error) <= 1e-10
        shares[form] = why.shares
    np.testing.assert_allclose(shares["time"], shares["samples"], atol=1e-14)
    np.testing.assert_allclose(shares["flat"], shares["samples"], atol=1e-14)


@pytest.mark.parametrize("axis", [-1, True, "x", (), {"x": "first"}], ids=repr)
def test_what_is_no_axis_is_refused(axis):
    model = recurrent()
    with pytest.raises(InputError, match="axis of the samples") as caught:
        pk.KernelRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), data=sequences(), batch_axis=axis)
    assert "batch_axis=1" in str(caught.value)


class Container(nn.Module):
    """No forward of its own, as many a module of a framework."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
        self.head = nn.Linear(6, 3).double()
        self.spare = nn.Linear(4, 3).double()


def points():
    torch.manual_seed(0)
    return torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))


WATCHED = {
    "name": (lambda m: "encoder", lambda m, x: m.encoder(x)),
    "module": (lambda m: m.encoder, lambda m, x: m.encoder(x)),
    "parts": (lambda m: ("encoder", "head"), lambda m, x: m.head(m.encoder(x))),
}


@pytest.mark.parametrize("kind", WATCHED)
def test_parts_that_the_loop_calls(kind, tmp_path):
    (watch, call), (X, y) = WATCHED[kind], points()
    model, plain = Container(), Container()

    def loop(net, optimizer, recorder=None):
        for i in torch.arange(N).split(B):
            if recorder is not None:
                recorder.announce(i)
            optimizer.zero_grad()
            CE(call(net, X[i]), y[i]).backward()
            optimizer.step()
            net.head(torch.zeros(2, 6, dtype=torch.float64))  # by itself: no pass of the network

    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with pk.KernelRecorder(
        model, optimizer, CE, (X, y), watch=watch(model), store=tmp_path / "run", audit_every=1
    ) as recorder:
        loop(model, optimizer, recorder)
    loop(plain, torch.optim.Adam(plain.parameters(), lr=0.1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    opened = pk.Trajectory.open(tmp_path / "run", model=model, loss=CE, data=(X, y))
    for record in (recorder.trajectory, opened, pickle.loads(pickle.dumps(recorder.trajectory))):
        why = pk.KernelMachine(record).explain(X[:3], outputs=1)
        assert max(*why.residual, why.split_error) <= 1e-10
        assert torch.allclose(torch.as_tensor(why.output).flatten(), call(model, X[:3])[:, 1], atol=1e-12)


def test_shares_of_parts_are_those_of_the_module_that_calls_them():
    (X, y), model, shares = points(), Container(), []
    whole = nn.Sequential(copy.deepcopy(model.encoder), copy.deepcopy(model.head))
    for net, call, watch in ((model, WATCHED["parts"][1], ("encoder", "head")), (whole, lambda m, x: m(x), None)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with pk.KernelRecorder(net, optimizer, CE, (X, y), watch=watch) as recorder:
            for i in torch.arange(N).split(B):
                recorder.announce(i)
                optimizer.zero_grad()
                CE(call(net, X[i]), y[i]).backward()
                optimizer.step()
        shares.append(torch.as_tensor(pk.KernelMachine(recorder.trajectory).explain(X[:3], outputs=1).shares))
    assert torch.allclose(*shares, atol=1e-13)


def test_parts_with_something_in_between_are_refused():
    (X, y), model = points(), Container()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(InputError, match=r"'head'.*'encoder'"),
        pk.KernelRecorder(model, optimizer, CE, (X, y), watch=("encoder", "head")) as recorder,
    ):
        recorder.announce(torch.arange(B))
        model.head(2 * model.encoder(X[:B]))


def test_gradients_outside_the_watched_part_are_refused():
    (X, y), model = points(), Container()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(RecordingError, match=r"spare\.weight.*watched") as caught,
        pk.KernelRecorder(model, optimizer, CE, (X, y), watch=("encoder", "head")) as recorder,
    ):
        recorder.announce(torch.arange(B))
        CE(model.head(model.encoder(X[:B])) + model.spare(X[:B]), y[:B]).backward()
        optimizer.step()
    assert "watch=" in str(caught.value)


def test_a_module_that_cannot_be_called_names_its_parts():
    model = Container()
    with pytest.raises(InputError, match="no `forward`") as caught:
        pk.KernelRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), CE, points())
    assert '"encoder"' in str(caught.value) or "'encoder'" in str(caught.value)


@pytest.mark.parametrize("watch", ["nothing", nn.Linear(1, 1), ("encoder", "tail")], ids=["name", "module", "parts"])
def test_what_is_no_part_is_refused(watch):
    model = Container()
    with pytest.raises(InputError, match="no part of the Container") as caught:
        pk.KernelRecorder(model, torch.optim.SGD(model.parameters(), lr=0.1), CE, points(), watch=watch)
    assert "'head'" in str(caught.value)


def test_samples_on_another_axis_are_asked_for_where_the_data_are_not_at_hand() -> None:
    """Time first, five steps of three samples, and nobody said so."""
    rnn = nn.GRU(2, 4)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.1)
    with (
        pytest.raises(pk.errors.SampleIdError, match=r"no tensor with 3 rows \(shapes: \(5, 3, 2\)\).*batch_axis=1"),
        pk.KernelRecorder(rnn, optimizer, data=9, returns=0) as recorder,
    ):
        recorder.announce([0, 1, 2])
        rnn(torch.randn(5, 3, 2))[0].sum().backward()
        optimizer.step()
