"""Levels of record: what each keeps, serves and costs, against what it says; streaming against a record."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, generator, make_inputs, make_model
from torch import nn

import pathkernel as pk
from pathkernel import errors
from pathkernel.kernel_machine.streaming import StreamingShares
from pathkernel.path_kernel.streaming import StreamingFeatures, StreamingGram
from pathkernel.recording.cost_table import as_bytes, format_plan, parse_size, plan_table, state_numbers
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.schedule import (
    Every,
    Keyframes,
    Nothing,
    RunSize,
    Schedule,
    StepObserver,
    Streaming,
    WeightsOnly,
    as_schedule,
)
from pathkernel.trajectory.thinned import ThinnedStore

CE = nn.CrossEntropyLoss()
QUERIES = make_inputs(4, seed=3)


def train(
    schedule: Any = None,
    optimizer: str = "sgd_decay",
    *,
    norm: bool = False,
    edit: bool = False,
    steps: int = 8,
    rate: Any = None,
    **options: Any,
) -> pk.Trajectory:
    """A float64 run; with BatchNorm in train mode, or with named changes between steps and after the last."""
    model = make_model()
    if norm:
        model.insert(1, nn.BatchNorm1d(5).double())
    X, y = make_inputs(20), torch.randint(3, (20,), generator=generator(2))
    opt, order = OPTIMIZERS[optimizer](model.parameters()), generator(3)
    with pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=schedule, **options) as recorder:
        for step in range(steps):
            if rate is not None:
                opt.param_groups[0]["lr"] = rate(step)
            x, target = recorder.batch(torch.randint(20, (5,), generator=order))
            opt.zero_grad()
            CE(model(x), target).backward()
            opt.step()
            if edit and step in (3, steps - 1):
                with recorder.channel("shrink"), torch.no_grad():
                    model[0].weight *= 0.9
    model.eval()
    return recorder.trajectory


# -- values ------------------------------------------------------------------------------------------------------------


def test_schedules_are_values() -> None:
    levels = [Every(), Every(10), Keyframes(32), WeightsOnly(), Nothing()]
    settings = [{}, {"every": 10}, {"keyframes": 32}, {"keep": "weights"}, {"keep": "nothing"}]
    assert [Schedule(**given) for given in settings] == levels and len(set(levels)) == len(levels)
    assert as_schedule(None) == Schedule() == Schedule(every=1) == Every(state="rule")
    for level in levels:
        assert isinstance(level, Schedule) and Schedule(**level.settings) == level
        assert eval(repr(level), {type(level).__name__: type(level)}) == level
        assert pickle.loads(pickle.dumps(level)) == copy.deepcopy(level) == level
        with pytest.raises(FrozenInstanceError):
            level.n = 3
    assert [Schedule.keyframes_for(n).keyframes for n in (1, 99, 100, 10_000)] == [1, 9, 10, 100]


class Old(MemoryStore):
    exists = True


REFUSALS = {
    "every": (lambda: Schedule(every=0), r"`Every\(0\)`"),
    "every_bool": (lambda: Schedule(every=True), r"`Every\(True\)`"),
    "keyframes": (lambda: Schedule(keyframes=1.5), r"`Keyframes\(1.5\)`"),
    "keep": (lambda: Schedule(keep="all"), r"`Schedule\(keep='all'\)`"),
    "both": (lambda: Schedule(every=2, keyframes=3), "which needs all of them; a thinned path leaves steps out"),
    "keyframes_for": (lambda: Schedule.keyframes_for(0), r"`Schedule.keyframes_for\(0\)`"),
    "keep_two": (lambda: Schedule(every=2, keep="nothing"), r"`Schedule\(every=2, keyframes=None, keep='nothing'\)`"),
    "state": (lambda: Every(state="half"), r"`Every\(state='half'\)`"),
    "nobody_looks": (lambda: train(Nothing()), "Without storage somebody has to look on"),
    "an_observer": (lambda: train(observers=["gram"]), "A str was given among `observers`"),
    "store_and_observers": (
        lambda: train(store=Old(), observers=[StreamingGram(QUERIES)]),
        "`store=` holds steps of an earlier run, and `observers` were given",
    ),
    "nobody": (lambda: Streaming(), "Without storage somebody has to look on"),
    "no_observer": (lambda: Streaming("gram"), r"`Streaming\(str\)`"),
    "no_schedule": (lambda: train(10), "`schedule=10` was given"),
    "machine_thinned": (
        lambda: pk.KernelMachine(train(Schedule(every=10))),
        r"^`KernelMachine` needs every step, but this trajectory was thinned with `Every\(10\)`\. .*"
        r"Record again with `Every\(\)`, or use `PathKernel`, which accepts a thinned path\.$",
    ),
    "machine_weights": (lambda: pk.KernelMachine(train(Schedule(keep="weights"))), "kept the weights alone"),
    "preconditioner": (
        lambda: pk.PathKernel(train(Schedule(every=2), "adam"), preconditioner="optimizer"),
        r"thinned with `Every\(2\)`",
    ),
    "streamed_machine": (lambda: pk.KernelMachine(train(Streaming(StreamingGram(QUERIES)))), "was streamed with"),
    "streamed_kernel": (lambda: pk.PathKernel(train(Streaming(StreamingGram(QUERIES)))), "was streamed with"),
    "streamed_step": (
        lambda: train(Streaming(StreamingGram(QUERIES))).store.read(3),
        "Step 3 was asked for, and this path was streamed",
    ),
    "momentum": (
        lambda: train(Streaming(StreamingShares(QUERIES)), "momentum"),
        "to a recorder of SGD, which remembers earlier gradients",
    ),
    "adam": (lambda: train(Streaming(StreamingShares(QUERIES)), "adam"), "to a recorder of Adam, which remembers"),
    "adaptive": (
        lambda: StreamingShares(QUERIES, quadrature="adaptive"),
        "relative to how far outputs move in all of training",
    ),
    "shares_unseen": (lambda: StreamingShares(QUERIES).attributions, "`StreamingShares` was asked for its result"),
    "gram_unseen": (lambda: StreamingGram(QUERIES).matrix, "`StreamingGram` was asked for its result"),
    "gram_steps": (lambda: StreamingGram(QUERIES, steps=3), r"`StreamingGram\(steps=...\)` was given"),
    "plan_size": (lambda: plan_table("many", 10), "The size 'many' was given"),
    "plan_zero": (lambda: parse_size(0), "The size 0 was given"),
    "plan_optimizer": (lambda: plan_table(10, 10, optimizer="lbfgs"), "`optimizer='lbfgs'` was given"),
    "plan_batch": (lambda: plan_table(10, 10, batch_size=0), "`batch_size=0` was given"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    act, message = REFUSALS[name]
    with pytest.raises(errors.PathKernelError, match=message) as caught:
        act()
    assert all((caught.value.found, caught.value.expected, caught.value.write))


@pytest.mark.parametrize("schedule", [None, Schedule(keyframes=3), Schedule(every=2)])
def test_a_store_that_holds_steps_and_is_no_folder_is_not_gone_on_with(schedule: Any) -> None:
    with pytest.raises(errors.StoreError, match=r"A Old holds steps of an earlier run.*goes on in a folder"):
        train(schedule, store=Old())


# -- what is kept, and what it takes -----------------------------------------------------------------------------------


def bytes_of(trajectory: pk.Trajectory) -> int:
    """Bytes of all vectors and ids that the inner store holds, shared ones once."""
    seen: dict[int, int] = {}
    inner = getattr(trajectory.store, "inner", trajectory.store)
    for step in inner._steps:
        state = getattr(step.frozen, "state", None)
        kept = [step.before, step.after, step.gradient, *(batch.ids for batch in step.batches)]
        kept += [*state.before.values(), *state.after.values()] if state is not None else []
        own = [] if state is not None else [v for values in step.frozen.values() for v in values.values()]
        for tensor in [*kept, *(v for v in own if isinstance(v, torch.Tensor))]:
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(keep="weights"), Schedule(every=5), Schedule(keyframes=10)])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_bytes_per_step_are_as_stated(schedule: Schedule, optimizer: str) -> None:
    steps, model = 60, nn.Linear(40, 40)
    X, y = torch.randn(20, 40), torch.randint(40, (20,))
    opt = OPTIMIZERS[optimizer](model.parameters())
    with pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=schedule) as recorder:
        for _ in range(steps):
            for x, target in recorder.batches(batch_size=20):
                opt.zero_grad()
                CE(model(x), target).backward()
                opt.step()
    statistics, frozen = state_numbers(optimizer)
    run = RunSize(recorder.trajectory.layout.size, steps, 20, statistics=statistics, frozen=frozen)
    stated = schedule.bytes_per_step(run) * steps
    # θ_0, the optimizer's state that is not there yet at the first keyframe, and an empty vector or two.
    assert bytes_of(recorder.trajectory) == pytest.approx(stated, rel=0.12)


def test_weights_alone_give_the_same_path_kernel() -> None:
    full, weights = train(optimizer="adam", edit=True), train(Schedule(keep="weights"), "adam", edit=True)
    assert len(weights) == len(full)
    for options in ({}, {"measure": "arc_length"}, {"quadrature": pk.GaussLegendre(2), "outputs": "full"}):
        np.testing.assert_array_equal(
            pk.PathKernel(weights, **options)(QUERIES), pk.PathKernel(full, **options)(QUERIES)
        )


def test_a_thinned_path_converges_to_the_path_with_the_order_of_the_trapezoid() -> None:
    """On a smooth path joined steps are coarse trapezia: four times the error for twice the length."""
    rate = lambda s: 0.02 * (1 + s / 64)  # noqa: E731
    full = train(steps=64, optimizer="sgd", rate=rate)
    expected = pk.PathKernel(full)(QUERIES)
    missed = {}
    for every in (1, 8, 16, 32):
        thinned = train(Schedule(every=every, keep="weights"), "sgd", steps=64, rate=rate)
        kernel = pk.PathKernel(thinned)
        assert len(thinned) == 64 // every and torch.equal(thinned.final, full.final)
        assert kernel.total_weight == pytest.approx(pk.PathKernel(full).total_weight, rel=1e-12)
        assert pk.PathKernel(thinned, measure="uniform").total_weight == pytest.approx(64)
        missed[every] = np.abs(kernel(QUERIES) - expected).max()
    assert missed[1] == 0 and missed[8] < missed[16] < missed[32]
    assert missed[32] / missed[16] > 2


def test_the_last_stretch_may_be_shorter_and_recording_goes_on() -> None:
    full, thinned = train(steps=11), train(Schedule(every=4), steps=11)
    assert [step.length for step in thinned.steps()] == [4, 4, 3]
    for index, step in enumerate(thinned.steps()):
        assert step.index == index and torch.equal(step.before, full.vector(4 * index))
        ids = [batch.ids for s in list(full.steps())[4 * index : 4 * index + 4] for batch in s.batches]
        assert torch.equal(torch.cat([batch.ids for batch in step.batches]), torch.cat(ids))
        assert not step.gradient.numel() and not step.frozen
    steps = list(full.steps())
    store = ThinnedStore(MemoryStore(), 4)
    for step in steps[:6]:
        store.append(step)
    assert len(store) == 2 and torch.equal(store.read(1).after, steps[5].after)
    store.flush()
    for step in steps[6:]:
        store.append(step)
    store.close()
    assert [step.length for step in (store.read(i) for i in range(len(store)))] == [4, 2, 4, 1]
    assert store.read(-1).hyperparameters[0]["lr"] == pytest.approx(0.1)


def test_parameters_that_join_a_thinned_path() -> None:
    model = make_model()
    model[2].requires_grad_(False)
    X, y = make_inputs(20), torch.randint(3, (20,), generator=generator(2))
    opt = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pk.KernelRecorder(model, opt, CE, data=(X, y), schedule=Schedule(every=2)) as recorder:
        for step in range(5):
            if step == 3:
                model[2].requires_grad_(True)
                opt.add_param_group({"params": list(model[2].parameters())})
            x, target = recorder.batch([step, step + 5])
            opt.zero_grad()
            CE(model(x), target).backward()
            opt.step()
    trajectory = recorder.trajectory
    assert {len(step.before) for step in trajectory.steps()} == {trajectory.layout.size}
    assert pk.PathKernel(trajectory)(QUERIES).shape == (4, 4)


# -- streaming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quadrature", "change"),
    [
        ("auto", {}),
        ("left", {"norm": True, "edit": True}),
        ("trapezoid", {"edit": True}),
        ("midpoint", {"norm": True}),
        ("auto", {"norm": True, "edit": True}),
    ],
    ids=str,
)
def test_streamed_shares_are_those_of_the_record(quadrature: str, change: dict[str, bool]) -> None:
    machine = pk.KernelMachine(train(**change), quadrature=quadrature)
    expected = machine.explain(QUERIES, outputs="all")
    shares = StreamingShares(QUERIES, quadrature=quadrature)
    trajectory = train(Streaming(shares), **change)
    assert len(trajectory) == 8 and torch.equal(trajectory.final, machine.trajectory.final)
    for _ in range(2):  # asking changes nothing
        found = shares.attributions
        np.testing.assert_allclose(found.shares, expected.shares, rtol=0, atol=1e-14)
        assert set(found.channels) == set(expected.channels)
        for name, value in expected.channels.items():
            np.testing.assert_allclose(found.channels[name], value, rtol=0, atol=1e-14)
        np.testing.assert_allclose(found.quadrature_error, expected.quadrature_error, rtol=1e-9, atol=1e-13)
        np.testing.assert_array_equal(found.output, expected.output)
        assert found.gradients_per_step == pytest.approx(expected.gradients_per_step)
        np.testing.assert_array_equal(found.outputs, expected.outputs)


@pytest.mark.parametrize("optimizer", ["Adagrad", "RMSprop"])
def test_every_rule_without_memory_streams(optimizer: str) -> None:
    def run(schedule: Any) -> pk.Trajectory:
        model, X = make_model(), make_inputs(20)
        opt = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
        with pk.KernelRecorder(model, opt, CE, data=(X, torch.arange(20) % 3), schedule=schedule) as recorder:
            for x, target in recorder.batches(batch_size=4):
                opt.zero_grad()
                CE(model(x), target).backward()
                opt.step()
        return recorder.trajectory

    shares = StreamingShares(QUERIES, outputs=1)
    run(Streaming(shares))
    expected = pk.KernelMachine(run(None)).explain(QUERIES, outputs=1)
    np.testing.assert_allclose(shares.attributions.shares, expected.shares, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw", {}),
        ("nesterov_decay", {"measure": "arc_length", "quadrature": "midpoint"}),
        ("sgd", {"outputs": "full"}),
        ("adamw", {"preconditioner": "optimizer"}),
        ("nesterov_decay", {"measure": "uniform", "quadrature": "left"}),
    ],
    ids=str,
)
def test_streamed_path_kernels_are_those_of_the_record(optimizer: str, options: dict[str, Any]) -> None:
    warm_up = lambda s: 0.0 if s == 0 else 0.02  # noqa: E731 - a step without weight
    X = make_inputs(3, seed=8)
    gram, cross = StreamingGram(QUERIES, **options), StreamingGram(QUERIES, X, **options)
    trajectory = train(Streaming(gram, cross), optimizer, rate=warm_up)
    kernel = pk.PathKernel(train(None, optimizer, rate=warm_up), **options)
    for found, expected in ((gram.matrix, kernel(QUERIES)), (cross.matrix, kernel(QUERIES, X))):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
    assert trajectory.schedule.serves == ("PathKernel of fixed samples",)


def test_streaming_keeps_one_step_and_goes_on_after_a_break() -> None:
    class Counter(StepObserver):
        name = "counting"

        def __init__(self) -> None:
            self.begun, self.seen = 0, []

        def begin(self, trajectory: pk.Trajectory, settings: Any) -> None:
            self.begun += 1
            assert (settings[0]["lr"] == 0.1 and not len(trajectory)) or self.begun > 1

        def observe(self, step: Any) -> None:
            self.seen.append(step.index)

    counter, shares = Counter(), StreamingShares(QUERIES)
    model, X = make_model(), make_inputs(20)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pk.KernelRecorder(model, opt, CE, data=(X, torch.arange(20) % 3), schedule=Streaming(counter, shares))
    for _ in range(2):
        with recorder:
            for x, target in recorder.batches(batch_size=5):
                opt.zero_grad()
                CE(model(x), target).backward()
                opt.step()
    assert counter.seen == list(range(8)) and len(recorder.trajectory) == 8
    assert torch.equal(recorder.trajectory.end_of_steps, recorder.trajectory.final)
    assert shares.attributions.relative_residual < 1e-12
    assert recorder.trajectory.schedule.bytes_per_step(RunSize(100, 8)) == 0


class Watcher(StepObserver):
    """Everything that a step holds."""

    name = "watching"

    def begin(self, trajectory: pk.Trajectory, settings: Any) -> None:
        self.steps = []

    def observe(self, step: Any) -> None:
        self.steps.append(step)


LEVELS = [None, Keyframes(3), Every(3), WeightsOnly(), Nothing()]


@pytest.mark.parametrize("level", LEVELS, ids=repr)
def test_watching_and_storing_do_not_know_each_other(level: Schedule | None) -> None:
    whole, alone = train(edit=True), train(level, edit=True) if level != Nothing() else None
    watcher, shares, gram = Watcher(), StreamingShares(QUERIES), StreamingGram(QUERIES)
    features = StreamingFeatures(QUERIES, 16)
    trajectory = train(level, edit=True, observers=[watcher, shares, gram, features])
    for seen, step in zip(watcher.steps, whole.steps(), strict=True):
        assert seen.index == step.index
        for name in ("before", "after", "gradient"):
            assert torch.equal(getattr(seen, name), getattr(step, name))
        assert [name for name, _ in seen.changes] == [name for name, _ in step.changes]
    machine, kernel = pk.KernelMachine(whole), pk.PathKernel(whole)
    np.testing.assert_allclose(shares.result.shares, machine.explain(QUERIES, outputs="all").shares, rtol=0, atol=1e-14)
    np.testing.assert_allclose(gram.result, kernel(QUERIES), rtol=1e-12)
    np.testing.assert_allclose(features.result, kernel.features(QUERIES, 16), rtol=1e-6, atol=1e-9)
    if alone is not None:  # and the record is the one without observers
        assert trajectory.schedule == alone.schedule and len(trajectory) == len(alone)
        assert bytes_of(trajectory) == bytes_of(alone)
        for mine, other in zip(trajectory.steps(), alone.steps(), strict=True):
            assert torch.equal(mine.before, other.before) and torch.equal(mine.after, other.after)
            assert torch.equal(mine.gradient, other.gradient)


def test_results_have_one_name_and_keep_their_older_ones() -> None:
    shares, gram, features = StreamingShares(QUERIES), StreamingGram(QUERIES), StreamingFeatures(QUERIES, 8)
    train(Streaming(shares, gram, features))
    np.testing.assert_array_equal(shares.attributions.shares, shares.result.shares)
    np.testing.assert_array_equal(gram.matrix, gram.result)
    np.testing.assert_array_equal(features.values, features.result)


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_sizes_as_people_write_them() -> None:
    texts = {"85k": 85_000, "1.2M": 1_200_000, "124m": 124_000_000, "1.5B": 1_500_000_000, "10_000": 10_000, 7: 7}
    assert {text: parse_size(text) for text in texts} == texts
    for bad in ("", "k", "-3", "1.2Q", "nan", "inf", "1e400", "0.0001"):
        with pytest.raises(errors.InputError, match="was given"):
            parse_size(bad)
    assert [as_bytes(n) for n in (0, 12, 85e3, 1.02e6, 3.4e9, 2e15)] == [
        "0",
        "12 B",
        "85 kB",
        "1.02 MB",
        "3.4 GB",
        "2e+03 TB",
    ]


def test_states_of_optimizers_are_counted() -> None:
    counted = {name: state_numbers(name) for name in ("sgd", "momentum", "Nesterov", "adam", "AdamW", "amsgrad")}
    assert counted == {
        "sgd": (0, 0), "momentum": (1, 0), "Nesterov": (1, 0), "adam": (2, 1), "AdamW": (2, 1), "amsgrad": (3, 1)
    }  # fmt: skip


def test_the_plan_of_a_run() -> None:
    rows = {row.level: row for row in plan_table("85k", "10k", optimizer="adamw", batch_size=64)}
    vector = 85_000 * 4
    assert rows["Every()"].total_bytes == 10_000 * (3 * vector + 512)
    keyframes = rows["Keyframes(100)"]
    assert keyframes.total_bytes == pytest.approx(100 * 3 * vector + 10_000 * 544)
    assert "trains every step once more" in keyframes.extra_compute and "KernelMachine" in keyframes.serves
    assert rows["Every(10)"].serves == ("PathKernel",)
    assert rows["Every(10)"].bytes_per_step == pytest.approx(vector / 10 + 512)
    assert not any("Shares" in level for level in rows)  # AdamW remembers
    assert any("Shares" in row.level for row in plan_table(100, 10, optimizer="sgd"))
    text = format_plan(list(rows.values()))
    assert "107 MB" in text and "10.2 GB" in text and len(text.splitlines()) == len(rows) + 4
    assert max(map(len, text.splitlines())) < 160
    assert json.loads(json.dumps([row.to_json() for row in rows.values()]))[0]["serves"] == [
        "KernelMachine",
        "PathKernel",
    ]


def test_counting_states_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    state_numbers("adam")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"tolerance": 1e-3}, r"`StreamingGram\(tolerance=...\)`.*every step is used.*record with"),
        ({"outputs": pk.OutputProbes(1)}, r"was given OutputProbes.*computed by itself.*StreamingFeatures"),
        ({"engine": pk.Projection(8)}, r"was given Projection.*computed by itself.*StreamingFeatures"),
    ],
    ids=["tolerance", "probes", "projection"],
)
def test_a_streamed_gram_matrix_chooses_and_draws_nothing(options: dict, found: str) -> None:
    with pytest.raises(errors.InputError, match=found):
        pk.StreamingGram(torch.zeros(2, 3), **options)
