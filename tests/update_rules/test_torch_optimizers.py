"""Every optimizer of `torch.optim`, with every option and implementation: nothing is left over."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES, SAMPLES, generator, make_inputs, make_model
from torch import Tensor, nn, optim
from torch.optim import Optimizer

import pathkernel as pk
from pathkernel import reference
from pathkernel.errors import TrajectoryError, UnsupportedOptimizerError
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.update_rules.elementwise import Elementwise
from pathkernel.update_rules.rule import Observation
from pathkernel.update_rules.table import RULES, rule_of

LIMITS = {torch.float64: 1e-11, torch.float32: 5e-6}
DOUBLE_LR = torch.tensor(0.01, dtype=torch.float64)
CAPTURABLE = ("adam", "adamax", "nadam", "radam", "adadelta", "rmsprop", "asgd", "rprop")


@dataclass(frozen=True)
class Row:
    """An optimizer with its settings, the implementations it has on a CPU, and the channels of its sources."""

    make: Callable[..., Optimizer]
    settings: dict[str, Any]
    implementations: Sequence[str] = ("loop", "foreach")
    channels: frozenset[str] = field(default=frozenset())

    def __call__(self, parameters: Any, implementation: str = "loop") -> Optimizer:
        chosen = {"loop": {}, "capturable_foreach": {"capturable": True, "foreach": True}}
        return self.make(parameters, **self.settings, **chosen.get(implementation, {implementation: True}))


def matrices_only(parameters: Any, **settings: Any) -> Optimizer:
    return optim.Muon([p for p in parameters if p.ndim == 2], **settings)


DECAY = frozenset({"weight_decay"})
LOOP, LOOP_FUSED = ("loop",), ("loop", "foreach", "fused")
MOST, ALL = ("loop", "foreach"), ("loop", "foreach", "capturable", "capturable_foreach")
ROWS = {
    "sgd": Row(optim.SGD, {"lr": 0.1, "weight_decay": 0.05}, LOOP, DECAY),
    "sgd_nesterov": Row(optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}, LOOP_FUSED),
    "sgd_maximize": Row(
        optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "maximize": True, "weight_decay": 0.1},
        LOOP_FUSED,
        DECAY,
    ),
    "adam": Row(optim.Adam, {"lr": 0.01, "weight_decay": 0.05}, (*ALL, "fused"), DECAY),
    "adam_amsgrad_maximize": Row(
        optim.Adam, {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.5), "maximize": True}, LOOP_FUSED
    ),
    "adam_tensor_lr": Row(optim.Adam, {"lr": DOUBLE_LR, "weight_decay": 0.05}, LOOP, DECAY),
    "adam_tensor_lr_fused": Row(optim.Adam, {"lr": DOUBLE_LR, "weight_decay": 0.05, "fused": True}, LOOP, DECAY),
    "adamw": Row(optim.AdamW, {"lr": 0.003, "weight_decay": 0.01}, (*ALL, "fused"), DECAY),
    "adamw_amsgrad": Row(
        optim.AdamW, {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True, "betas": (0.9, 0.5)}, LOOP_FUSED, DECAY
    ),
    "adamw_tensor_lr": Row(optim.AdamW, {"lr": DOUBLE_LR, "weight_decay": 0.3}, LOOP, DECAY),
    "adamax": Row(optim.Adamax, {"lr": 0.01}, LOOP),
    "adamax_decay": Row(optim.Adamax, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}, ALL, DECAY),
    "adamax_maximize": Row(optim.Adamax, {"lr": 0.01, "weight_decay": 0.1, "eps": 0.01, "maximize": True}, MOST, DECAY),
    "nadam": Row(optim.NAdam, {"lr": 0.01}, LOOP),
    "nadam_decay": Row(optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.1}, ALL, DECAY),
    "nadam_decoupled": Row(
        optim.NAdam,
        {"lr": 0.003, "weight_decay": 0.01, "decoupled_weight_decay": True, "betas": (0.8, 0.9)},
        ALL,
        DECAY,
    ),
    "nadam_maximize": Row(
        optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "decoupled_weight_decay": True}, MOST, DECAY
    ),
    # With β₂ = 0.999 the sixth step is the first one to be rectified; with 0.5 none is.
    "radam": Row(optim.RAdam, {"lr": 0.01}, LOOP),
    "radam_never_rectified": Row(optim.RAdam, {"lr": 0.01, "betas": (0.9, 0.5)}, LOOP),
    "radam_decay": Row(optim.RAdam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}, ALL, DECAY),
    "radam_decoupled": Row(optim.RAdam, {"lr": 0.02, "weight_decay": 0.01, "decoupled_weight_decay": True}, ALL, DECAY),
    "radam_maximize": Row(optim.RAdam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "eps": 0.01}, MOST, DECAY),
    "adagrad": Row(optim.Adagrad, {"lr": 0.03}, LOOP),
    "adagrad_options": Row(
        optim.Adagrad,
        {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 0.01, "weight_decay": 0.1},
        LOOP_FUSED,
        DECAY,
    ),
    "adagrad_maximize": Row(optim.Adagrad, {"lr": 0.02, "maximize": True, "weight_decay": 0.1}, LOOP_FUSED, DECAY),
    "adadelta": Row(optim.Adadelta, {}, LOOP),
    "adadelta_options": Row(optim.Adadelta, {"lr": 1.5, "rho": 0.7, "eps": 1e-4, "weight_decay": 0.1}, ALL, DECAY),
    "adadelta_maximize": Row(optim.Adadelta, {"eps": 1e-5, "weight_decay": 0.1, "maximize": True}, MOST, DECAY),
    "rmsprop": Row(optim.RMSprop, {"lr": 0.003}, LOOP),
    "rmsprop_centered": Row(
        optim.RMSprop, {"lr": 0.003, "centered": True, "weight_decay": 0.1, "alpha": 0.8}, LOOP, DECAY
    ),
    "rmsprop_momentum": Row(
        optim.RMSprop, {"lr": 0.003, "momentum": 0.9, "weight_decay": 0.1, "eps": 0.01}, LOOP, DECAY
    ),
    "rmsprop_all": Row(
        optim.RMSprop,
        {"lr": 0.003, "momentum": 0.9, "weight_decay": 0.1, "centered": True, "maximize": True, "alpha": 0.9},
        ALL,
        DECAY,
    ),
    "asgd": Row(optim.ASGD, {"lr": 0.1}, LOOP, frozenset({"lambd"})),
    "asgd_options": Row(
        optim.ASGD,
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.9, "t0": 2.0, "weight_decay": 0.1},
        ALL,
        frozenset({"lambd", "weight_decay"}),
    ),
    "asgd_maximize": Row(optim.ASGD, {"lr": 0.05, "lambd": 0.01, "maximize": True}, MOST, frozenset({"lambd"})),
    "rprop": Row(optim.Rprop, {"lr": 0.003}, LOOP),
    "rprop_options": Row(optim.Rprop, {"lr": 0.01, "etas": (0.3, 1.5), "step_sizes": (1e-3, 0.02)}, ALL),
    "rprop_maximize": Row(optim.Rprop, {"lr": 0.003, "maximize": True}, MOST),
    "adafactor": Row(optim.Adafactor, {"lr": 0.02}, LOOP),
    "adafactor_options": Row(
        optim.Adafactor,
        {"lr": 0.5, "beta2_decay": -0.5, "eps": (0.5, 0.1), "d": 1.5, "weight_decay": 0.02},
        channels=DECAY,
    ),
    "adafactor_maximize": Row(optim.Adafactor, {"lr": 0.02, "maximize": True, "weight_decay": 0.1}, channels=DECAY),
    "adafactor_tensor_lr": Row(optim.Adafactor, {"lr": 2 * DOUBLE_LR, "weight_decay": 0.1}, LOOP, DECAY),
    "muon": Row(matrices_only, {"lr": 0.01}, LOOP, DECAY),
    "muon_plain_momentum": Row(
        matrices_only, {"lr": 0.01, "nesterov": False, "momentum": 0.8, "weight_decay": 0.0, "ns_steps": 3}, LOOP
    ),
    "muon_match_rms": Row(
        matrices_only,
        {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw", "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
        LOOP,
        DECAY,
    ),
}
# Everything in float64; in float32 every row, and those implementations that round in another way.
VARIANTS = [
    pytest.param(
        name,
        implementation,
        dtype,
        id=f"{name}-{implementation}-{str(dtype).removeprefix('torch.')}",
    )
    for dtype in LIMITS
    for name, row in ROWS.items()
    for implementation in row.implementations
    if dtype == torch.float64 or implementation in ("loop", "fused", "capturable") or row.make is optim.ASGD
]
# One row of each optimizer, with as many of its options as it has: for what need not be tried in every combination.
FULLEST = (
    "sgd_maximize",
    "adam",
    "adamw_amsgrad",
    "adamax_decay",
    "nadam_decay",
    "nadam_decoupled",
    "radam_decay",
    "adagrad_options",
    "adadelta_options",
    "rmsprop_all",
    "asgd_options",
    "rprop_options",
    "adafactor_options",
    "muon",
)


@pytest.fixture
def capturable_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let capturable steps run: torch allows them on accelerators only, but their arithmetic is the same here."""
    for name in CAPTURABLE:
        module = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"])


@dataclass
class Run:
    start: nn.Module
    X: Tensor
    y: Tensor
    queries: Tensor
    model: nn.Module
    trajectory: pk.Trajectory

    def explain(self) -> Attributions:
        return pk.KernelMachine(self.trajectory, quadrature=pk.GaussLegendre(4)).explain(self.queries, outputs=1)


LOSS = nn.CrossEntropyLoss()


def train(
    make: Callable[[Any], Optimizer],
    dtype: torch.dtype = torch.float64,
    rule: pk.UpdateRule | None = None,
    schedule: Callable[[Optimizer], Any] | None = None,
    model: nn.Module | None = None,
    by_closure: bool = False,
) -> Run:
    model = make_model("tanh", 3, dtype) if model is None else model
    start = copy.deepcopy(model)
    X, y = make_inputs(SAMPLES, dtype=dtype), torch.randint(3, (SAMPLES,), generator=generator(2))
    optimizer = make(model.parameters())
    scheduler = schedule(optimizer) if schedule else None
    with pk.KernelRecorder(model, optimizer, LOSS, data=(X, y), rule=rule, audit_every=0) as recorder:
        for ids in BATCHES:
            x, target = recorder.batch(list(ids))

            def closure(x: Tensor = x, target: Tensor = target) -> Tensor:
                optimizer.zero_grad()
                loss = LOSS(model(x), target)
                loss.backward()
                return loss

            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return Run(start, X, y, make_inputs(4, dtype=dtype, seed=3), model, recorder.trajectory)


# -- completeness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "implementation", "dtype"), VARIANTS)
def test_nothing_is_left_over(name: str, implementation: str, dtype: torch.dtype, capturable_on_cpus: None) -> None:
    row, default = ROWS[name], torch.get_default_dtype()
    # Step counts have the default type, and capturable steps compute with them.
    torch.set_default_dtype(dtype if "capturable" in implementation else default)
    try:
        why = train(lambda parameters: row(parameters, implementation), dtype).explain()
    finally:
        torch.set_default_dtype(default)
    assert why.relative_residual < LIMITS[dtype]
    assert set(why.channels) == {"initial", "rounding"} | row.channels
    assert np.abs(why.channels["rounding"]).max() < LIMITS[dtype]


@pytest.mark.parametrize("name", FULLEST)
def test_schedules_in_both_sweeps(name: str) -> None:
    # The learning rate passes through 0, as a warm-up does, and jumps.
    factors = (0.0, 1.0, 0.5, 1.3, 0.0, 0.7, 0.0)
    run = train(ROWS[name], schedule=lambda optimizer: optim.lr_scheduler.LambdaLR(optimizer, lambda s: factors[s]))
    why = run.explain()
    assert why.relative_residual < LIMITS[torch.float64]
    assert set(why.channels) == {"initial", "rounding"} | ROWS[name].channels
    found = pk.KernelMachine(run.trajectory, quadrature=pk.GaussLegendre(4)).decision_function(run.queries)
    expected = run.trajectory.function().outputs(run.trajectory.final, run.queries)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-11)


@pytest.mark.parametrize("name", FULLEST)
def test_two_groups_of_parameters(name: str) -> None:
    row = ROWS[name]

    def make(parameters: Any) -> Optimizer:
        first, *others = (p for p in parameters if p.ndim == 2 or row.make is not matrices_only)
        slower = {key: 0.3 * row.settings[key] for key in ("lr", "weight_decay") if key in row.settings}
        groups = [{"params": [first], **slower}, {"params": others}]
        return (optim.Muon if row.make is matrices_only else row.make)(groups, **row.settings)

    assert train(make).explain().relative_residual < LIMITS[torch.float64]


@pytest.mark.parametrize("name", FULLEST)
def test_a_recording_that_begins_in_the_middle(name: str) -> None:
    row, model = ROWS[name], make_model("tanh", 3)
    optimizer = row(model.parameters())
    for _ in range(4):
        model.zero_grad()
        LOSS(model(make_inputs(5, seed=7)), torch.tensor([0, 1, 2, 0, 1])).backward()
        optimizer.step()
    run = train(lambda _: optimizer, model=model)
    why = run.explain()
    assert why.relative_residual < LIMITS[torch.float64]
    memory = {"memory"} if run.trajectory.rule.memory else set()
    assert set(why.channels) == {"initial", "rounding"} | row.channels | memory


@pytest.mark.parametrize("name", FULLEST)
def test_the_scaling_of_the_gradient_by_learning_rate(name: str) -> None:
    trajectory = train(ROWS[name]).trajectory
    rule, step = trajectory.rule, trajectory.store.read(4)
    for parameter, shape in zip(trajectory.layout.names, trajectory.layout.shapes, strict=True):
        if not rule.elementwise or parameter not in step.active:
            continue
        frozen, settings = step.frozen[parameter], step.hyperparameters_of(parameter)
        gradient = torch.randn(shape, dtype=torch.float64, generator=generator(5))
        zeros = tuple(torch.zeros(shape, dtype=torch.float64) for _ in rule.memory)
        D = rule.preconditioner(shape, frozen, settings, torch.zeros((), dtype=torch.float64))
        delta, _ = rule.step(gradient, zeros, frozen, settings)
        torch.testing.assert_close(-settings["lr"] * D * gradient, delta, rtol=1e-12, atol=0)
        still = rule.preconditioner(shape, frozen, {**settings, "lr": 0.0}, torch.zeros((), dtype=torch.float64))
        assert still.isfinite().all()


# -- against the oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "rmsprop",
        "rmsprop_centered",
        "rmsprop_momentum",
        "rmsprop_all",
        "adagrad",
        "adagrad_options",
        "adagrad_maximize",
    ],
)
def test_shares_are_those_of_the_oracle(name: str) -> None:
    run, row = train(ROWS[name]), ROWS[name]
    why = run.explain()
    oracle = reference.decompose(
        run.start,
        LOSS,
        run.X,
        run.y,
        BATCHES,
        name.split("_")[0],
        run.queries,
        1,
        reference.gauss_legendre(4),
        **row.settings,
    )
    for found, expected in (
        (why.shares, oracle.shares),
        (why.channels.get("weight_decay", np.zeros(4)), oracle.weight_decay),
        (why.output, oracle.final),
    ):
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-10 * expected.abs().max().item())


# -- decay in float32 --------------------------------------------------------------------------------------------------

DECAYING = {
    "adamw": (optim.AdamW, {"weight_decay": 0.01}, ("loop", "foreach", "fused")),
    "nadam": (optim.NAdam, {"weight_decay": 0.01, "decoupled_weight_decay": True}, MOST),
    "radam": (optim.RAdam, {"weight_decay": 0.01, "decoupled_weight_decay": True}, MOST),
    "adafactor": (optim.Adafactor, {"weight_decay": 0.01}, MOST),
    "muon": (optim.Muon, {"weight_decay": 0.01}, LOOP),
    "asgd": (optim.ASGD, {"lambd": 0.01}, MOST),
}


@pytest.mark.parametrize(
    ("name", "implementation"), [(name, way) for name, (_, _, ways) in DECAYING.items() for way in ways]
)
def test_decay_is_rounded_as_torch_rounds_it(name: str, implementation: str) -> None:
    # 1 − 3e-5 is off by 1e-8 in float32, always to the same side. The rounding of θ averages out over many entries.
    make, settings, _ = DECAYING[name]
    weight = nn.Parameter(torch.randn(300, 300, generator=generator(0)))
    weight.grad = torch.zeros(300, 300)
    chosen = {} if implementation == "loop" else {implementation: True}
    optimizer = make([weight], lr=0.003, **settings, **chosen)
    rule, group, before = rule_of(optimizer), dict(optimizer.param_groups[0]), weight.detach().clone()
    optimizer.step()
    moved = weight.detach().double() - before.double()
    frozen = rule.frozen(Observation({}, optimizer.state[weight], before, weight.grad, moved), group)
    (decay,) = rule.displacement_sources(before.double(), frozen, group).values()
    error = ((moved - decay) * before).sum() / before.double().square().sum()
    assert abs(error) < 1e-9


# -- single rules ------------------------------------------------------------------------------------------------------


def test_radam_is_rectified_from_the_sixth_step() -> None:
    steps = list(train(ROWS["radam"]).trajectory.steps())
    assert [isinstance(step.frozen["0.weight"]["denominator"], Tensor) for step in steps] == [False] * 5 + [True]


def test_adafactor_clips_in_these_tests() -> None:
    scales = [step.frozen["0.weight"]["scale"] for step in train(ROWS["adafactor"]).trajectory.steps()]
    sizes = [step.before[:20].norm() / 20**0.5 for step in train(ROWS["adafactor"]).trajectory.steps()]
    assert any(scale < 0.99 * size for scale, size in zip(scales, sizes, strict=True))


def test_rprop_shares_a_step_of_fixed_size() -> None:
    trajectory = train(ROWS["rprop"]).trajectory
    turned = 0
    for step in trajectory.steps():
        frozen, where = step.frozen["0.weight"], trajectory.layout.slices["0.weight"]
        moved, gradient = (step.after - step.before)[where], step.gradient[where]
        still = frozen["magnitude"].flatten().isinf()
        turned += int(still.sum())
        assert (moved[still] == 0).all()
        torch.testing.assert_close(
            moved[~still], -(frozen["step_size"].flatten() * gradient.sign())[~still], rtol=1e-11, atol=0
        )
    assert turned > 0


def test_the_path_of_asgd_is_that_of_the_parameters_not_of_its_average() -> None:
    run = train(ROWS["asgd_options"])
    assert torch.equal(run.trajectory.final, torch.cat([p.detach().flatten() for p in run.model.parameters()]))


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (1, 6), (6, 1)], ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_hits_what_torch_did_and_whitens_the_rest(shape: tuple[int, int], nesterov: bool) -> None:
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator(0)))
    optimizer = optim.Muon([weight], lr=0.1, weight_decay=0.02, nesterov=nesterov)
    rule, settings = rule_of(optimizer), dict(optimizer.param_groups[0])
    memory = (torch.zeros(shape, dtype=torch.float64),)
    for seed in range(3):
        before, weight.grad = (
            weight.detach().clone(),
            torch.randn(shape, dtype=torch.float64, generator=generator(seed)),
        )
        optimizer.step()
        moved = weight.detach() - before
        frozen = rule.frozen(Observation({}, optimizer.state[weight], before, weight.grad, moved), settings)
        assert frozen["whitening"].shape == (min(shape), min(shape))
        delta, memory = rule.step(weight.grad, memory, frozen, settings)
        torch.testing.assert_close(delta + frozen["decay"] * before, moved, rtol=0, atol=1e-14)
        assert frozen["missed"].norm() < 0.03 * min(shape) ** 0.5  # bfloat16
        # Of a gradient orthogonal to the momentum, the correction is silent: whitening, and nothing else.
        other = torch.randn(shape, dtype=torch.float64, generator=generator(9))
        other -= (other * frozen["dual"]).sum() / frozen["dual"].square().sum() * frozen["dual"]
        zeros = (torch.zeros_like(other),)
        mixed = 1 - settings["momentum"] ** 2 if nesterov else 1 - settings["momentum"]
        factor = frozen["whitening"]
        expected = factor @ other if shape[0] <= shape[1] else other @ factor
        scale = 0.1 * max(1.0, shape[0] / shape[1]) ** 0.5 * mixed
        torch.testing.assert_close(
            rule.step(other, zeros, frozen, settings)[0], -scale * expected, rtol=1e-10, atol=1e-13
        )


def test_muon_at_rest() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = optim.Muon([weight], lr=0.0)
    weight.grad = torch.zeros(3, 2)
    optimizer.step()
    rule, settings = rule_of(optimizer), dict(optimizer.param_groups[0])
    seen = Observation({}, optimizer.state[weight], torch.ones(3, 2), weight.grad, torch.zeros(3, 2))
    delta, _ = rule.step(weight.grad.double(), (torch.zeros(3, 2).double(),), rule.frozen(seen, settings), settings)
    assert torch.equal(delta, torch.zeros(3, 2).double())


# -- the convention for optimizers without a rule ----------------------------------------------------------------------


class Normalised(Optimizer):
    """Heavy ball on g / ‖g‖, with decoupled decay."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(0.9).add_(p.grad / p.grad.norm())
                p.mul_(0.99).sub_(group["lr"] * buffer)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_elementwise_is_exact_in_total(dtype: torch.dtype) -> None:
    why = train(lambda parameters: Normalised(parameters, 0.01), dtype, rule=Elementwise()).explain()
    assert why.relative_residual < LIMITS[dtype]
    assert set(why.channels) == {"initial", "rounding"}
    assert np.abs(why.channels["rounding"]).max() < 10 * LIMITS[dtype]


def test_elementwise_of_plain_descent_is_plain_descent() -> None:
    def make(parameters: Any) -> Optimizer:
        return optim.SGD(parameters, lr=0.1)

    np.testing.assert_allclose(
        train(make, rule=Elementwise()).explain().shares, train(make).explain().shares, rtol=1e-10, atol=1e-14
    )


def test_what_moves_without_gradient_is_unexplained() -> None:
    model = make_model("relu", 3)
    with torch.no_grad():
        model[0].bias[0] = -100.0  # a dead unit: its weights have no gradient, and decay

    def make(parameters: Any) -> Optimizer:
        return optim.SGD(parameters, lr=0.1, weight_decay=0.1)

    run = train(make, rule=Elementwise(), model=model)
    with pytest.raises(TrajectoryError, match="is unexplained"):
        pk.KernelMachine(run.trajectory, unexplained=1e-3).explain(run.queries, outputs="all")
    why = pk.KernelMachine(run.trajectory, unexplained=1.0).explain(run.queries, outputs="all")
    assert why.relative_residual < 1e-12
    step, where = run.trajectory.store.read(0), run.trajectory.layout.slices["0.weight"]
    alone = Elementwise().displacement_sources(step.before[where], step.frozen["0.weight"], {})["unexplained"]
    moved, dead = (step.after - step.before)[where].reshape(-1, 4), step.gradient[where].reshape(-1, 4) == 0
    assert dead[0].all() and not dead.all() and (alone[0] != 0).all()
    assert torch.equal(alone, moved.where(dead, torch.zeros_like(moved)))


def test_one_quasi_newton_step_at_a_time() -> None:
    def make(parameters: Any) -> Optimizer:
        return optim.LBFGS(parameters, lr=0.1, max_iter=1)

    why = train(make, rule=Elementwise(), by_closure=True).explain()
    assert why.relative_residual < 1e-10


# -- refusals ----------------------------------------------------------------------------------------------------------


class Unknown(optim.SGD):
    pass


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    ("optimizer", "rule", "words"),
    [
        (Unknown(parameters(), lr=0.1), None, ("Unknown` has no update rule", "exact class", 'rule="elementwise"')),
        (optim.LBFGS(parameters()), None, ("LBFGS` has no update rule", "several times", "max_iter=1")),
        (optim.SparseAdam(parameters()), None, ("SparseAdam` has no update rule", "are dense", "sparse=False")),
        (
            optim.SparseAdam(parameters()),
            "elementwise",
            ("SparseAdam` has no update rule", "are dense", "sparse=False"),
        ),
        (optim.SGD(parameters(), lr=0.1), "scalar", ("`rule='scalar'`", "'elementwise'", 'rule="elementwise"')),
    ],
    ids=["unknown", "lbfgs", "sparse", "sparse by convention", "unknown name"],
)
def test_refusals_say_what_to_write(optimizer: Optimizer, rule: str | None, words: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedOptimizerError) as caught:
        rule_of(optimizer, rule)
    for part, word in zip((caught.value.found, caught.value.expected, caught.value.write), words, strict=True):
        assert word in part


@pytest.mark.parametrize("settings", [{}, {"max_iter": 1, "line_search_fn": "strong_wolfe"}])
def test_the_convention_needs_one_gradient_a_step(settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOptimizerError, match="takes a gradient at each place"):
        train(lambda parameters: optim.LBFGS(parameters, **settings), rule=Elementwise())


def test_named_and_given_rules() -> None:
    optimizer, mine = optim.SGD(parameters(), lr=0.1), Elementwise()
    assert isinstance(rule_of(optimizer, "elementwise"), Elementwise)
    assert rule_of(optimizer, mine) is mine
    assert Elementwise.name == "elementwise convention"


def test_every_optimizer_of_torch_has_a_rule_or_a_refusal() -> None:
    classes = {c for c in vars(optim).values() if isinstance(c, type) and issubclass(c, Optimizer)}
    assert classes - set(RULES) == {Optimizer, optim.LBFGS, optim.SparseAdam}
    assert {row.make for row in ROWS.values()} - {matrices_only} | {optim.Muon} == set(RULES)
