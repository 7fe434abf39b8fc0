"""What goes wrong in a training loop, and with the objects that a record belongs to."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _faults_table import FAILED, LOST, SURVIVED, WRONG, Bench, Fault, Outcome, first_sentence
from _faults_training import Training, bits, reference
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import (
    InputError,
    ModelMismatchError,
    NonFiniteStepError,
    PathKernelError,
    RecordingError,
    TrajectoryError,
    UnsupportedOptimizerError,
)
from pathkernel.trajectory.schedule import Schedule
from pathkernel.trajectory.step import Step

STEPS = 24


def refused(attempt: Callable[[], Any], kind: type[PathKernelError], *words: str) -> Outcome:
    """Whether something is refused in words that name what is wrong."""
    try:
        attempt()
    except kind as error:
        named = all(word in str(error) for word in words)
        return Outcome(SURVIVED if named else FAILED, first_sentence(error, 60) if not named else kind.__name__)
    except Exception as error:
        return Outcome(FAILED, first_sentence(error))
    return Outcome(WRONG, "accepted")


def flip(tensor: Tensor, bench: Bench) -> None:
    """Turn one bit of one number."""
    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    raw[bench.random.randrange(len(raw))] ^= 1 << bench.random.randrange(8)


# -- in the loop ------------------------------------------------------------------------------------------------------


def not_a_number(bench: Bench) -> Iterator[Outcome]:
    """A gradient that is not finite, at a random step in a random place."""
    whole = reference("momentum", STEPS)
    for _ in range(bench.count(3, 30)):
        path, training, at = bench.place(), Training("momentum"), bench.random.randrange(STEPS)
        value = bench.random.choice([math.nan, math.inf, -math.inf])

        def train(training: Training = training, at: int = at, value: float = value, path: Any = path) -> None:
            with training.recorder(path) as recorder:
                for _ in training.train(recorder, at):
                    pass
                x, y = recorder.batch(training.ids())
                training.optimizer.zero_grad()
                training.loss(training.model(x), y).backward()
                gradient = bench.random.choice(list(training.model.parameters())).grad
                gradient.view(-1)[bench.random.randrange(gradient.numel())] = value
                training.optimizer.step()

        training.step = at
        ids, training.step = training.ids().tolist(), 0
        outcome = refused(train, NonFiniteStepError, f"At step {at} ", f"its samples are {ids}")
        trajectory = training.opened(path)
        if len(trajectory) != at or [bits(step) for step in trajectory.steps()] != whole.steps[:at]:
            outcome = Outcome(LOST, f"{len(trajectory)} of {at} steps")
        yield outcome


def skipped_by_amp(bench: Bench) -> Iterator[Outcome]:
    """Loss scaling that overflows, with optimizers that are fused and that are not."""
    for fused in [False, True] * bench.count(1, 10):
        torch.manual_seed(0)
        training = Training("adamw")
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        overflow = set(bench.random.sample(range(STEPS), 5))
        with pk.KernelRecorder(
            model, optimizer, training.loss, data=(training.X, training.y), audit_every=0
        ) as recorder:
            for training.step in range(STEPS):
                x, y = recorder.batch(training.ids())
                optimizer.zero_grad()
                loss = training.loss(model(x), y) * (math.inf if training.step in overflow else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        trajectory, taken = recorder.trajectory, [s for s in range(STEPS) if s not in overflow]
        ids = [step.batches[0].ids.tolist() for step in trajectory.steps()]
        expected = []
        for training.step in taken:
            expected.append(training.ids().tolist())
        why = pk.KernelMachine(trajectory).explain(training.X[:2])
        good = ids == expected and why.relative_residual < 1e-4
        yield Outcome(SURVIVED if good else WRONG, "skipped steps are not on record, their samples not blamed")


def wrong_ids(bench: Bench) -> Iterator[Outcome]:
    """Sample ids, or inputs, that are not those of the batch."""
    kinds = {
        "shifted": lambda ids: (ids + 1) % 64,
        "of another batch": lambda ids: torch.randint(64, ids.shape),
        "repeated": lambda ids: ids[[0, 0, *range(2, len(ids))]] if ids[0] != ids[1] else (ids + 1) % 64,
        "one of them": lambda ids: torch.cat([ids[:-1], (ids[-1:] + 7) % 64]),
    }
    for name in list(kinds) * bench.count(1, 10):
        training, at = Training("momentum"), bench.random.randrange(STEPS)

        def train(training: Training = training, at: int = at, name: str = name) -> None:
            with training.recorder(audit_every=1) as recorder:
                for _ in training.train(recorder, at):
                    pass
                recorder.batch(kinds[name](training.ids()))
                training.take(training.X[training.ids()], training.y[training.ids()])

        yield refused(train, RecordingError, f"step {at}")


def outside_changes(bench: Bench) -> Iterator[Outcome]:
    """Weights that are moved without the optimizer, or with one that the recorder was not given."""

    def noise(training: Training) -> None:
        with torch.no_grad():
            for p in training.model.parameters():
                p.add_(0.1 * torch.randn_like(p))

    def rewound(training: Training) -> None:
        training.model.load_state_dict(Training("adamw").model.state_dict())

    def hookless(training: Training) -> None:
        p = next(training.model.parameters())
        other = torch.optim.SGD([p], lr=0.1)
        p.grad = torch.ones_like(p)
        other.step()

    for _ in range(bench.count(1, 10)):

        def stranger() -> None:
            training = Training("adamw")
            with training.recorder() as recorder:
                for _ in training.train(recorder, bench.random.randrange(1, STEPS)):
                    pass
                hookless(training)

        yield refused(stranger, RecordingError, "of the class SGD, is about to move")
    for change, channel in [(noise, "unexplained"), (rewound, "loaded")] * bench.count(1, 10):
        training, at = Training("adamw"), bench.random.randrange(1, STEPS)
        with training.recorder() as recorder:
            for _ in training.train(recorder, at):
                pass
            change(training)
            for _ in training.train(recorder, STEPS):
                pass
        trajectory = recorder.trajectory
        pieces = [segment.channel for segment in trajectory.segments() if segment.step is None]
        arrives = torch.equal(trajectory.final, trajectory.layout.flatten(dict(training.model.named_parameters())))
        try:
            why = pk.KernelMachine(trajectory).explain(training.X[:2])
            booked = why.relative_residual < 1e-4 and channel in why.channels
        except TrajectoryError as error:
            booked = channel == "unexplained" and channel in str(error)
        good = arrives and channel in pieces and booked
        yield Outcome(SURVIVED if good else WRONG, f"booked as {channel}; much that is unexplained is not explained")


def other_optimizers(bench: Bench) -> Iterator[Outcome]:
    """Optimizers whose steps are not what an update rule says."""

    class Own(torch.optim.SGD):
        pass

    model = nn.Linear(3, 2)
    data = (torch.randn(4, 3), torch.randn(4, 2))
    optimizers: list[Callable[[], torch.optim.Optimizer]] = [
        lambda: torch.optim.LBFGS(model.parameters()),
        lambda: torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"),
        lambda: torch.optim.SparseAdam(list(model.parameters())),
        lambda: Own(model.parameters(), lr=0.1),
    ]
    for make in optimizers:
        yield refused(
            lambda make=make: pk.KernelRecorder(model, make(), nn.MSELoss(), data=data), UnsupportedOptimizerError
        )


# -- the objects of a record ------------------------------------------------------------------------------------------


def other_models(bench: Bench) -> Iterator[Outcome]:
    """One bit of a weight or buffer, or another architecture, with a record in memory and from disk."""
    path, training = bench.place(), Training("momentum")
    trajectory = training.recorded(path, STEPS)
    good = copy.deepcopy(training.model.state_dict())
    attempts = [lambda: training.opened(path), lambda: pk.KernelMachine(trajectory), lambda: pk.PathKernel(trajectory)]
    for _ in range(bench.count(5, 40)):
        state = copy.deepcopy(good)
        flip(bench.random.choice([t for t in state.values() if t.dim()]), bench)
        training.model.load_state_dict(state)
        if all(torch.equal(state[name], good[name]) for name in good):
            continue  # a zero whose sign has turned
        yield refused(bench.random.choice(attempts), ModelMismatchError)
    training.model.load_state_dict(good)
    for layer in (nn.Linear(16, 5), nn.Linear(16, 4, bias=False), nn.Sequential(nn.Linear(16, 4)), nn.Identity()):
        kept, training.model[4] = training.model[4], layer
        yield refused(attempts[0], ModelMismatchError, "model")
        yield refused(attempts[1], ModelMismatchError)
        training.model[4] = kept
    training.model.double()
    yield refused(attempts[0], ModelMismatchError, "float64")


def other_data(bench: Bench) -> Iterator[Outcome]:
    """One bit of a sample, a label, an order, a row less, another loss."""
    path, training = bench.place(), Training("momentum")
    training.recorded(path, STEPS)
    X, y = training.X, training.y
    for kind in ["bit", "label", "order", "fewer", "more", "type", "loss"] * bench.count(1, 6):
        training.X, training.y, training.loss = X.clone(), y.clone(), nn.CrossEntropyLoss()
        row = bench.random.randrange(len(X))
        if kind == "bit":
            flip(training.X[row], bench)
        elif kind == "label":
            training.y[row] = (y[row] + 1) % 4
        elif kind == "order":
            training.X, training.y = X.roll(1, 0), y.roll(1, 0)
        elif kind == "fewer":
            training.X, training.y = X[:-1], y[:-1]
        elif kind == "more":
            training.X, training.y = torch.cat([X, X[:1]]), torch.cat([y, y[:1]])
        elif kind == "type":
            training.y = y.int()
        else:
            training.loss = nn.CrossEntropyLoss(label_smoothing=bench.random.uniform(0.01, 0.5))
        yield refused(lambda: training.opened(path), ModelMismatchError, "loss" if kind == "loss" else "data")


def other_replay(bench: Bench) -> Iterator[Outcome]:
    """A replay that is not the run: one bit of a sample, of a keyframe's θ or optimizer state, or of a generator."""
    whole = [moved(step) for step in Training("adamw").recorded(None, STEPS).steps()]
    for kind in ["nothing", "sample", "last bit", "θ", "state", "generator"] * bench.count(1, 12):
        training = Training("adamw")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trajectory = training.recorded(None, STEPS, schedule=Schedule(keyframes=6))
        steps = trajectory.store.inner._steps
        keyframes = [step for step in steps if step.replay and step.before.numel()]
        # Before the very first step the optimizer has no state that could be damaged.
        first = bench.random.choice(keyframes[1:] if kind == "state" else keyframes)
        if kind == "sample":
            flip(trajectory.data._inputs, bench)
        elif kind == "last bit":  # of a sample: gradients change by a rounding, and θ often not at all
            inputs = trajectory.data._inputs.view(-1)
            inputs.view(torch.int32)[bench.random.randrange(len(inputs))] ^= 1
        elif kind == "θ":
            flip(first.before, bench)
        elif kind == "state":
            flip(first.frozen[bench.random.choice(list(first.frozen))]["exp_avg"], bench)
        elif kind == "generator":
            state = bench.random.choice(steps).batches[0].state.generators
            flip(next(iter(state.values())), bench)
        yield judged_replay(trajectory, whole, kind)


def moved(step: Step) -> str:
    """Digest of what a replay gives back."""
    return bits(step.before, step.after, step.gradient, step.buffers, step.changes, step.batches[0].ids)


def judged_replay(trajectory: pk.Trajectory, expected: list[str], kind: str) -> Outcome:
    """Every step that comes out is right, up to the first that is refused by its number."""
    for index in range(len(trajectory)):
        try:
            step = trajectory.store.read(index)
        except TrajectoryError as error:
            named = "came out differently" in str(error) and str(error).startswith("Step ")
            return Outcome(SURVIVED if named and kind != "nothing" else FAILED, "TrajectoryError with the first step")
        except Exception as error:
            return Outcome(FAILED, first_sentence(error))
        if moved(step) != expected[index]:
            return Outcome(WRONG, f"step {index} is another one ({kind})")
    return Outcome(SURVIVED, "every value right")


def no_room(bench: Bench) -> Iterator[Outcome]:
    """A memory budget that is smaller than what one sample needs is refused before anything is computed."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 16))
    X = torch.randn(4, 64)
    # Inputs, activations and outputs of one sample alone are 2.4 kB.
    for memory in (1, 1000, "1kB", "2kB", 2300) if not bench.quick else (1000, "2kB"):
        for outputs in ("trace", "full", 0):
            outcome = refused(
                lambda memory=memory, outputs=outputs: pk.TangentKernel(model, memory=memory, outputs=outputs)(X),
                InputError,
            )
            told = outcome.verdict != WRONG
            yield outcome if told else Outcome(FAILED, "the right numbers, but beyond the budget without a word")
    assert np.isfinite(pk.TangentKernel(model)(X)).all()


FAULTS = [
    Fault("NaN or infinity in a gradient", "none", not_a_number),
    Fault("steps skipped by loss scaling", "none", skipped_by_amp),
    Fault("wrong sample ids", "none", wrong_ids),
    Fault("weights changed outside the optimizer", "none", outside_changes),
    Fault("optimizers without an update rule", "none", other_optimizers),
    Fault("another model, or one that was changed", "none", other_models),
    Fault("other data, or another loss", "none", other_data),
    Fault("a replay that is not the run", "none", other_replay),
    Fault("a memory budget that is too small", "none", no_room),
]
