"""The network is called as the loop likes: by name, with several inputs, flags, shared tensors, and labels."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pathkernel as pk
from pathkernel.errors import InputError

torch.manual_seed(0)
N, T, V = 12, 5, 7
IDS = torch.randint(V, (N, T))
MASK = (torch.rand(N, T) > 0.2) | (torch.arange(T) == 0)
LABELS = torch.randint(3, (N,))
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Encoder(nn.Module):
    """A classifier in the manner of BERT: keyword inputs, flags, and its own loss where it is given labels."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.words, self.places = nn.Embedding(V, 4, dtype=dtype), nn.Embedding(T, 4, dtype=dtype)
        self.body, self.head = nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 3, dtype=dtype)

    def forward(self, input_ids, attention_mask=None, positions=None, use_cache=True, scale=1.0, labels=None):
        h = self.words(input_ids)
        if positions is not None:
            h = h + self.places(positions)
        h = torch.tanh(self.body(h)) * scale
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        logits = self.head(h.mean(1))
        if use_cache:
            logits = logits * 2.0
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "hidden": h}


def encoder(dtype=torch.float64):
    torch.manual_seed(1)
    return Encoder(dtype)


CALLS = {
    "by name": lambda m, i: m(input_ids=IDS[i], attention_mask=MASK[i], use_cache=False),
    "by place": lambda m, i: m(IDS[i], MASK[i]),
    "both": lambda m, i: m(IDS[i], attention_mask=MASK[i], scale=0.5),
    "None between": lambda m, i: m(IDS[i], None, torch.arange(T)),
    "shared by name": lambda m, i: m(positions=torch.arange(T), input_ids=IDS[i], scale=torch.tensor(0.7)),
    "own loss": lambda m, i: m(IDS[i], attention_mask=MASK[i], labels=LABELS[i]),
}
DATA = {
    "by name": {"input_ids": IDS, "attention_mask": MASK},
    "by place": (IDS, MASK),
    "both": {"input_ids": IDS, "attention_mask": MASK},
    "None between": IDS,
    "shared by name": IDS,
    "own loss": {"input_ids": IDS, "attention_mask": MASK},
}


def train(model, call, recorder=None, steps=3, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr) if recorder is None else recorder.optimizer
    for step in range(steps):
        i = (torch.arange(4 if step else 6) * 5 + step) % N
        if recorder is not None:
            recorder.announce(i)
        optimizer.zero_grad()
        out = call(model, i)
        loss = F.cross_entropy(out["logits"], LABELS[i]) if out["loss"] is None else out["loss"]
        loss.backward()
        optimizer.step()


def by_autograd(model, call, initial, queries, output, lr=0.1, nodes=7):
    """Shares of plain SGD by autograd and Gauss-Legendre: an independent, slow computation."""
    net = copy.deepcopy(model)
    net.load_state_dict(initial)
    parameters = list(net.parameters())
    points, weights = torch.tensor(0.0), None
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(nodes)
    shares = torch.zeros(len(queries), N, dtype=torch.float64)
    for step in range(3):
        i = (torch.arange(4 if step else 6) * 5 + step) % N
        before = [p.detach().clone() for p in parameters]
        out = call(net, i)
        loss = F.cross_entropy(out["logits"], LABELS[i])
        (slope,) = torch.autograd.grad(loss, out["logits"], retain_graph=True)
        rows = []
        for k in range(len(i)):
            one = torch.zeros_like(slope)
            one[k] = slope[k]
            own = torch.autograd.grad(out["logits"], parameters, one, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, own, strict=True)])
        total = [sum(parts) for parts in zip(*rows, strict=True)]
        for t, w in zip((points + 1) / 2, weights / 2, strict=True):
            with torch.no_grad():
                for p, b, g in zip(parameters, before, total, strict=True):
                    p.copy_(b - lr * t * g)
            for q, query in enumerate(queries):
                z = query(net)[0, output]
                own = torch.autograd.grad(z, parameters, allow_unused=True)
                for k, j in enumerate(i.tolist()):
                    parts = [(g * r).sum() for g, r in zip(own, rows[k], strict=True) if g is not None]
                    shares[q, j] -= lr * w * sum(parts)
        with torch.no_grad():
            for p, b, g in zip(parameters, before, total, strict=True):
                p.copy_(b - lr * g)
    return shares


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", CALLS)
def test_any_call_is_recorded_and_explained(form, dtype):
    model, plain = encoder(dtype), encoder(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, data=(DATA[form], LABELS), outputs="logits", audit_every=1) as recorder:
        train(model, CALLS[form], recorder)
    train(plain, CALLS[form])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    i = torch.arange(2)
    queries = torch.utils._pytree.tree_map(lambda leaf: leaf[i], DATA[form])
    trajectory = pickle.loads(pickle.dumps(recorder.trajectory))
    for record in (recorder.trajectory, trajectory):
        why = pk.KernelMachine(record).explain(queries, outputs=1)
        assert max(*why.residual, why.split_error) <= TOLERANCE[dtype]


def test_shares_are_those_of_autograd():
    model = encoder()
    initial = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    form = "both"
    with pk.KernelRecorder(model, optimizer, data=(DATA[form], LABELS), returns="logits") as recorder:
        train(model, CALLS[form], recorder)
    queries = torch.utils._pytree.tree_map(lambda leaf: leaf[:2], DATA[form])
    machine = pk.KernelMachine(recorder.trajectory, quadrature=pk.GaussLegendre(7))
    shares = torch.as_tensor(machine.explain(queries, outputs=1).shares)
    asked = [lambda net, q=q: CALLS[form](net, torch.tensor([q]))["logits"] for q in range(2)]
    expected = by_autograd(model, CALLS[form], initial, asked, 1)
    assert (shares - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_labels_are_inputs_and_queries_need_none(tmp_path):
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = (DATA["own loss"], LABELS)
    with pk.KernelRecorder(model, optimizer, data=data, returns="logits", store=tmp_path / "run") as recorder:
        train(model, CALLS["own loss"], recorder)
    batch = recorder.trajectory.store.read(0).batches[0]
    assert set(batch.inputs) == {"input_ids", "attention_mask", "labels"}
    opened = pk.Trajectory.open(tmp_path / "run", model=model, data=data)
    queries = {name: value[:2] for name, value in DATA["own loss"].items()}
    whys = [pk.KernelMachine(each).explain(queries, outputs=0) for each in (recorder.trajectory, opened)]
    assert torch.equal(*(torch.as_tensor(why.shares) for why in whys))
    assert whys[1].residual.max() <= 1e-10


def test_what_is_shared_is_kept_once_and_read_again(tmp_path):
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, data=(IDS, LABELS), returns="logits", store=tmp_path / "run") as recorder:
        train(model, CALLS["shared by name"], recorder)
    opened = pk.Trajectory.open(tmp_path / "run", model=model, data=(IDS, LABELS))
    states = [batch.state.arguments for step in opened.steps() for batch in step.batches]
    assert states[0].keys() == {"positions", "scale"}
    assert all(one is states[0] for one in states)
    assert torch.equal(states[0]["positions"], torch.arange(T))
    assert pk.KernelMachine(opened).explain(IDS[:2], outputs=0).residual.max() <= 1e-10


def test_keyframes_train_again_with_what_is_shared():
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(
        model, optimizer, data=(DATA["own loss"], LABELS), returns="logits", schedule=pk.Keyframes(8)
    ) as recorder:
        train(model, CALLS["own loss"], recorder)
    queries = {name: value[:2] for name, value in DATA["own loss"].items()}
    assert pk.KernelMachine(recorder.trajectory).explain(queries, outputs=0).residual.max() <= 1e-10


def test_two_names_of_one_argument():
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="Leave one of them out") as caught:
        pk.KernelRecorder(model, optimizer, data=(IDS, LABELS), returns="logits", outputs="hidden")
    assert "outputs='hidden'" in str(caught.value)


def test_what_is_as_long_as_a_batch_may_be_said_to_be_shared():
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(
        model, optimizer, data=(IDS, LABELS), returns="logits", batch_axis={"positions": None}
    ) as recorder:
        i = torch.arange(T)  # as many samples as positions
        recorder.announce(i)
        F.cross_entropy(model(IDS[i], positions=torch.arange(T))["logits"], LABELS[i]).backward()
        optimizer.step()
    assert recorder.trajectory.arguments.keys() == {"positions"}
    assert pk.KernelMachine(recorder.trajectory).explain(IDS[:2], outputs=0).residual.max() <= 1e-10


def test_an_argument_that_holds_both_is_refused():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x, extra):
            return self.linear(x) * extra["scale"]

    model, X = Mixed(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(InputError, match="an argument of its own"),
        pk.KernelRecorder(model, optimizer, data=(X, torch.zeros(8))) as recorder,
    ):
        recorder.announce(torch.arange(4))
        model(X[:4], {"rows": torch.ones(4), "scale": 2.0}).sum().backward()
        optimizer.step()


class Auxiliary(nn.Module):
    """Returns more in training than in evaluation, as torchvision's Inception does, or more with labels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.auxiliary = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        z = self.body(x)
        if self.training:
            return z, self.auxiliary(x)
        return z


@pytest.mark.parametrize("returns", [0, lambda returned: returned[0] if isinstance(returned, tuple) else returned])
def test_a_tensor_that_is_returned_alone_is_the_outputs(returns: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    model = Auxiliary()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, data=(x, y), returns=returns, task="classification") as recorder:
        for features, target in recorder.batches(3):
            optimizer.zero_grad()
            z, _ = model(features)
            nn.functional.cross_entropy(z, target).backward()
            optimizer.step()
    why = pk.KernelMachine(recorder.trajectory).explain(x[:2], outputs=1)
    with torch.no_grad():
        assert torch.allclose(torch.as_tensor(why.output).float(), model.eval()(x[:2])[:, 1], atol=1e-5)
    assert why.residual.max() < 1e-5
