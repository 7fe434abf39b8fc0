"""Whatever the loss, the outputs and the inputs look like: shares against one optimizer step after another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import generator, make_inputs, make_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pathkernel as pk

SAMPLES = 10
BATCHES = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9, 0, 1), (2, 2, 5, 7))
RATE = 0.05


def take(tree: Any, index: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def flat(outputs: Any) -> Tensor:
    return torch.cat([z.reshape(len(z), -1) for z in pytree.tree_leaves(outputs) if z.is_floating_point()], dim=1)


def call(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def train(
    model: nn.Module,
    loss: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    recorded: Callable[..., Tensor] | None = None,
    **options: Any,
) -> pk.Trajectory:
    """Train by plain gradient descent; the recorder is told of ``loss`` or of another name for it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with pk.KernelRecorder(
        model, optimizer, recorded or loss, data=(inputs, targets), audit_every=1, **options
    ) as recorder:
        for ids in BATCHES:
            x, y = recorder.batch(list(ids))
            optimizer.zero_grad()
            loss(call(model, x), y).backward()
            optimizer.step()
    return recorder.trajectory


def at(trajectory: pk.Trajectory, theta: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(trajectory.model)
    with torch.no_grad():
        for name, value in theta.items():
            twin.get_parameter(name).copy_(value)
    return twin


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def oracle(
    trajectory: pk.Trajectory, loss: Callable[..., Tensor], inputs: Any, targets: Any, queries: Any, output: int
) -> np.ndarray:
    """Shares (Q, N) under plain gradient descent: −η q_s · c_i g_i, added up over the steps.

    c_i g_i is how fast the batch loss falls if sample i's outputs alone follow the parameters: a second network takes
    the place of the first in row i of the outputs.
    """
    shares = torch.zeros(len(pytree.tree_leaves(queries)[0]), SAMPLES, dtype=torch.float64)
    for s, ids in enumerate(BATCHES):
        x, y = take(inputs, list(ids)), take(targets, list(ids))
        start, end = trajectory.parameters(s), trajectory.parameters(s + 1)
        fixed, moving = at(trajectory, start), at(trajectory, start)
        rows = []
        for i in range(len(ids)):
            with torch.no_grad():
                others = call(fixed, x)
            own = torch.zeros(len(ids), dtype=torch.bool)
            own[i] = True

            def mixed(z: Tensor, z_own: Tensor, own: Tensor = own) -> Tensor:
                return torch.where(own.reshape(-1, *[1] * (z.dim() - 1)), z_own, z)

            rows.append(gradient(loss(pytree.tree_map(mixed, others, call(moving, x)), y), moving))
        delta = torch.cat([(end[n] - start[n]).reshape(-1) for n in dict(moving.named_parameters())])
        middle = at(trajectory, {n: (start[n] + end[n]) / 2 for n in start})
        for q in range(len(shares)):
            query = take(queries, slice(q, q + 1))
            average = gradient(flat(call(middle, query))[0, output], middle)
            change = (flat(call(at(trajectory, end), query)) - flat(call(fixed, query)))[0, output].detach()
            average = average + (change - average @ delta) * delta / (delta @ delta)
            shares[q].index_add_(0, torch.tensor(ids), -RATE * torch.stack(rows) @ average)
    return shares.numpy()


def verify(
    trajectory: pk.Trajectory, loss: Callable[..., Tensor], inputs: Any, targets: Any, queries: Any, output: int = 0
) -> None:
    machine = pk.KernelMachine(trajectory)
    why = machine.explain(queries, outputs=lambda z: z[output])
    assert why.relative_residual <= 1e-10
    with torch.no_grad():
        live = flat(call(trajectory.model, queries)).numpy()
    decision = machine.decision_function(queries)
    np.testing.assert_allclose(decision.reshape(live.shape), live, rtol=0, atol=1e-12)
    np.testing.assert_allclose(why.output, live[:, output], rtol=0, atol=1e-12)
    expected = oracle(trajectory, loss, inputs, targets, queries, output)
    np.testing.assert_allclose(why.shares, expected, rtol=0, atol=1e-12)
    assert np.abs(expected).max() > 1e-4
    moved = np.abs(why.output - why.initial).max()
    assert np.abs(why.channels["rounding"]).max() <= 1e-12 * max(moved, 1.0)


# -- losses -----------------------------------------------------------------------------------------------------------

CLASSES = torch.randint(3, (SAMPLES,), generator=generator(2))
IGNORED = torch.where(torch.arange(SAMPLES) % 4 == 3, -100, CLASSES)
REAL = torch.randn(SAMPLES, 3, dtype=torch.float64, generator=generator(3))
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


@dataclass(frozen=True)
class LossCase:
    """A loss with targets for three outputs."""

    loss: Callable[..., Tensor]
    targets: Tensor


LOSSES = {
    "label_smoothing": LossCase(nn.CrossEntropyLoss(label_smoothing=0.2), CLASSES),
    "class_weights": LossCase(nn.CrossEntropyLoss(weight=WEIGHT), CLASSES),
    "class_weights_and_smoothing": LossCase(nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), CLASSES),
    "ignore_index": LossCase(nn.CrossEntropyLoss(), IGNORED),
    "ignore_index_sum": LossCase(nn.CrossEntropyLoss(reduction="sum", ignore_index=1), CLASSES),
    "soft_labels": LossCase(nn.CrossEntropyLoss(), REAL.softmax(dim=1)),
    "nll": LossCase(nn.NLLLoss(), CLASSES),
    "huber": LossCase(nn.HuberLoss(delta=0.5), REAL),
    "smooth_l1_sum": LossCase(nn.SmoothL1Loss(reduction="sum"), REAL),
    "hinge": LossCase(nn.MultiMarginLoss(), CLASSES),
    "bce": LossCase(nn.BCEWithLogitsLoss(pos_weight=WEIGHT), (REAL > 0).double()),
    "mse": LossCase(nn.MSELoss(), REAL),
    "l1": LossCase(nn.L1Loss(), REAL),
    "kl": LossCase(lambda z, y: F.kl_div(z.log_softmax(1), y, reduction="batchmean"), REAL.softmax(dim=1)),
    "a_function": LossCase(lambda z, y: ((z - y).abs() + 0.1).log().sum(dim=1).mean() * 2, REAL),
    "numbers_by_sample": LossCase(lambda z, y: (z - y).square().sum(dim=1).mean(dim=0), REAL),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss, targets = LOSSES[name].loss, LOSSES[name].targets
    model = make_model()
    if name == "nll":
        model = nn.Sequential(*model, nn.LogSoftmax(dim=1))
    X = make_inputs(SAMPLES)
    verify(train(model, loss, X, targets), loss, X, targets, make_inputs(2, seed=8), output=1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_with_one_number_for_every_output_of_a_sample(reduction: str) -> None:
    # Numbers of one sample are averaged; the samples are then reduced as the loop says.
    def loss(z: Tensor, y: Tensor) -> Tensor:
        return getattr((z - y).square().mean(dim=1), reduction)()

    X, each = make_inputs(SAMPLES), nn.MSELoss(reduction="none")
    run = train(make_model(), loss, X, REAL, recorded=each, reduction=reduction)
    verify(run, loss, X, REAL, make_inputs(2, seed=8), output=1)


def test_ignored_samples_have_no_share() -> None:
    X = make_inputs(SAMPLES)
    run = train(make_model(), nn.CrossEntropyLoss(), X, IGNORED)
    shares = pk.KernelMachine(run).explain(make_inputs(2, seed=8), outputs=0).shares
    assert (shares[:, [3, 7]] == 0).all() and (shares[:, [0, 1, 2, 4, 5, 6, 8, 9]] != 0).all()


def test_a_contrastive_loss_couples_the_samples_of_a_batch() -> None:
    # Two views of each sample; the other samples of its batch are its negatives.
    def loss(z: Tensor, positions: Tensor) -> Tensor:
        one, two = (F.normalize(part, dim=1) for part in z.chunk(2, dim=1))
        return F.cross_entropy(one @ two.T / 0.5, torch.arange(len(z)))

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = make_model()

        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            return torch.cat([self.encoder(one), self.encoder(two)], dim=1)

    X, targets = make_inputs(SAMPLES), torch.zeros(SAMPLES)
    views = (X, X + 0.3 * make_inputs(SAMPLES, seed=5))
    run = train(Siamese(), loss, views, targets)
    verify(run, loss, views, targets, (make_inputs(2, seed=8), make_inputs(2, seed=9)), output=4)


# -- outputs and inputs of any shape ----------------------------------------------------------------------------------


class Heads(nn.Module):
    """Several outputs, by name or by place, one of them of integers."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.body, self.classes, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        logits, value = self.classes(h), self.value(h).reshape(-1, 2, 1)
        if self.kind is dict:
            return {"logits": logits, "value": value, "chosen": logits.argmax(dim=1)}
        return (logits, value)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_several_outputs(kind: type) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Heads(kind).double()
    places = ("logits", "value") if kind is dict else (0, 1)

    def loss(outputs: Any, targets: dict[str, Tensor]) -> Tensor:
        logits, value = (outputs[place] for place in places)
        return F.cross_entropy(logits, targets["class"]) + 0.5 * F.mse_loss(value.flatten(1), targets["value"])

    X, targets = make_inputs(SAMPLES), {"class": CLASSES, "value": REAL[:, :2]}
    run = train(model, loss, X, targets)
    for output in (1, 4):  # a logit, a value
        verify(run, loss, X, targets, make_inputs(2, seed=8), output)


class Masked(nn.Module):
    """Takes an image and which of its pixels are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.leave = nn.Conv2d(1, 3, 2), nn.Linear(12, 2)

    def forward(self, image: Tensor, seen: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.convolution(image * seen)).flatten(1))


def test_inputs_as_a_tuple_of_image_and_mask() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Masked().double()

    def pixels(n: int, seed: int) -> tuple[Tensor, Tensor]:
        return make_inputs(n, (1, 3, 3), seed=seed), torch.rand(n, 1, 3, 3, generator=generator(seed)) < 0.7

    inputs, targets = pixels(SAMPLES, 1), REAL[:, :2]
    verify(train(model, nn.MSELoss(), inputs, targets), nn.MSELoss(), inputs, targets, pixels(2, 8), output=1)


class Mixed(nn.Module):
    """Takes a dict of numbers and categories, and an offset beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.category, self.leave = nn.Embedding(4, 3), nn.Linear(7, 2)

    def forward(self, features: dict[str, Tensor], offset: Tensor) -> Tensor:
        h = torch.cat([features["numbers"], self.category(features["category"])], dim=1)
        return self.leave(torch.tanh(h)) + offset


def test_inputs_as_a_dict_inside_a_tuple() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mixed().double()

    def features(n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        category = torch.randint(4, (n,), generator=generator(seed))
        return {"numbers": make_inputs(n, seed=seed), "category": category}, make_inputs(n, (2,), seed=seed + 1)

    inputs, targets = features(SAMPLES, 1), REAL[:, :2]
    verify(train(model, nn.MSELoss(), inputs, targets), nn.MSELoss(), inputs, targets, features(2, 8))


TOKENS, LENGTH, WIDTH = 7, 5, 4


class Transformer(nn.Module):
    """A small causal language model whose embedding is its output layer too; token ids in, (B, T, V) out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(TOKENS, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position[: tokens.shape[1]]
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        return self.head(self.layer(h, src_mask=future))


def transformer() -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer().double()


def test_a_masked_sequence_loss_of_a_causal_transformer_with_a_tied_embedding() -> None:
    model = transformer()
    assert "head.weight" not in dict(model.named_parameters())
    text = torch.randint(1, TOKENS, (SAMPLES, LENGTH + 1), generator=generator(4))
    lengths = torch.randint(2, LENGTH + 1, (SAMPLES, 1), generator=generator(5))
    inputs, following = text[:, :-1], text[:, 1:]
    targets = {"tokens": following, "counted": (torch.arange(LENGTH) < lengths).double()}

    def loss(logits: Tensor, target: dict[str, Tensor]) -> Tensor:
        each = F.cross_entropy(logits.transpose(1, 2), target["tokens"], reduction="none")
        return (each * target["counted"]).sum() / target["counted"].sum()

    run = train(model, loss, inputs, targets)
    assert run.layout.size == sum(p.numel() for p in model.parameters())
    queries = torch.randint(1, TOKENS, (2, LENGTH), generator=generator(6))
    verify(run, loss, inputs, targets, queries, output=2 * TOKENS + 3)
    # What follows the last counted token of a sample has no part in it.
    other = torch.where(targets["counted"].bool(), following, 0)
    again = train(transformer(), loss, inputs, {**targets, "tokens": other})
    shares = [pk.KernelMachine(t).explain(queries, outputs=lambda z: z[0]).shares for t in (run, again)]
    np.testing.assert_allclose(*shares, rtol=0, atol=1e-14)
