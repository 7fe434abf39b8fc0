"""How exactly does the kernel machine reproduce the network? Real trainings, one row each.

    python benchmarks/exactness.py [--quick] [--json FILE] [--seed N]

Every row trains a network under `KernelRecorder`, explains test samples by their training samples, and compares the sum
Σ shares + Σ channels with what the network itself says:

residual            ‖left over‖ / ‖f_S − f_0‖ over all queries
quadrature_error    median over the queries of what the rule missed along the steps before any correction
split_error         how far rows of gradients are from passes of the batches as they ran; None where not measured
gradients_per_step  of each query
agreement           share of the queries on which `KernelMachine.predict` equals the network's prediction (classifiers)
seconds             for `explain`, without training

The first part has every optimizer on every network and loss; the second, what happens between backward() and step()
and beside it: averaged weights, accumulation, clipping, mixed precision with a skipped step, noise, and more. The last
has the optimizers of the package and a few of torch's in loops whose loss the recorder does not know or cannot
evaluate: none given, returned by the network, that of a live discriminator, and one with a gradient penalty.

Exit status 1 if a limit is exceeded. To add a case, add an entry to one of the tables OPTIMIZERS, NETWORKS, PROBLEMS,
LOOPS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn, optim

import pathkernel as pk
from pathkernel.optimizers.momentum import Momentum
from pathkernel.optimizers.runge_kutta import Heun, RungeKutta4
from pathkernel.optimizers.scaled import Lion, NormalizedDescent, PolyakStep, ScalarRMSprop, SignDescent
from pathkernel.quadrature import Quadrature
from pathkernel.update_rules.rule import UpdateRule

# A recorded step is θ + Δ rounded to the parameters' type, and that rounding belongs to no sample. It is the machine
# epsilon (1.2e-7 and 2.2e-16), magnified by ‖θ‖ / ‖Δ‖ where training moved little.
RESIDUAL_LIMIT = {torch.float32: 1e-4, torch.float64: 1e-10}
# What the five common optimizers keep on a plain loop with an MLP.
COMMON = ("sgd", "momentum", "nesterov", "adam", "adamw")
COMMON_LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
# Rows of gradients and passes of whole batches add up the same numbers in another order. In float64 this is a hundredth
# of what the package warns of, in float32 the same.
SPLIT_LIMIT = {torch.float32: 1e-4, torch.float64: 1e-10}
AGREEMENT_LIMIT = 1.0  # a reconstruction that is right to rounding names the same class for every sample
BATCH_SIZE = 32


@dataclass(frozen=True)
class Recipe:
    """How to train: an optimizer over parameters and, if there is one, a schedule for `steps` steps.

    `rule` for optimizers that name theirs, and `closure` for those that ask for loss and gradients within a step.
    """

    optimizer: Callable[..., optim.Optimizer]
    schedule: Callable[[optim.Optimizer, int], optim.lr_scheduler.LRScheduler] | None = None
    note: str = ""
    rule: Callable[[], UpdateRule] | None = None
    closure: bool = False


@dataclass(frozen=True)
class Network:
    """A network for some numbers of inputs and outputs, and the quadratures that suit it."""

    build: Callable[[int, int], nn.Module]
    quadratures: tuple[Quadrature, ...] = (pk.DiscreteGradient(),)


@dataclass(frozen=True)
class Problem:
    """Data (features, targets), the number of outputs, and the loss to train with."""

    load: Callable[[], tuple[np.ndarray, np.ndarray]]
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """How long to train and how much to explain."""

    steps: int
    queries: int


def cosine(optimizer: optim.Optimizer, steps: int) -> optim.lr_scheduler.LRScheduler:
    return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def image_network(norm: nn.Module, outputs: int) -> nn.Module:
    """Two convolutions with a normalisation between them, on 8 × 8 images given as rows of 64.

    No bias before the normalisation, as usual: under BatchNorm its gradient is zero but for rounding, which Adam
    divides by itself and steps along; no sample stands for that.
    """
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        norm,
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(72, outputs),
    )


class Transformer(nn.Module):
    """Two causal layers; the head shares its weights with the embedding."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.position = nn.Parameter(0.1 * torch.randn(length, 16))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(16, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)


OPTIMIZERS = {
    "sgd": Recipe(lambda p: optim.SGD(p, lr=0.1), note="lr 0.1"),
    "momentum": Recipe(
        lambda p: optim.SGD(p, lr=0.03, momentum=0.9, weight_decay=1e-2), note="lr 0.03, μ 0.9, coupled decay 1e-2"
    ),
    "nesterov": Recipe(
        lambda p: optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True), cosine, note="lr 0.03 → 0 by cosine, μ 0.9"
    ),
    "adam": Recipe(lambda p: optim.Adam(p, lr=3e-3, weight_decay=1e-2), note="lr 3e-3, coupled decay 1e-2"),
    "adamw": Recipe(lambda p: optim.AdamW(p, lr=3e-3, weight_decay=1e-2), note="lr 3e-3, decoupled decay 1e-2"),
    "amsgrad": Recipe(lambda p: optim.Adam(p, lr=3e-3, amsgrad=True), note="lr 3e-3"),
    "adamax": Recipe(lambda p: optim.Adamax(p, lr=3e-3, weight_decay=1e-2), note="lr 3e-3, coupled decay 1e-2"),
    "nadam": Recipe(
        lambda p: optim.NAdam(p, lr=3e-3, weight_decay=1e-2, decoupled_weight_decay=True),
        note="lr 3e-3, decoupled decay 1e-2",
    ),
    "radam": Recipe(lambda p: optim.RAdam(p, lr=3e-3, weight_decay=1e-2), note="lr 3e-3, coupled decay 1e-2"),
    "rmsprop": Recipe(
        lambda p: optim.RMSprop(p, lr=5e-4, centered=True, momentum=0.5), note="lr 5e-4, centered, μ 0.5"
    ),
    "adagrad": Recipe(lambda p: optim.Adagrad(p, lr=3e-3, lr_decay=0.01), note="lr 3e-3, lr decay 0.01"),
    "adadelta": Recipe(lambda p: optim.Adadelta(p, lr=1.0), note="lr 1"),
    "asgd": Recipe(lambda p: optim.ASGD(p, lr=0.03), note="lr 0.03"),
    "rprop": Recipe(lambda p: optim.Rprop(p, lr=3e-4), note="lr 3e-4"),
    "adafactor": Recipe(lambda p: optim.Adafactor(p, lr=1e-2), note="lr 1e-2"),
    "muon": Recipe(
        lambda p: optim.Muon([w for w in p if w.dim() == 2], lr=1e-2), note="lr 1e-2; matrices only, the rest stays"
    ),
    "ahead": Recipe(
        lambda p: Momentum(p, lr=0.03, momentum=0.9),
        note="Nesterov's gradient at θ + μv, lr 0.03, μ 0.9",
        rule=Momentum.rule,
        closure=True,
    ),
    "heun": Recipe(lambda p: Heun(p, lr=0.1), note="lr 0.1", rule=Heun.rule, closure=True),
    "rk4": Recipe(lambda p: RungeKutta4(p, lr=0.1), note="lr 0.1", rule=RungeKutta4.rule, closure=True),
    "lion": Recipe(lambda p: Lion(p, lr=1e-3, weight_decay=1e-2), note="lr 1e-3, decoupled decay 1e-2", rule=Lion.rule),
    "sign": Recipe(lambda p: SignDescent(p, lr=1e-3), note="lr 1e-3", rule=SignDescent.rule),
    "normalized": Recipe(lambda p: NormalizedDescent(p, lr=0.05), note="lr 0.05", rule=NormalizedDescent.rule),
    "scalar_rms": Recipe(lambda p: ScalarRMSprop(p, lr=1e-2), note="lr 1e-2", rule=ScalarRMSprop.rule),
    "polyak": Recipe(lambda p: PolyakStep(p, lr=0.05), note="lr 0.05, L* 0", rule=PolyakStep.rule, closure=True),
}

NETWORKS = {
    "mlp_tanh": Network(
        lambda inputs, outputs: nn.Sequential(
            nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, outputs)
        ),
        (pk.GaussLegendre(4), pk.DiscreteGradient()),
    ),
    "mlp_relu": Network(
        lambda inputs, outputs: nn.Sequential(
            nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, outputs)
        ),
        (pk.DiscreteGradient(), pk.Adaptive(1e-12)),
    ),
    "cnn_groupnorm": Network(lambda inputs, outputs: image_network(nn.GroupNorm(2, 4), outputs)),
    "cnn_batchnorm": Network(lambda inputs, outputs: image_network(nn.BatchNorm2d(4), outputs)),
    "mlp_dropout": Network(
        lambda inputs, outputs: nn.Sequential(
            nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, outputs)
        )
    ),
    "transformer": Network(lambda inputs, outputs: Transformer(vocabulary=outputs, length=inputs)),
}


def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X / 16, y


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_breast_cancer(return_X_y=True)
    return (X - X.mean(axis=0)) / X.std(axis=0), y[:, None].astype(float)


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_diabetes(return_X_y=True)
    return (X - X.mean(axis=0)) / X.std(axis=0), ((y - y.mean()) / y.std())[:, None]


def digits_as_vectors() -> tuple[np.ndarray, np.ndarray]:
    X, y = digits()
    return X, np.eye(10)[y]


def arithmetic_sequences() -> tuple[np.ndarray, np.ndarray]:
    """Tokens t, t + d, t + 2d, … modulo 16, and the token that follows each."""
    start, difference = np.divmod(np.arange(16 * 15), 15)
    tokens = (start[:, None] + (difference[:, None] + 1) * np.arange(9)) % 16
    return tokens[:, :-1], tokens[:, 1:]


def sequence_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every next token."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


PROBLEMS = {
    "cross_entropy": Problem(digits, 10, nn.CrossEntropyLoss()),
    "bce": Problem(breast_cancer, 1, nn.BCEWithLogitsLoss()),
    "mse": Problem(diabetes, 1, nn.MSELoss()),
    "huber_images": Problem(digits_as_vectors, 10, nn.HuberLoss()),
    "next_token": Problem(arithmetic_sequences, 16, sequence_loss),
}

IMAGES, ROWS = ("cross_entropy", "huber_images"), ("cross_entropy", "bce", "mse")
SUITS = {
    "mlp_tanh": ROWS,
    "mlp_relu": ROWS,
    "cnn_groupnorm": IMAGES,
    "cnn_batchnorm": IMAGES,
    "mlp_dropout": ROWS,
    "transformer": ("next_token",),
}
"""Which losses make sense on which network."""

DTYPES = (torch.float32, torch.float64)


def size_of(quadrature: Quadrature, network: str, quick: bool) -> Size:
    """Adaptive bisection takes a hundred gradients a step, and coupled samples one sweep each: they get fewer."""
    if isinstance(quadrature, pk.Adaptive):
        return Size(steps=2, queries=4) if quick else Size(steps=4, queries=6)
    if network in ("cnn_batchnorm", "mlp_dropout", "transformer"):
        return Size(steps=4, queries=4) if quick else Size(steps=12, queries=10)
    return Size(steps=6, queries=5) if quick else Size(steps=30, queries=20)


def cases(quick: bool) -> Iterator[tuple[str, str, str]]:
    """(optimizer, network, problem): all of them, or, for the impatient, each optimizer on one network, which has some
    of the optimizers on each of its problems in turn.
    """
    for j, (network, problems) in enumerate(SUITS.items()):
        for k, problem in enumerate(problems):
            for i, optimizer in enumerate(OPTIMIZERS):
                turn, one_of_six = divmod(i + j, len(SUITS))
                if not quick or (one_of_six == 0 and turn % len(problems) == k):
                    yield optimizer, network, problem


Names = TypeVar("Names")


def in_types(names: Iterable[Names], quick: bool) -> Iterator[tuple[Names, torch.dtype]]:
    """Each in both types, or, for the impatient, in one and the other in turn."""
    for i, own in enumerate(names):
        for k, dtype in enumerate(DTYPES):
            if not quick or i % 2 == k:
                yield own, dtype


@dataclass
class Run:
    """A training run under way, as the loops below see it."""

    model: nn.Module
    optimizer: optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    recorder: pk.KernelRecorder
    average: optim.swa_utils.AveragedModel
    closure: bool = False
    step: int = 0

    def backward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """Gradients of one batch, added to what is there, and its loss."""
        value = scale * self.loss(self.model(x), y)
        value.backward()
        return value

    def take_step(self, differentiate: Callable[[], Tensor]) -> None:
        """Clear, differentiate, step, in the form that the optimizer asks for."""

        def cleared() -> Tensor:
            self.optimizer.zero_grad()
            return differentiate()

        if self.closure:
            self.optimizer.step(cleared)
        else:
            cleared()
            self.optimizer.step()


def plain(run: Run, x: Tensor, y: Tensor) -> None:
    run.take_step(lambda: run.backward(x, y))


def averaged(run: Run, x: Tensor, y: Tensor) -> None:
    plain(run, x, y)
    run.average.update_parameters(run.model)


def accumulation(run: Run, x: Tensor, y: Tensor) -> None:
    """Three batches for one step."""
    run.backward(x, y, 1 / 3)
    if run.step % 3 == 2:
        run.optimizer.step()
        run.optimizer.zero_grad()


def clipping_by_norm(run: Run, x: Tensor, y: Tensor) -> None:
    run.optimizer.zero_grad()
    run.backward(x, y)
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.2)
    run.optimizer.step()


def clipping_by_value(run: Run, x: Tensor, y: Tensor) -> None:
    run.optimizer.zero_grad()
    run.backward(x, y)
    nn.utils.clip_grad_value_(run.model.parameters(), 0.01)
    run.optimizer.step()


def scaled_with_skipped_step(run: Run, x: Tensor, y: Tensor) -> None:
    """Mixed precision's loss scaling; the loss of the third step overflows, and the scaler skips it."""
    scaler = run.__dict__.setdefault("scaler", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    run.optimizer.zero_grad()
    loss = run.loss(run.model(x), y)
    scaler.scale(loss * float("inf") if run.step == 2 else loss).backward()
    scaler.step(run.optimizer)
    scaler.update()


def langevin_noise(run: Run, x: Tensor, y: Tensor) -> None:
    """Stochastic gradient Langevin dynamics: noise on the weights after each step."""
    plain(run, x, y)
    with run.recorder.channel("noise"), torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))


def projection(run: Run, x: Tensor, y: Tensor) -> None:
    plain(run, x, y)
    with run.recorder.channel("projection"), torch.no_grad():
        for parameter in run.model.parameters():
            parameter.clamp_(-0.2, 0.2)


def regularizer(run: Run, x: Tensor, y: Tensor) -> None:
    run.optimizer.zero_grad()
    run.backward(x, y)
    (1e-2 * sum(p.abs().sum() for p in run.model.parameters())).backward()
    run.optimizer.step()


def l1(parameters: dict[str, Tensor]) -> Tensor:
    return 1e-2 * sum(p.abs().sum() for p in parameters.values())


class WithLoss(nn.Module):
    """Returns its own loss besides its outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.network(x)
        return {"loss": nn.functional.cross_entropy(logits, y, label_smoothing=0.1), "logits": logits}


def returned_loss(run: Run, xy: tuple[Tensor, Tensor], _: Tensor) -> None:
    def differentiate() -> Tensor:
        value = run.model(*xy)["loss"]
        value.backward()
        return value

    run.take_step(differentiate)


def live_discriminator(run: Run, x: Tensor, y: Tensor) -> None:
    """The network is the generator of a GAN; the discriminator, in train mode with BatchNorm, is trained in between.

    A non-linearity stands before the normalisation: else nothing depends on a shift of all outputs, and the gradient of
    the generator's last bias is zero but for rounding, see `image_network`.
    """
    judged = nn.functional.one_hot(y, 10).to(x.dtype)
    if "discriminator" not in run.__dict__:
        D = nn.Sequential(nn.Linear(10, 16), nn.LeakyReLU(), nn.BatchNorm1d(16), nn.Linear(16, 1)).to(x.dtype)
        run.discriminator, run.its_optimizer = D, optim.Adam(D.parameters(), lr=3e-3)
    D, bce = run.discriminator, nn.functional.binary_cross_entropy_with_logits
    run.its_optimizer.zero_grad()
    with torch.no_grad():
        fake = run.model(x)
    real, false = D(judged), D(fake)
    (bce(real, torch.ones_like(real)) + bce(false, torch.zeros_like(false))).backward()
    run.its_optimizer.step()

    def differentiate() -> Tensor:
        verdict = D(run.model(x))
        value = bce(verdict, torch.ones_like(verdict))
        value.backward()
        return value

    run.take_step(differentiate)


def gradient_penalty(run: Run, x: Tensor, y: Tensor) -> None:
    """As of a WGAN: the norm of the slope of the outputs' sum in the inputs is drawn to 1."""
    shifted = (x + 0.1).requires_grad_(True)

    def differentiate() -> Tensor:
        value = run.backward(x, y)
        with run.recorder.channel("gradient_penalty"):
            (slope,) = torch.autograd.grad(run.model(shifted).sum(), shifted, create_graph=True)
            penalty = 0.1 * (slope.norm(dim=1) - 1).square().mean()
            penalty.backward()
        return value + penalty.detach()

    run.take_step(differentiate)


@dataclass(frozen=True)
class Loop:
    """What happens with a batch, and what the recorder and the machine are told of it."""

    body: Callable[[Run, Tensor, Tensor], None]
    recorder: dict[str, object] = field(default_factory=dict)
    weights: str | None = None
    returns_loss: bool = False


LOOPS = {
    "ema": Loop(averaged, weights="average"),
    "accumulation": Loop(accumulation),
    "clip_norm": Loop(clipping_by_norm),
    "clip_value": Loop(clipping_by_value),
    "amp_skip": Loop(scaled_with_skipped_step),
    "noise": Loop(langevin_noise),
    "projection": Loop(projection),
    "regularizer": Loop(regularizer, {"regularizers": {"l1": l1}}),
}
LOOP_CASES = [("sgd", "mlp_tanh"), ("adamw", "mlp_relu"), ("momentum", "cnn_batchnorm")]
"""The loops are run with these optimizers and networks, on cross-entropy."""

UNKNOWN_LOSS = {"loss": None, "task": "classification"}
SLOPE_LOOPS = {
    "no_loss": Loop(plain, UNKNOWN_LOSS),
    "returned_loss": Loop(returned_loss, {"loss": "returned", "returns": "logits"}, returns_loss=True),
    "live_discriminator": Loop(live_discriminator, UNKNOWN_LOSS),
    "gradient_penalty": Loop(gradient_penalty),
}
"""Loops in which ∂L/∂(outputs) comes from the training pass alone, or a gradient goes round the outputs."""
ALL_LOOPS = {"plain": Loop(plain), **LOOPS, **SLOPE_LOOPS}


def slope_cases() -> Iterator[tuple[str, str, str]]:
    """(optimizer, network, loop) of the last part."""
    several_stages = ("heun", "rk4")
    for loop in SLOPE_LOOPS:
        for optimizer, recipe in OPTIMIZERS.items():
            if recipe.rule is None:
                continue
            if loop == "gradient_penalty" and optimizer in several_stages:
                continue  # refused: gradients under a name are booked for steps that take one gradient
            # Gradients in the gradients of a ReLU vanish, so the smooth network.
            yield optimizer, "mlp_tanh", loop
        for optimizer, network in LOOP_CASES:
            yield optimizer, network, loop


def train(
    recipe: Recipe,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Any, Tensor],
    steps: int,
    seed: int,
    loop: Loop,
    watch: Callable[..., Any] = pk.KernelRecorder,
) -> Run:
    """A training loop on random mini-batches, watched, or, with another `watch`, not."""
    optimizer = recipe.optimizer(list(model.parameters()))
    schedule = recipe.schedule(optimizer, steps) if recipe.schedule is not None else None
    generator = torch.Generator().manual_seed(seed)
    average = optim.swa_utils.AveragedModel(model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.8))
    averages = {} if loop.weights is None else {loop.weights: average}
    told = {"loss": loss, "averages": averages, **loop.recorder}
    if recipe.rule is not None:
        told["rule"] = recipe.rule()
    with watch(model, optimizer, data=data, **told) as recorder:
        run = Run(model, optimizer, loss, recorder, average, recipe.closure)
        for run.step in range(steps):
            x, y = recorder.batch(torch.randperm(len(data[1]), generator=generator)[:BATCH_SIZE])
            loop.body(run, x, y)
            if schedule is not None:
                schedule.step()
    return run


def record(
    recipe: Recipe,
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Any, Tensor],
    steps: int,
    seed: int,
    loop: Loop,
) -> tuple[pk.Trajectory, nn.Module]:
    """A training loop on record; and the network to explain."""
    run = train(recipe, model, loss, data, steps, seed, loop)
    return run.recorder.trajectory, run.model if loop.weights is None else run.average


def network_predictions(model: nn.Module, queries: Any) -> np.ndarray:
    """Classes as the live network gives them."""
    model.eval()
    with torch.no_grad():
        outputs = model(*queries)["logits"] if isinstance(model, WithLoss) else model(queries)
    return (outputs.argmax(dim=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()).numpy()


def measure(
    names: tuple[str, str, str],
    dtype: torch.dtype,
    quadrature: Quadrature,
    size: Size,
    seed: int,
    loop: str = "plain",
) -> dict[str, object]:
    """One row: train, explain, compare."""
    recipe, network, problem = OPTIMIZERS[names[0]], NETWORKS[names[1]], PROBLEMS[names[2]]
    X, y = problem.load()
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=size.queries, random_state=seed)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.tensor(array, dtype=dtype if array.dtype.kind == "f" else torch.int64)

    what, queries, data = ALL_LOOPS[loop], tensor(X_test), (tensor(X_train), tensor(y_train))
    torch.manual_seed(seed)
    model = network.build(X.shape[1], problem.outputs).to(dtype)
    if what.returns_loss:
        model, queries, data = WithLoss(model), (queries, tensor(y_test)), (data, data[1])
    trajectory, explained = record(recipe, model, problem.loss, data, size.steps, seed, what)
    machine = pk.KernelMachine(trajectory, quadrature=quadrature, weights=what.weights)
    # Of a sequence, the logit of token 0 after the last position stands for all.
    outputs = (X.shape[1] - 1) * problem.outputs if names[2] == "next_token" else None
    start = time.perf_counter()
    why = machine.explain(queries, outputs=outputs)
    seconds = time.perf_counter() - start
    agreement = None
    if machine.is_classifier:
        agreement = float((machine.predict(queries) == network_predictions(explained, queries)).mean())
    return {
        "optimizer": names[0],
        "network": names[1],
        "loss": names[2],
        "dtype": str(dtype).removeprefix("torch."),
        "quadrature": repr(quadrature),
        "residual": why.relative_residual,
        "quadrature_error": float(np.median(why.quadrature_error)),
        "split_error": None if np.isnan(why.split_error) else why.split_error,
        "gradients_per_step": why.gradients_per_step,
        "seconds": seconds,
        "agreement": agreement,
        "loop": loop,
        "steps": size.steps,
        "queries": size.queries,
    }


LINE = "{:<10} {:<13} {:<13} {:<18} {:<8} {:<25} {:>5} {:>7} {:>8} {:>10} {:>10} {:>10} {:>9} {:>7}"


def print_header(quick: bool, seed: int) -> None:
    print(f"Exactness of the kernel machine{' (quick)' if quick else ''}, seed {seed}")
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {platform.machine()}, one thread, {time.strftime('%F')}; mini-batches of {BATCH_SIZE}")
    for name, recipe in OPTIMIZERS.items():
        print(f"  {name:<10} {recipe.note}")
    columns = ("optimizer", "network", "loss", "loop", "dtype", "quadrature", "steps", "queries")
    figures = ("residual", "quad.error", "splt.error", "grads/step", "agreement", "seconds")
    print(LINE.format(*columns, *figures), flush=True)


def print_row(row: dict[str, object]) -> None:
    agreement = "–" if row["agreement"] is None else f"{row['agreement']:.3f}"
    split = "–" if row["split_error"] is None else f"{row['split_error']:.1e}"
    numbers = f"{row['residual']:.1e}", f"{row['quadrature_error']:.1e}", split, f"{row['gradients_per_step']:.1f}"
    names = [row[key] for key in ("optimizer", "network", "loss", "loop", "dtype", "quadrature", "steps", "queries")]
    print(LINE.format(*names, *numbers, agreement, f"{row['seconds']:.2f}"), flush=True)


def within_limits(rows: list[dict[str, object]]) -> bool:
    """Print the worst of each against its limit."""
    passed = True
    print()
    common = [row for row in rows if row["optimizer"] in COMMON and row["loop"] == "plain" and "mlp_" in row["network"]]
    common = [row for row in common if row["network"] != "mlp_dropout"]
    checked = [row for row in rows if row["split_error"] is not None]
    for judged, figure, limits, who in (
        (rows, "residual", RESIDUAL_LIMIT, "all rows"),
        (common, "residual", COMMON_LIMIT, "five optimizers, MLPs"),
        (checked, "split_error", SPLIT_LIMIT, f"{len(checked)} of {len(rows)} rows"),
    ):
        for dtype, limit in limits.items():
            own = [row for row in judged if row["dtype"] == str(dtype).removeprefix("torch.")]
            if not own:
                continue
            # `not (≤)` rather than `>`: a figure that is not a number fails too.
            worst = max(own, key=lambda row: np.nan_to_num(row[figure], nan=np.inf))
            good = worst[figure] <= limit
            where = ", ".join(str(worst[key]) for key in ("optimizer", "network", "loss", "loop", "quadrature"))
            verdict = "ok" if good else "EXCEEDED"
            print(
                f"{who}: worst {figure} in {worst['dtype']} {worst[figure]:.1e} ({where}); limit {limit:.0e}: {verdict}"
            )
            passed &= good
    agreements = [row["agreement"] for row in rows if row["agreement"] is not None]
    if agreements:
        good = min(agreements) >= AGREEMENT_LIMIT
        verdict = "ok" if good else "EXCEEDED"
        print(f"worst agreement: {min(agreements):.3f}; limit {AGREEMENT_LIMIT}: {verdict}")
        passed &= good
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each optimizer on one network; each case in one type")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data split, initial network and batches")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # these networks are so small that threads would only wait for each other
    print_header(arguments.quick, arguments.seed)
    rows = []
    for names, dtype in in_types(cases(arguments.quick), arguments.quick):
        for quadrature in NETWORKS[names[1]].quadratures:
            if isinstance(quadrature, pk.Adaptive) and names[0] not in COMMON:
                continue  # bisection sees the path, not the optimizer
            size = size_of(quadrature, names[1], arguments.quick)
            rows.append(measure(names, dtype, quadrature, size, arguments.seed))
            print_row(rows[-1])
    loops = [(loop, *case) for loop, case in itertools.product(LOOPS, LOOP_CASES)]
    for (loop, optimizer, network), dtype in in_types(loops, arguments.quick):
        size = size_of(pk.DiscreteGradient(), network, arguments.quick)
        names = (optimizer, network, "cross_entropy")
        rows.append(measure(names, dtype, pk.DiscreteGradient(), size, arguments.seed, loop))
        print_row(rows[-1])
    for (optimizer, network, loop), dtype in in_types(slope_cases(), arguments.quick):
        size = size_of(pk.DiscreteGradient(), network, arguments.quick)
        names = (optimizer, network, "cross_entropy")
        rows.append(measure(names, dtype, pk.DiscreteGradient(), size, arguments.seed, loop))
        print_row(rows[-1])
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0 if within_limits(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
