"""Training with and without a recorder: the same bits of everything, or a refusal before the first step."""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pathkernel as pk
from pathkernel import errors

CE = nn.CrossEntropyLoss()
Things = dict[str, Any]


# -- what is compared --------------------------------------------------------------------------------------------------


def flattened(value: Any, place: str = "", met: dict[int, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """(place, what lies there) for all that an object holds, attributes of modules, losses and optimizers included."""
    met = {} if met is None else met
    if isinstance(value, (nn.Module, torch.optim.Optimizer, Mapping, list, Tensor)):
        if id(value) in met:
            yield place, f"the same as {met[id(value)][0]}"
            return
        met[id(value)] = place, value  # an identity is only good for as long as its object lives
    if isinstance(value, Tensor):
        yield place, (value.dtype, tuple(value.shape), value.requires_grad, value.detach().numpy().tobytes())
        if value.is_leaf and value.grad is not None:
            yield from flattened(value.grad, f"{place}.grad", met)
    elif isinstance(value, torch.optim.Optimizer):
        yield from flattened(value.state_dict(), place, met)
    elif isinstance(value, torch.Generator):
        yield place, value.get_state().numpy().tobytes()
    elif isinstance(value, random.Random):
        yield place, value.getstate()
    elif isinstance(value, np.random.Generator):
        yield from flattened(value.bit_generator.state, place, met)
    elif isinstance(value, np.random.RandomState):
        yield from flattened(value.get_state(legacy=False), place, met)
    elif isinstance(value, np.ndarray):
        yield place, (value.dtype, value.shape, value.tobytes())
    elif isinstance(value, Mapping):
        # torch numbers hooks through the whole process.
        numbered = place.split("[")[-1].endswith("hooks]")
        yield place, len(value) if numbered else [str(key) for key in value]
        for key, item in enumerate(value.values()) if numbered else value.items():
            yield from flattened(item, f"{place}[{key}]", met)
    elif isinstance(value, (list, tuple)):
        yield place, len(value)
        for k, item in enumerate(value):
            yield from flattened(item, f"{place}[{k}]", met)
    elif isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
        yield place, repr(value)
    elif isinstance(value, (types.FunctionType, types.MethodType, type)):
        yield place, value.__qualname__
    elif hasattr(value, "__dict__"):
        yield place, type(value).__qualname__
        yield from flattened(vars(value), place, met)
    else:
        yield place, type(value).__qualname__


def state_of(things: Things) -> dict[str, Any]:
    """All of it, and the random generators of torch, numpy and Python."""
    generators = {
        "torch": torch.random.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
    }
    return {**dict(flattened(things)), **generators}


# -- with and without --------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The first step is about to be taken."""


class Nobody:
    """Stands where a recorder would, hands out the same batches, and looks at nothing.

    Parameters
    ----------
    stop
        Where to stop: at the first ``"batch"``, before the first ``"step"``, or never.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Any = None,
        *,
        data: Any,
        stop: str = "never",
        **_: Any,
    ) -> None:
        self.data, self.stop = data, stop
        if stop == "step":
            optimizer.register_step_pre_hook(self._stop)

    @staticmethod
    def _stop(*_: Any) -> None:
        raise Stopped

    def __enter__(self) -> Nobody:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batch(self, ids: Any, inputs: Any = None, targets: Any = None) -> tuple[Any, Any]:
        if self.stop == "batch":
            self._stop()
        X, y = self.data
        ids = torch.as_tensor(ids)
        own = tuple(part[ids] for part in X) if isinstance(X, tuple) else X[ids]
        return own if inputs is None else inputs, y[ids] if targets is None else targets

    def batches(self, size: int, shuffle: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.data[1])
        for ids in (torch.randperm(n) if shuffle else torch.arange(n)).split(size):
            yield self.batch(ids)

    def channel(self, name: str) -> nullcontext[None]:
        return nullcontext()


Case = Callable[[Callable[..., Any], Things], None]
"""Trains with the recorder that its first argument makes, and puts all that has a state into the second."""


def trained(case: Case, watch: Callable[..., Any]) -> tuple[dict[str, Any], errors.PathKernelError | Stopped | None]:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    things: Things = {}
    stopped: errors.PathKernelError | Stopped | None = None
    try:
        case(watch, things)
    except (errors.PathKernelError, Stopped) as error:
        stopped = error
    return state_of(things), stopped


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Places where two states differ."""
    return [place for place in {**one, **other} if place not in one or place not in other or one[place] != other[place]]


def levels(folder: Path) -> dict[str, Callable[..., Any]]:
    """Recorders that keep more or less, in memory or on disk."""

    def watching(**options: Any) -> Callable[..., Any]:
        places = iter(range(100))

        def watch(*arguments: Any, **given: Any) -> pk.KernelRecorder:
            # Each recorder of a loop has a store of its own.
            own = {key: value() if callable(value) else value for key, value in options.items()}
            return pk.KernelRecorder(*arguments, **{**given, **own})

        if options.pop("on_disk", False):
            options["store"] = lambda: folder / f"store {next(places)}"
        return watch

    return {
        "in memory": watching(),
        "every step audited": watching(audit_every=1),
        "keyframes": watching(schedule=pk.Schedule(keyframes=8)),
        "thinned": watching(schedule=pk.Schedule(every=3)),
        "on disk": watching(on_disk=True),
        "keyframes on disk": watching(on_disk=True, schedule=pk.Schedule(keyframes=8)),
    }


TWO = ("every step audited", "keyframes on disk")
FEW = [TWO[0], pytest.param(TWO[1], marks=pytest.mark.slow)]
LEVELS = [level if level in TWO else pytest.param(level, marks=pytest.mark.slow) for level in levels(Path())]


def compare(case: Case, level: str, folder: Path, may_be_refused: bool = False) -> None:
    with_it, refused = trained(case, levels(folder)[level])
    if refused is not None:
        assert may_be_refused and isinstance(refused, errors.PathKernelError), refused
        assert refused.found and refused.expected and refused.write
        before = [trained(case, partial(Nobody, stop=stop)) for stop in ("batch", "step")]
        assert all(isinstance(stopped, Stopped) for _, stopped in before)
        found = [differing(with_it, without) for without, _ in before]
        assert [] in found, (refused, found[1])
        return
    without, stopped = trained(case, Nobody)
    assert stopped is None
    assert differing(with_it, without) == []


def test_the_comparison_sees_a_difference_in_every_place() -> None:
    """What a recorder might change is found where it is changed."""

    def case(watch: Any, things: Things) -> None:
        things["network"], things["loss"] = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), CountingLoss()
        things["optimizer"] = torch.optim.Adam(things["network"].parameters())
        things["log"] = [np.zeros(2), torch.Generator()]
        things["network"](torch.ones(2, 2)).square().sum().backward()
        things["optimizer"].step()
        watch(things)

    def moved(tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.add_(1e-6)

    reference = trained(case, lambda things: None)[0]
    assert differing(reference, trained(case, lambda things: None)[0]) == []
    changes: dict[str, Callable[[Things], Any]] = {
        "weight": lambda t: moved(t["network"][0].weight),
        "grad": lambda t: moved(t["network"][0].bias.grad),
        "running_mean": lambda t: moved(t["network"][1].running_mean),
        "training": lambda t: t["network"][1].eval(),
        "exp_avg": lambda t: moved(t["optimizer"].state[t["network"][0].weight]["exp_avg"]),
        "lr": lambda t: t["optimizer"].param_groups[0].update(lr=1.0),
        "calls": lambda t: setattr(t["loss"], "calls", 1),
        "[log][0]": lambda t: t["log"][0].__setitem__(0, 1.0),
        "[log][1]": lambda t: torch.rand(1, generator=t["log"][1]),
        "torch": lambda t: torch.rand(1),
        "numpy": lambda t: np.random.rand(),
        "python": lambda t: random.random(),
        "_forward_hooks": lambda t: t["network"].register_forward_hook(print),
    }
    for place, change in changes.items():
        found = differing(reference, trained(case, change)[0])
        assert found and all(place in name for name in found), (place, found)


# -- losses with a state -----------------------------------------------------------------------------------------------


class CountingLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return CE(z, y) * (1 + 0.1 * self.calls)


class RunningCentre(nn.Module):
    """Centres the outputs by their running mean, as self-distillation does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        value = CE(z - self.centre, y)
        with torch.no_grad():
            self.centre.mul_(0.9).add_(z.mean(0), alpha=0.1)
        return value


class RandomLoss(nn.Module):
    """Draws a weight for each sample, from one of three sources after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.generator = 0, torch.Generator().manual_seed(7)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        drawn = {
            0: lambda: torch.rand(len(z)),
            1: lambda: torch.from_numpy(np.random.rand(len(z))).float(),
            2: lambda: torch.tensor([random.random() for _ in z]),
            3: lambda: torch.rand(len(z), generator=self.generator),
        }[self.calls % 4]()
        return (drawn * F.cross_entropy(z, y, reduction="none")).mean()


class LearnedTemperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return CE(z * self.scale.exp(), y)


class AnnealedLoss:
    """No module; its temperature falls with each call."""

    def __init__(self) -> None:
        self.temperature = 2.0

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        self.temperature *= 0.9
        return CE(z / self.temperature, y)


class QueueLoss(nn.Module):
    """Compares with outputs of batches before, which it keeps in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Tensor] = []

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        value = CE(z, y) + sum((z.mean(0) - old).square().sum() for old in self.queue)
        self.queue = [*self.queue[-2:], z.detach().mean(0)]
        return value


class HardnessByEpoch(nn.Module):
    """Remembers the loss of each sample in a dict, and weighs by it, as curricula do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, float] = {}

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(z, y, reduction="none")
        weights = [1 + self.seen.get(int(target), 0.0) for target in y]
        self.seen.update((int(target), float(value)) for target, value in zip(y, each.detach(), strict=True))
        return (each * torch.tensor(weights)).mean()


LOSSES = {
    cls.__name__: cls
    for cls in (CountingLoss, RunningCentre, RandomLoss, LearnedTemperature, AnnealedLoss, QueueLoss, HardnessByEpoch)
}


def samples(n: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3))


def loop(watch: Callable[..., Any], things: Things, epochs: int = 3) -> None:
    """Twelve steps of AdamW by `batches`, whose order is drawn from torch's generator, with a schedule and clipping."""
    network, loss = things["network"], things["loss"]
    optimizer = things["optimizer"] = torch.optim.AdamW(network.parameters(), lr=1e-2)
    schedule = things["schedule"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    if own:  # of the loss, trained beside
        things["optimizer of the loss"] = torch.optim.SGD(own, lr=0.1)
    things["values"] = values = []
    with watch(network, optimizer, things.get("declared"), data=samples(), task="classification") as recorder:
        for _ in range(epochs):
            for x, y in recorder.batches(8, shuffle=True):
                optimizer.zero_grad()
                value = loss(network(x), y)
                value.backward()
                values.append(value.item())
                nn.utils.clip_grad_norm_(network.parameters(), 0.5)
                optimizer.step()
                if own:
                    things["optimizer of the loss"].step()
                    things["optimizer of the loss"].zero_grad()
            schedule.step()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("declared", [False, True], ids=["without a loss", "with a loss"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_with_a_state(name: str, declared: bool, level: str, tmp_path: Path) -> None:
    def case(watch: Callable[..., Any], things: Things) -> None:
        things["network"], things["loss"] = mlp(), LOSSES[name]()
        things["declared"] = things["loss"] if declared else None
        loop(watch, things)

    compare(case, level, tmp_path)


# -- networks with a state ---------------------------------------------------------------------------------------------


class Passes(nn.Module):
    """Counts its passes and logs to a list, on which its outputs do not depend."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.passes, self.log = mlp(), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        z = self.net(x)
        self.log.append(float(z.detach().abs().mean()))
        return z


class Sampled(nn.Module):
    """Logs one pass out of many, drawn from every generator that there is; its outputs do not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.log, self.generator, self.source = mlp(), [], torch.Generator(), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        if random.random() + np.random.rand() + torch.rand((), generator=self.generator).item() < 1:
            self.log.append(self.source.random() * float(z.detach().abs().mean()))
        return z


class CountedInABuffer(nn.Module):
    """Its temperature follows a counter that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return self.net(x) / (1 + 0.1 * self.passes)


class Annealed(nn.Module):
    """Its temperature follows a counter that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.temperature = mlp(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.temperature *= 0.9
        return self.net(x) / self.temperature


class MovingAverage(nn.Module):
    """Keeps the exponential average of its hidden units inside forward and takes it off."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        if self.training:
            self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return self.leave(h - self.average)


class Cache(nn.Module):
    """Attends to keys and values that it keeps, of this pass alone or of those before as well."""

    def __init__(self, forgets: bool) -> None:
        super().__init__()
        self.qkv, self.leave, self.forgets = nn.Linear(2, 12), nn.Linear(4, 3), forgets
        self.cache: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.forgets:
            self.cache = []
        found = []
        for token in x.unflatten(1, (3, 2)).unbind(1):
            query, key, value = self.qkv(token).chunk(3, dim=1)
            self.cache.append((key, value))
            kept = self.cache if self.forgets else self.cache[-2:]
            weights = torch.stack([(query * k.mean(0 if not self.forgets else 1, True)).sum(1) for k, _ in kept], 1)
            mixed = torch.stack([v if self.forgets else v.mean(0).expand(len(x), -1) for _, v in kept], 1)
            found.append((weights.softmax(1)[:, :, None] * mixed).sum(1) + value)
        if not self.forgets:
            self.cache = [(k.detach(), v.detach()) for k, v in self.cache[-1:]]
        return self.leave(torch.stack(found).mean(0))


class StochasticDepth(nn.Module):
    """Skips a layer now and then, drawn from Python's, numpy's or a generator of its own."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.enter, self.inner, self.leave, self.draw = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), draw
        self.generator = torch.Generator().manual_seed(3) if draw == "own" else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        draw = {
            "python": random.random,
            "numpy": np.random.rand,
            "torch": lambda: torch.rand(()).item(),
            "own": lambda: torch.rand((), generator=self.generator).item(),
        }[self.draw]
        if not self.training or draw() < 0.5:
            h = h + torch.tanh(self.inner(h))
        return self.leave(h)


class Noisy(nn.Module):
    """Noise on its hidden units, from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        return self.leave(h + 0.1 * torch.randn_like(h) if self.training else h)


class Hooked(nn.Module):
    """Hooks of the user before and after it, which count and change what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = mlp(), [0, 0]
        self.register_forward_pre_hook(Hooked.before)
        self.register_forward_hook(Hooked.after)

    def before(self, arguments: tuple[Tensor]) -> tuple[Tensor]:
        self.calls[0] += 1
        return (0.9 * arguments[0],)

    def after(self, arguments: tuple[Tensor], z: Tensor) -> Tensor:
        self.calls[1] += 1
        return 1.1 * z

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "passes": Passes,
    "sampled log": Sampled,
    "counted in a buffer": CountedInABuffer,
    "batch norm": lambda: mlp(nn.BatchNorm1d(8)),
    "cumulative batch norm": lambda: mlp(nn.BatchNorm1d(8, momentum=None)),
    "dropout": lambda: mlp(nn.Dropout(0.3)),
    "alpha dropout": lambda: mlp(nn.AlphaDropout(0.3)),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)
    ),
    "randomized relu": lambda: mlp(nn.RReLU()),
    "moving average": MovingAverage,
    "cache of one pass": lambda: Cache(forgets=True),
    "stochastic depth by torch": lambda: StochasticDepth("torch"),
    "noise": Noisy,
    "hooks of the user": Hooked,
}
REFUSABLE: dict[str, Callable[[], nn.Module]] = {
    "annealed": Annealed,
    "cache of passes before": lambda: Cache(forgets=False),
    "stochastic depth by python": lambda: StochasticDepth("python"),
    "stochastic depth by numpy": lambda: StochasticDepth("numpy"),
    "stochastic depth by a generator of its own": lambda: StochasticDepth("own"),
}
"""Functions of something else than inputs, parameters, buffers and torch's generators."""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", [*NETWORKS, *REFUSABLE])
def test_networks_with_a_state(name: str, level: str, tmp_path: Path) -> None:
    def case(watch: Callable[..., Any], things: Things) -> None:
        things["network"], things["loss"] = {**NETWORKS, **REFUSABLE}[name](), CE
        loop(watch, things)

    compare(case, level, tmp_path, may_be_refused=name in REFUSABLE)


@pytest.mark.parametrize("draw", ["python", "numpy", "own"])
def test_generators_that_no_record_holds_are_named_at_the_first_step(draw: str) -> None:
    """Whether or not the passes of the audit happen to draw what the loop drew."""
    for seed in range(6):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        model = StochasticDepth(draw)
        if model.generator is not None:
            model.generator.manual_seed(seed)
        with pytest.raises(errors.RecordingError) as caught:
            loop(pk.KernelRecorder, {"network": model, "loss": CE})
        named = {"python": "Python's `random`", "numpy": "`numpy.random`", "own": "`generator`"}[draw]
        assert "At step 0" in caught.value.found and f"drew from {named}" in caught.value.found
        assert "not moved" in caught.value.expected


# -- two networks at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("both", [False, True], ids=["the generator", "generator and discriminator"])
def test_a_generator_and_its_discriminator_in_train_mode(both: bool, level: str, tmp_path: Path) -> None:
    def case(watch: Callable[..., Any], things: Things) -> None:
        G = things["G"] = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6))
        D = things["D"] = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)),
            nn.BatchNorm1d(8),
            nn.Dropout(0.2),
            nn.Linear(8, 1),
        )
        opt_g, opt_d = torch.optim.Adam(G.parameters(), lr=1e-2), torch.optim.Adam(D.parameters(), lr=1e-2)
        things["optimizers"] = [opt_g, opt_d]
        bce, real = nn.BCEWithLogitsLoss(), samples()[0]
        of_d = watch if both else Nobody
        with (
            watch(G, opt_g, data=(real, torch.ones(32, 1))) as rec_g,
            of_d(D, opt_d, data=(real, torch.ones(32, 1))) as rec_d,
        ):
            for step in range(10):
                ids = torch.arange(8) + 8 * (step % 4)
                noise = torch.randn(8, 6)
                opt_d.zero_grad()
                rec_g.batch(ids, inputs=noise)
                fake = G(noise)
                rec_d.batch(ids)
                bce(D(real[ids]), torch.ones(8, 1)).backward()
                rec_d.batch(ids, inputs=fake.detach())
                bce(D(fake.detach()), torch.zeros(8, 1)).backward()
                opt_d.step()
                opt_g.zero_grad()
                bce(D(fake), torch.ones(8, 1)).backward()
                opt_g.step()

    compare(case, level, tmp_path)


@pytest.mark.parametrize("level", LEVELS)
def test_a_student_of_an_averaged_teacher(level: str, tmp_path: Path) -> None:
    def case(watch: Callable[..., Any], things: Things) -> None:
        student = things["student"] = mlp(nn.BatchNorm1d(8), nn.Dropout(0.1))
        teacher = things["teacher"] = copy.deepcopy(student)
        optimizer = things["optimizer"] = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        with watch(student, optimizer, data=samples(), task="classification") as recorder:
            for x, _ in recorder.batches(4, shuffle=True):
                optimizer.zero_grad()
                with torch.no_grad():
                    wanted = teacher(x + 0.1 * torch.randn_like(x)).softmax(1)  # in train mode: its buffers move, too
                CE(student(x), wanted).backward()
                optimizer.step()
                with torch.no_grad():
                    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                        slow.lerp_(fast, 0.1)

    compare(case, level, tmp_path)


# -- the loops of benchmarks/exactness.py ------------------------------------------------------------------------------


def benchmark() -> Any:
    place = Path(__file__).parents[2] / "benchmarks" / "exactness.py"
    specification = importlib.util.spec_from_file_location("exactness", place)
    assert specification is not None and specification.loader is not None
    module = sys.modules[specification.name] = importlib.util.module_from_spec(specification)  # dataclasses look there
    specification.loader.exec_module(module)
    return module


exactness = benchmark()


def of_the_benchmark(optimizer: str, network: str, problem: str, name: str, dtype: torch.dtype) -> Case:
    """A training of the benchmark, on its first hundred samples."""
    body, task = exactness.ALL_LOOPS[name], exactness.PROBLEMS[problem]
    X, y = task.load()

    def tensor(array: np.ndarray) -> Tensor:
        return torch.tensor(array[:100], dtype=dtype if array.dtype.kind == "f" else torch.int64)

    def case(watch: Callable[..., Any], things: Things) -> None:
        model, data = exactness.NETWORKS[network].build(X.shape[1], task.outputs).to(dtype), (tensor(X), tensor(y))
        if body.returns_loss:
            model, data = exactness.WithLoss(model), (data, data[1])
        things["model"] = model
        run = exactness.train(exactness.OPTIMIZERS[optimizer], model, task.loss, data, 9, 0, body, watch)
        things["run"] = {key: value for key, value in vars(run).items() if key != "recorder"}

    return case


@pytest.mark.parametrize("optimizer", exactness.OPTIMIZERS)
@pytest.mark.parametrize("level", TWO)
def test_optimizers_of_the_benchmark(optimizer: str, level: str, tmp_path: Path) -> None:
    compare(of_the_benchmark(optimizer, "mlp_tanh", "cross_entropy", "plain", torch.float32), level, tmp_path)


@pytest.mark.parametrize("name", exactness.LOOPS)
@pytest.mark.parametrize(("optimizer", "network"), exactness.LOOP_CASES)
@pytest.mark.parametrize("level", FEW)
def test_loops_of_the_benchmark(optimizer: str, network: str, name: str, level: str, tmp_path: Path) -> None:
    compare(of_the_benchmark(optimizer, network, "cross_entropy", name, torch.float32), level, tmp_path)


@pytest.mark.parametrize(("optimizer", "network", "name"), list(exactness.slope_cases()))
@pytest.mark.parametrize("level", FEW)
def test_loops_of_the_benchmark_by_slopes(optimizer: str, network: str, name: str, level: str, tmp_path: Path) -> None:
    compare(of_the_benchmark(optimizer, network, "cross_entropy", name, torch.float32), level, tmp_path)


ALWAYS = ("cnn_batchnorm", "mlp_dropout")


@pytest.mark.slow
@pytest.mark.parametrize("every_loss", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("level", TWO)
@pytest.mark.parametrize(
    "network",
    [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.exhaustive) for name in exactness.NETWORKS],
)
def test_every_optimizer_on_every_network_and_loss(network: str, level: str, every_loss: bool, tmp_path: Path) -> None:
    problems = exactness.SUITS[network]
    for number, problem in enumerate(problems):
        for k, optimizer in enumerate(exactness.OPTIMIZERS):
            if not every_loss and k // 2 % len(problems) != number:
                continue
            dtype = exactness.DTYPES[k % 2]
            folder = tmp_path / f"{problem} {optimizer}"
            compare(of_the_benchmark(optimizer, network, problem, "plain", dtype), level, folder)
