"""Every refusal of the package: found, expected, what to write; and that refusing changes nothing.

`REFUSALS` has a row for each `raise` and each `check(…)`; `test_every_refusal_is_tested` reads the sources and fails
for one that no row reaches.
"""

from __future__ import annotations

import ast
import copy
import functools
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import LOSSES, OPTIMIZERS, SAMPLES, Recording, make_inputs, make_model, record
from refusals import OUTSIDE
from refusals_of_calls import CALLS
from refusals_of_influence import INFLUENCE
from refusals_of_models import MODELS
from refusals_of_optimizers import OF_OPTIMIZERS
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import sigmoid_kernel
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pathkernel as pk
from pathkernel import errors
from pathkernel.gradients.forward_state import ForwardState
from pathkernel.gradients.losses import Objective, batch_loss, check_reduction
from pathkernel.gradients.pytrees import as_tensors, memory_bytes
from pathkernel.gradients.returned import batch_outputs, selected
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.optimizers.momentum import leapfrog
from pathkernel.optimizers.runge_kutta import Heun
from pathkernel.quadrature import as_quadrature
from pathkernel.recording.compiled import check_random_numbers
from pathkernel.recording.trial import try_out
from pathkernel.trajectory.averages import AverageRecord
from pathkernel.trajectory.cotangents import kept_cotangents
from pathkernel.trajectory.replay import Replay
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.store import FirstSteps
from pathkernel.update_rules.sgd import SGD
from pathkernel.update_rules.table import rule_of

PACKAGE = Path(errors.__file__).parent
ELSEWHERE = {
    "analysis/generalization.py": "tests/analysis",
    "analysis/regime.py": "tests/analysis",
    "analysis/support_vectors.py": "tests/analysis",
    "analysis/evaluation.py": "tests/analysis/test_evaluation.py",
    "analysis/evaluation_checks.py": "tests/analysis/test_evaluation.py",
    "analysis/evaluation_interfaces.py": "tests/analysis/test_evaluation.py",
    "callbacks": "tests/callbacks",
    "cli": "tests/cli",
    "dynamics": "tests/dynamics",
    "influence/datamodels.py": "tests/influence",
    "influence/duplicates.py": "tests/influence",
    "influence/labels.py": "tests/influence",
    "influence/nearest_neighbours.py": "tests/influence",
    "influence/active_learning.py": "tests/influence/test_pruning.py",
    "influence/pruning.py": "tests/influence/test_pruning.py",
    "influence/residuals.py": "tests/influence",
    "optimizers/norms.py": "tests/dynamics",
    "reference": "tests/test_reference.py",
    "storage": "tests/storage",
    "errors.py": "here",
    "analysis/two_sample.py": "tests/analysis/test_two_sample.py",
    "estimators": "tests/estimators",
    "kernels": "tests/kernels",
    "path_kernel/label_leak.py": "tests/path_kernel/test_label_leak.py",
    "influence/checkpoint_scores.py": "tests/influence/test_checkpoint_scores.py",
    "influence/retraining.py": "tests/influence/test_retraining.py",
    "kernel_machine/added_samples.py": "tests/kernel_machine/test_added_samples.py",
    "kernel_machine/linear_steps.py": "tests/kernel_machine/test_added_samples.py",
    "gradients/layers/hidden_values.py": "tests/gradients",
    "gradients/layers/recorded_passes.py": "tests/gradients",
    "gradients/layers/stacked_passes.py": "tests/gradients",
    "gradients/layers/tape.py": "tests/gradients",
    "plotting/doubtful_labels.py": "tests/cli/test_labels.py",
    "plotting/near_duplicates.py": "tests/cli/test_duplicates.py",
    "plotting/player.py": "tests/plotting/test_player_display.py",
    "plotting/share_map.py": "tests/plotting/test_game_displays.py",
    "plotting/vector_field.py": "tests/plotting/test_game_displays.py",
    "recording/collated.py": "tests/recording/test_collated.py",
    "recording/row_order.py": "tests/recording/test_row_order.py",
    "recording/observing.py": "tests/recording/test_observing.py",
    "recording/resume.py": "tests/recording/test_resume.py",
    "runtime/workspace.py": "tests/runtime",
    "tangent_kernel/engines/proved.py": "tests/tangent_kernel/test_proved.py",
    "trajectory/observer.py": "tests/recording/test_observing.py",
    "trajectory/final_state.py": "tests/kernel_machine/test_added_samples.py",
    "trajectory/weighted_retraining.py": "tests/trajectory/test_weighted_retraining.py",
    "update_rules/rule.py": "tests/update_rules/test_declaration.py",
}
"""Where refusals of the rest are tested, beside what they belong to; some need a broken file or a second process."""
CE = nn.CrossEntropyLoss()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.ones(4), 0)])


class Records(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(4), "y": torch.tensor(0)}


def embedded(X: torch.Tensor) -> np.ndarray:
    """A path kernel on token ids, (4,) each."""
    model, ids = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(8, 2)), torch.randint(9, (6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(ids, torch.zeros(6, dtype=torch.int64))) as recorder:
        for x, y in recorder.batches(batch_size=3):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    return pk.PathKernel(recorder.trajectory)(X)


class Scene:
    """A recorder that has made one step and is about to be led astray; what must not change is remembered."""

    def __init__(self, optimizer: str = "adam", steps: int = 1, loss: nn.Module = CE, **options: Any) -> None:
        self.model, self.loss = make_model(), loss
        self.X, self.y = make_inputs(SAMPLES), LOSSES["ce_mean"].targets(SAMPLES)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.recorder = pk.KernelRecorder(
            self.model, self.optimizer, loss, **{"data": (self.X, self.y), "audit_every": 1, **options}
        )
        self.recorder.start()
        for _ in range(steps):
            self.step([0, 1, 2])

    def gradient(self, ids) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(self.X[ids]), self.y[ids]).backward()

    def step(self, ids) -> None:
        self.recorder.batch(ids)
        self.gradient(ids)
        self.optimizer.step()

    def state(self) -> list[torch.Tensor]:
        memory = [v for p in self.model.parameters() for v in self.optimizer.state[p].values()]
        return [torch.as_tensor(v).clone() for v in (*self.model.parameters(), *memory)]

    def refused(self, act: Callable[[], object]) -> errors.PathKernelError:
        """Nothing moves, nothing is recorded, and an honest step works afterwards."""
        before, length = self.state(), len(self.recorder.trajectory)
        with pytest.raises(errors.PathKernelError) as caught:
            act()
        assert all(torch.equal(a, b) for a, b in zip(before, self.state(), strict=True))
        assert len(self.recorder.trajectory) == length
        return caught.value

    def goes_on(self) -> None:
        self.step([3, 4])
        trajectory = self.recorder.close()
        why = pk.KernelMachine(trajectory).explain(self.X[:2], outputs=0)
        assert why.relative_residual < 1e-11
        assert set(why.channels) <= {"initial", "rounding", "weight_decay"}


# -- the table --------------------------------------------------------------------------------------------------------


def run() -> Recording:
    return record(optimizer="momentum", batches=((0, 1), (2, 3)))


def recorder_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> pk.KernelRecorder:
    opt = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return pk.KernelRecorder(model, opt, CE, **{"data": (make_inputs(2), torch.tensor([0, 1])), **options})


def diverged() -> None:
    model, data = make_model(), (make_inputs(4), torch.tensor([0, 1, 0, 1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e200)
    with pk.KernelRecorder(model, optimizer, CE, data=data, audit_every=0) as recorder:
        for ids in ([0, 1], [2, 3], [0, 2]):
            x, y = recorder.announce(ids)
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    pk.KernelMachine(recorder.trajectory).explain(make_inputs(2))


def machine() -> pk.KernelMachine:
    return pk.KernelMachine(run().trajectory)


def empty() -> pk.Trajectory:
    return recorder_of(make_model()).trajectory


def attributions(n: int = 5) -> Attributions:
    zero = np.zeros(1)
    return Attributions(np.zeros((1, n)), {"initial": zero}, zero, np.zeros(1, int), np.zeros(1, int), zero)


def with_complex_parameter() -> nn.Module:
    model = nn.Linear(4, 3)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return model


class OnlySmall(SGD):
    """Covers small steps only."""

    def refusal(self, settings):
        return f"lr={settings['lr']} is too large" if settings["lr"] > 0.05 else None


class NotDiagonal(SGD):
    """Says of itself that it mixes the entries of a parameter."""

    name, elementwise = "Whitening", False


class Unheard(torch.optim.Optimizer):
    """An optimizer that nobody knows."""


class WrappedSGD(torch.optim.SGD):
    """A subclass may step differently."""


def step_without_ids() -> None:
    scene = Scene()
    scene.gradient([3])
    scene.optimizer.step()


def step_with_wrong_ids() -> None:
    scene = Scene()
    scene.recorder.batch([3, 4])
    scene.gradient([4, 5])
    scene.optimizer.step()


def step_with_nan() -> None:
    scene = Scene()
    scene.recorder.batch([3, 4])
    scene.gradient([3, 4])
    scene.model[2].bias.grad[1] = torch.nan
    scene.optimizer.step()


def step_with_new_parameters() -> None:
    scene = Scene()
    scene.recorder.batch([3, 4])
    scene.gradient([3, 4])
    scene.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(7))]})
    scene.optimizer.step()


def step_with_changed_parameters() -> None:
    model, X, y = make_model(), make_inputs(4), torch.tensor([0, 1, 2, 0])
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y)) as recorder:
        x, target = recorder.batch([0, 1])
        CE(model(x), target).backward()
        with torch.no_grad():
            model[0].weight.add_(0.1)
            model[0].bias.add_(0.1)
        optimizer.add_param_group({"params": list(model[0].requires_grad_().parameters())})
        optimizer.step()


def step_with_another_layer() -> None:
    scene = Scene()
    scene.model[2] = copy.deepcopy(scene.model[2])
    scene.optimizer.param_groups[0]["params"][2:] = list(scene.model[2].parameters())
    scene.recorder.batch([3, 4])
    scene.gradient([3, 4])
    scene.optimizer.step()


def other_samples_in_a_channel() -> None:
    scene = Scene(steps=0)
    scene.recorder.batch([2, 1])
    with scene.recorder.channel("penalty"):
        scene.gradient([3, 4])
    scene.optimizer.step()


def in_inference_mode() -> None:
    trajectory = run().trajectory
    with torch.inference_mode():
        pk.KernelMachine(trajectory)


class TwoStages(SGD):
    """Says of itself that it takes two gradients in a step."""

    stages = 2


def edit_of_one_stage() -> None:
    scene = Scene(steps=0, rule=TwoStages())
    scene.recorder.batch([3, 4])
    scene.gradient([3, 4])
    with scene.recorder.channel("noise"):
        scene.model[0].weight.grad.add_(1.0)


def average_that_is_none() -> None:
    average = copy.deepcopy(model := make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(
        model, optimizer, CE, data=(make_inputs(2), torch.tensor([0, 1])), averages={"ema": average}
    ) as recorder:
        x, y = recorder.batch([0, 1])
        CE(model(x), y).backward()
        optimizer.step()
        average[2].weight.data.mul_(-1)


def chord_of_an_average() -> None:
    trajectory = run().trajectory
    trajectory.averages["ema"] = AverageRecord.begin("ema", trajectory.model, trajectory.layout)
    pk.KernelMachine(trajectory, average="ema", form="chord")


def swinging() -> pk.Trajectory:
    return record(loss="mse_mean", batches=((0, 1),) * 4, schedule=lambda o: faster(o)).trajectory


def faster(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 30.0)


def changes_that_nobody_named() -> None:
    scene = Scene()
    with torch.no_grad():
        scene.model[2].weight.mul_(1.5)
    scene.step([3, 4])
    pk.KernelMachine(scene.recorder.close()).explain(scene.X[:2], outputs=0)


def restart_after_an_unseen_step() -> None:
    scene = Scene("momentum")
    scene.recorder.close()
    scene.gradient([3])
    scene.optimizer.step()
    scene.recorder.start()


def machine_of_wrong_ids() -> None:
    scene = Scene(audit_every=0)
    scene.recorder.batch([3, 4])
    scene.gradient([4, 5])
    scene.optimizer.step()
    pk.KernelMachine(scene.recorder.close()).explain(scene.X[:1])


def machine_of_wrong_ids_with_small_gradients() -> None:
    scene = Scene("sgd", steps=0, audit_every=0)
    rate, scene.optimizer.param_groups[0]["lr"] = scene.optimizer.param_groups[0]["lr"], 0.0
    scene.recorder.batch([0, 1])
    (1e13 * scene.loss(scene.model.forward(scene.X[:2]), scene.y[:2])).backward()  # a pass that nobody sees
    scene.optimizer.step()  # moves nothing, and makes every later gradient look negligible
    scene.optimizer.param_groups[0]["lr"] = rate
    for _ in range(3):
        scene.recorder.batch([3, 4])
        scene.optimizer.zero_grad()
        scene.loss(scene.model.forward(scene.X[5:7]), scene.y[5:7]).backward()
        scene.optimizer.step()
    pk.KernelMachine(scene.recorder.close()).explain(scene.X[:2], outputs=0)


def step_by_hand() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, data=(make_inputs(SAMPLES), torch.zeros(SAMPLES, 1))) as recorder:
        recorder.batch([0, 1])
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


def step_of_a_stranger() -> None:
    scene = Scene()
    scene.optimizer.zero_grad()
    z = scene.model(scene.X[5:6])  # before any announcement
    scene.recorder.batch([3, 4])
    (scene.loss(scene.model(scene.X[3:5]), scene.y[3:5]) + scene.loss(z, scene.y[5:6])).backward()
    scene.optimizer.step()


def step_of_others(announced: list[int], used: list[int]) -> None:
    scene = Scene()
    scene.recorder.batch(announced)
    scene.gradient(used)
    scene.optimizer.step()


class Uneven(nn.Module):
    """Returns its outputs under a name, with a loss."""

    def __init__(self, loss: bool = True) -> None:
        super().__init__()
        self.net, self.loss = make_model(), loss

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.net(x).repeat(1, 2000)
        return {"logits": z, "loss": z.square().mean()} if self.loss else {"logits": z}


def returned_recorder(loss: Any, returns: Any = "logits") -> tuple[Uneven, torch.optim.Optimizer, pk.KernelRecorder]:
    model = Uneven()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    data = make_inputs(SAMPLES), LOSSES["ce_mean"].targets(SAMPLES)
    return model, optimizer, pk.KernelRecorder(model, optimizer, loss, data=data, returns=returns, task="regression")


def loss_that_is_another() -> None:
    model, optimizer, recorder = returned_recorder(lambda logits, _: logits.abs().mean())
    with recorder:
        recorder.batch([0, 1])
        model(make_inputs(2))["loss"].backward()
        optimizer.step()


def loss_that_is_returned_no_more() -> None:
    model, optimizer, recorder = returned_recorder("returned")
    with recorder:
        recorder.batch([0, 1])
        model(make_inputs(2))["loss"].backward()
        model.loss = False
        optimizer.step()


def loss_that_is_returned_no_more_in_a_replay() -> None:
    model, optimizer, recorder = returned_recorder("returned")
    trajectory = recorder.trajectory
    batch = MicroBatch(torch.tensor([0, 1]), loss_slope=torch.ones(()))
    vector = trajectory.initial
    step = Step(0, vector, vector, vector[:0], frozenset(), (batch,), {}, ())
    model.loss = False
    replay = Replay(trajectory.run, optimizer)
    replay.restore(vector, {})
    replay.differentiate(step, 1)


def trial_of_wrong_samples() -> None:
    recording = run()
    step = recording.trajectory.store.read(0)
    batch = replace(step.batches[0], ids=torch.tensor([2, 3]))
    try_out(recording.trajectory, replace(step, batches=(batch,)))


class Drawing(nn.Module):
    """Draws in training from a generator that nobody records; the gradient hardly tells."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z + float(np.random.rand()) if self.training else z


def step_that_draws_from_numpy() -> None:
    model = Drawing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, data=(X3, torch.tensor([0, 1, 2])), audit_every=1) as recorder:
        recorder.batch([0, 1, 2])
        CE(model(X3), torch.tensor([0, 1, 2])).backward()
        optimizer.step()


class Growing(nn.Module):
    """Keeps what it saw in training."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x.sum(0).detach())
            if len(self.seen) > 1:
                raise AttributeError("no second time")
        return self.net(x)


def trial_of_a_network_that_runs_once() -> None:
    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = pk.KernelRecorder(model, optimizer, data=(X3, torch.tensor([0, 1, 2])), audit_every=3)
    with recorder:
        recorder.batch([0, 1, 2])
        CE(model(X3), torch.tensor([0, 1, 2])).backward()
        initial, gradient = recorder.trajectory.initial, recorder._live.gradient()
        try_out(recorder.trajectory, recorder._capture.slim_step(initial, gradient))


def slopes_that_take_too_much_room() -> None:
    kept_cotangents(torch.zeros(2, 2**20), 100, Objective(None))


def record_without_a_loss() -> pk.Trajectory:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    X, y = make_inputs(3), torch.tensor([0, 1, 2])
    with pk.KernelRecorder(model, optimizer, data=(X, y)) as recorder:
        recorder.batch([0, 1, 2])
        CE(model(X), y).backward()
        optimizer.step()
    return recorder.trajectory


def changed_model() -> None:
    recording = run()
    with torch.no_grad():
        recording.model[2].bias.add_(0.5)
    pk.PathKernel(recording.trajectory)


def no_learning_rate() -> pk.Trajectory:
    return record(schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.0)).trajectory


def indexed(**options) -> DataLoader:
    return DataLoader(pk.IndexedDataset(TensorDataset(make_inputs(3))), **options)


def heun_of_changed_data() -> object:
    """Inputs swapped after recording steps of several stages, whose gradients are not all on record to compare."""
    model, X, y = make_model(), make_inputs(4), torch.tensor([0, 1, 2, 0])
    optimizer = Heun(model.parameters(), lr=0.2)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y), rule=Heun.rule()) as recorder:
        for ids in ([0, 1], [2, 3]):
            x, target = recorder.batch(ids)

            def closure(x: torch.Tensor = x, target: torch.Tensor = target) -> torch.Tensor:
                optimizer.zero_grad()
                value = CE(model(x), target)
                value.backward()
                return value

            optimizer.step(closure)
    machine = pk.KernelMachine(recorder.trajectory)
    X.copy_(X[[2, 1, 0, 3]])
    return machine.predict(X3)


X3 = make_inputs(3)
Case = tuple[Callable[[], object], type[errors.PathKernelError], tuple[str, str, str]]


def one_sample() -> Any:
    """A trajectory with one training sample."""
    model = make_model()
    X, y = make_inputs(1), LOSSES["ce_mean"].targets(1)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y)) as recorder:
        for x, target in recorder.batches(1):
            optimizer.zero_grad()
            CE(model(x), target).backward()
            optimizer.step()
    return recorder.trajectory


def gone_on_with(schedule: Any) -> None:
    """Record into a store twice, the second time with a schedule."""
    with tempfile.TemporaryDirectory() as folder:
        Scene(store=f"{folder}/run").recorder.close()
        Scene(store=f"{folder}/run", schedule=schedule).recorder.start()


def two_on_one_store() -> None:
    """Record into the store of a recorder that is open."""
    with tempfile.TemporaryDirectory() as folder, Scene(store=f"{folder}/run").recorder:
        Scene(store=f"{folder}/run").recorder.start()


def a_kept_graph() -> None:
    """The loss of a step goes into that of the next."""
    model, x, total = nn.Linear(4, 3).double(), make_inputs(2), torch.zeros(())
    with recorder_of(model) as recorder:
        for _ in range(2):
            recorder.batch([0, 1])
            recorder.optimizer.zero_grad()
            total = total + CE(model(x), torch.tensor([0, 1]))
            total.backward(retain_graph=True)
            recorder.optimizer.step()


def a_loaded_momentum() -> None:
    """That of Muon, which mixes its entries."""
    model, x = nn.Linear(4, 3, bias=False).double(), make_inputs(2)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    with recorder_of(model, optimizer) as recorder:
        for _ in range(2):
            recorder.batch([0, 1])
            optimizer.zero_grad()
            CE(model(x), torch.tensor([0, 1])).backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())


def random_numbers_of_a_compiler() -> None:
    """A module that was compiled in place by inductor, of which a pass drew random numbers."""
    model = nn.Linear(1, 1)

    def call() -> None: ...

    call.get_compiler_config = lambda: {"fallback_random": False}  # type: ignore[attr-defined]
    model._compiled_call_impl = call
    state = ForwardState(generators={"cpu": torch.get_rng_state()})
    check_random_numbers(model, [MicroBatch(torch.arange(1), state=state)])


REFUSALS: dict[str, Case] = {
    # checkpoints, and what is loaded, kept and compiled
    "a step that there is not": (
        lambda: run().trajectory.until(9),
        errors.InputError,
        ("until step 9 was asked for", "on record 0 to 2", "`trajectory.until(2)`"),
    ),
    "a step put into the first part of a path": (
        lambda: FirstSteps(run().trajectory.store, 1).append(run().trajectory.store.read(0)),
        errors.TrajectoryError,
        ("A step was appended", "a view of what has been recorded", "a store of its own"),
    ),
    "parameters put into the first part of a path": (
        lambda: FirstSteps(run().trajectory.store, 1).extend(torch.zeros(1), None),
        errors.TrajectoryError,
        ("Parameters joined θ", "a view of what has been recorded", "a store of its own"),
    ),
    "statistics of an average in mid-run": (
        lambda: AverageRecord("ema", {}, unknown=("1.running_mean",)).constants([]),
        errors.TrajectoryError,
        ("`1.running_mean` of the average 'ema' in mid-run", "at the start and at the end", "at the end of the record"),
    ),
    "a momentum that was loaded": (
        a_loaded_momentum,
        errors.RecordingError,
        ("before step 1 of Muon", "not what the recorded samples left", "Load the weights alone"),
    ),
    "a graph that was kept": (
        a_kept_graph,
        errors.SampleIdError,
        ("from before the last step", "passes at its own weights", "h = h.detach()"),
    ),
    "a state that lies across": (
        lambda: Scene(steps=0).recorder.announce([0, 1, 2], inputs=torch.zeros(1, 3, 5)),
        errors.SampleIdError,
        ("3 ids came with inputs of shape (1, 3, 5)", "along the first axis", "h.transpose(0, 1)"),
    ),
    "random numbers of a compiler": (
        random_numbers_of_a_compiler,
        errors.RecordingError,
        ("Linear is compiled by inductor", "numbers of its own", "fallback_random = True"),
    ),
    # recording: model and optimizer
    "optimizer without a rule": (
        lambda: recorder_of(model := make_model(), Unheard(model.parameters(), {"lr": 0.1})),
        errors.UnsupportedOptimizerError,
        ("Unheard` has no update rule", "AdamW", "`rule=`"),
    ),
    "optimizer of sparse gradients": (
        lambda: rule_of(torch.optim.SparseAdam(make_model().parameters())),
        errors.UnsupportedOptimizerError,
        ("SparseAdam` has no update rule", "dense", "`sparse=False`"),
    ),
    "optimizer of several gradients in one step": (
        lambda: rule_of(torch.optim.LBFGS(make_model().parameters())),
        errors.UnsupportedOptimizerError,
        ("LBFGS` has no update rule", "moves the parameters several times", "max_iter=1"),
    ),
    "name of a rule": (
        lambda: rule_of(torch.optim.SGD(make_model().parameters()), "magic"),
        errors.UnsupportedOptimizerError,
        ("`rule='magic'`", "'elementwise'", "UpdateRule"),
    ),
    "subclass of a known optimizer": (
        lambda: recorder_of(model := make_model(), WrappedSGD(model.parameters(), lr=0.1)),
        errors.UnsupportedOptimizerError,
        ("WrappedSGD", "exact class", "UpdateRule"),
    ),
    "settings outside the rule": (
        lambda: recorder_of(make_model(), rule=OnlySmall()),
        errors.UnsupportedOptimizerError,
        ("lr=0.1 is too large", "linear in the gradients", "`rule=`"),
    ),
    "optimizer of another model": (
        lambda: recorder_of(make_model(), torch.optim.SGD(make_model().parameters(), lr=0.1)),
        errors.RecordingError,
        ("4 parameters that are not the model's, with shapes (5, 4)", "very same tensors", "model.parameters()"),
    ),
    "lazy parameters": (
        lambda: recorder_of(nn.Sequential(nn.LazyLinear(3))),
        errors.UnsupportedModelError,
        ("`0.weight` has no shape yet", "before anything is computed", "one batch through"),
    ),
    "complex parameters": (
        lambda: recorder_of(with_complex_parameter()),
        errors.UnsupportedModelError,
        ("`phase` is complex", "real parameters", "two real parameters"),
    ),
    "sparse gradients": (
        lambda: recorder_of(nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))),
        errors.UnsupportedModelError,
        ("`0` gives sparse gradients", "dense gradients", "`sparse=False`"),
    ),
    "unknown reduction": (
        lambda: recorder_of(make_model(), reduction="average"),
        errors.InputError,
        ("`reduction='average'`", '`"mean"` or `"sum"`', '`reduction="mean"`'),
    ),
    "restart after an unseen step": (
        restart_after_an_unseen_step,
        errors.RecordingError,
        ("between `close()` and `start()`", "memory must still be there", "new KernelRecorder"),
    ),
    "parameters added on the way that are not the model's": (
        step_with_new_parameters,
        errors.RecordingError,
        ("1 parameters that are not the model's, with shapes (7,)", "very same tensors", "model.parameters()"),
    ),
    "parameters added on the way that had changed": (
        step_with_changed_parameters,
        errors.RecordingError,
        ("`0.weight`, `0.bias` joined the optimizer and had changed", "a constant since", "new KernelRecorder"),
    ),
    "parameters that were put in the place of others on the way": (
        step_with_another_layer,
        errors.RecordingError,
        ("parameters `2.weight`, `2.bias` are not those that it had", "the same tensors", "without `assign=True`"),
    ),
    "other samples than announced in a channel": (
        other_samples_in_a_channel,
        errors.SampleIdError,
        ("in the channel `penalty`", "of the announced samples, as any other", "recorder.batch(ids, inputs=x)"),
    ),
    "gradients edited between the stages of a step": (
        edit_of_one_stage,
        errors.RecordingError,
        ("edited under the name `noise`", "one gradient in a step", "one stage"),
    ),
    "inference mode": (
        in_inference_mode,
        errors.InputError,
        ("inside `torch.inference_mode()`", "made of gradients", "`torch.no_grad()` is all right"),
    ),
    # recording: averages
    "an average of another model": (
        lambda: recorder_of(make_model(), averages={"ema": nn.Linear(4, 3).double()}),
        errors.RecordingError,
        ("The average 'ema' lacks `0.weight`", "parameter names", "AveragedModel"),
    ),
    "an average that is none": (
        average_that_is_none,
        errors.RecordingError,
        ("the average 'ema' did not move towards the weights", "one number a", "right after `optimizer.step()`"),
    ),
    # kernel machine: what is asked for
    "unknown form": (
        lambda: pk.KernelMachine(run().trajectory, form="dual"),
        errors.InputError,
        ("`form='dual'`", "'folded', 'average'", '`form="folded"`'),
    ),
    "unknown average": (
        lambda: pk.KernelMachine(run().trajectory, average="ema"),
        errors.InputError,
        ("`average='ema'`", "on record are none", "averages="),
    ),
    "chord of an average": (
        chord_of_an_average,
        errors.InputError,
        ('`form="chord"`', "last weights", "Leave out"),
    ),
    "unknown module": (
        lambda: machine().explain(X3, outputs="encoder"),
        errors.InputError,
        ("the module 'encoder'", "modules are '0', '1', '2'", "outputs="),
    ),
    "constant coefficients where the slope turns": (
        lambda: pk.KernelMachine(swinging(), form="constant").explain(X3),
        errors.InputError,
        ("slope of the loss of sample", "keeps its sign", '`form="average"`'),
    ),
    "outputs that are not one for each sample": (
        lambda: batch_outputs((torch.zeros(3, 2), torch.zeros(())), 3),
        errors.InputError,
        ("For 3 samples the model returned tensors of shapes (3, 2), ()", "along its first axis", "inside the loss"),
    ),
    "complex outputs": (
        lambda: batch_outputs(torch.zeros(3, 2, dtype=torch.complex64), 3),
        errors.InputError,
        ("returned complex numbers", "real outputs", "view_as_real"),
    ),
    "part of the returned that there is not": (
        lambda: selected({"logits": 0, "loss": 1}, "scores"),
        errors.InputError,
        ("the network returned a dict with 'logits', 'loss'", "names a part", "one of these parts"),
    ),
    "function of the returned that fails": (
        lambda: selected({"logits": 0}, lambda returned: returned["scores"]),
        errors.InputError,
        ("`returns=` failed", "picks the outputs", "returned.logits"),
    ),
    "outputs that are no part": (
        lambda: recorder_of(make_model(), returns=1.5),
        errors.InputError,
        ("`returns=1.5`", "a key or attribute", 'returns="logits"'),
    ),
    "task that is none": (
        lambda: recorder_of(make_model(), task="ranking"),
        errors.InputError,
        ("`task='ranking'`", "'regression'", 'task="classification"'),
    ),
    "probabilities without a loss": (
        lambda: pk.KernelMachine(record_without_a_loss()).predict_proba(X3),
        errors.InputError,
        ("`predict_proba` needs the loss", "Shares, predictions and path kernels", "loss=nn.CrossEntropyLoss()"),
    ),
    "recorder without data": (
        lambda: next(pk.KernelRecorder(model := make_model(), torch.optim.SGD(model.parameters()), CE).batches(2)),
        errors.InputError,
        ("`data` is not given", "pairs (input, target)", "data=(X_train, y_train)"),
    ),
    "gradient set by hand, and no loss": (
        step_by_hand,
        errors.SampleIdError,
        ("no backward pass came through the outputs", "the loop's own backward pass", "loss=loss"),
    ),
    "pass of samples that were not announced": (
        step_of_a_stranger,
        errors.SampleIdError,
        ("1 backward passes of samples that were not announced", "announced before it", "zero_grad"),
    ),
    "pass of another number of samples": (
        lambda: step_of_others([3, 4], [3]),
        errors.SampleIdError,
        ("2 samples were announced, and the forward pass", "one row of outputs", "`recorder.batch(ids)`"),
    ),
    "pass of more samples than one": (
        lambda: step_of_others([3], [3, 4]),
        errors.SampleIdError,
        ("at 6 of each were taken from the training pass", "as the recorder was given them", "inputs=x"),
    ),
    "network that draws from numpy's generator": (
        step_that_draws_from_numpy,
        errors.UnsupportedModelError,
        ("drew from", "torch's random generators, which alone is on record", "torch.rand"),
    ),
    "trial of wrong samples": (
        trial_of_wrong_samples,
        errors.UnsupportedModelError,
        ("The first step cannot be explained: At step 0", "The recorded gradient must be", "Check that ids"),
    ),
    "trial of a network that runs once": (
        trial_of_a_network_that_runs_once,
        errors.UnsupportedModelError,
        ("does not run again on its own samples (AttributeError", "is run again", "parameters and buffers alone"),
    ),
    "slopes that take too much room": (
        slopes_that_take_too_much_room,
        errors.RecordingError,
        ("8,388,608 bytes, for 2 samples of 1048576 outputs each", "no more than the parameters", 'loss="returned"'),
    ),
    "loss whose slopes are others": (
        loss_that_is_another,
        errors.TrajectoryError,
        ("The loss has other slopes", "up to a factor", "without a state of its own"),
    ),
    "loss that is returned no more": (
        loss_that_is_returned_no_more,
        errors.TrajectoryError,
        ("returned no loss with a gradient", 'With `loss="returned"`', "as a function of outputs"),
    ),
    "loss that is returned no more in a replay": (
        loss_that_is_returned_no_more_in_a_replay,
        errors.TrajectoryError,
        ("returned no loss when a step", 'With `loss="returned"`', "as a function of outputs"),
    ),
    "wrong ids of gradients that are small beside the largest": (
        machine_of_wrong_ids_with_small_gradients,
        errors.TrajectoryError,
        ("differences between the recorded gradients", "more than rounding", "audit_every=1"),
    ),
    "changes that nobody named": (
        changes_that_nobody_named,
        errors.TrajectoryError,
        ("a change of `2.weight`", "No more than 1.0%", "recorder.channel"),
    ),
    "a sum that is not the network's output": (
        heun_of_changed_data,
        errors.TrajectoryError,
        ("off those of the network at the end of the record", "its outputs to rounding", "audit_every=1"),
    ),
    # recording: training data
    "data of unequal lengths": (
        lambda: recorder_of(make_model(), data=(X3, torch.zeros(2))),
        errors.InputError,
        ("different lengths: [2, 3]", "one row for each training sample", "equal length"),
    ),
    "data that are neither arrays nor a dataset": (
        lambda: recorder_of(make_model(), data=X3),
        errors.InputError,
        ("`data` is a Tensor", "(input, target)", "`data=(X_train, y_train)`"),
    ),
    "no data": (
        lambda: recorder_of(make_model(), data=(X3[:0], X3[:0])),
        errors.InputError,
        ("holds no samples", "At least one", "X_train"),
    ),
    "data that are text": (
        lambda: as_tensors(np.array(["one", "two"]), torch.float64),
        errors.InputError,
        ("<U3", "Samples are numbers", "token ids"),
    ),
    # recording: sample ids
    "loader without ids": (
        lambda: next(Scene().recorder.track(DataLoader(Stream()))),
        errors.SampleIdError,
        ("DataLoader over a Stream", "places in `data`", "track(loader, ids=...)"),
    ),
    "loader without batches": (
        lambda: next(Scene().recorder.track(indexed(batch_size=None))),
        errors.SampleIdError,
        ("`batch_size=None`", "collated into batches", "recorder.batch(ids)"),
    ),
    "ids out of range": (
        lambda: Scene().recorder.batch([0, SAMPLES]),
        errors.SampleIdError,
        (f"[0, {SAMPLES}] (int64) were announced, from 0 to {SAMPLES}", f"from 0 to {SAMPLES - 1}", "positions"),
    ),
    "ids as words": (
        lambda: Scene().recorder.batch(["1", "2"]),
        errors.SampleIdError,
        ("Sample ids ['1', '2'] were announced", "integers from 0", "[int(i) for i in ids]"),
    ),
    "ids as long words": (
        lambda: Scene().recorder.batch(["a word of an article, and many others beside it"] * 8),
        errors.SampleIdError,
        ("Sample ids as a list were announced", "integers from 0", "[int(i) for i in ids]"),
    ),
    "ids without an order": (
        lambda: Scene().recorder.batch({1, 2}),
        errors.SampleIdError,
        ("Sample ids as a set were announced", "a list, an array or a tensor", "recorder.batch("),
    ),
    "ids on meta": (
        lambda: Scene().recorder.batch(torch.tensor([1, 2], device="meta")),
        errors.SampleIdError,
        ("on the device meta were announced", "a list, an array or a tensor", "recorder.batch("),
    ),
    "ids with a wrong number of weights": (
        lambda: Scene().recorder.batch([0, 1], weights=[1.0]),
        errors.SampleIdError,
        ("2 ids came with weights of shape (1,)", "one weight", "len(w) == len(ids)"),
    ),
    "ids with a wrong number of inputs": (
        lambda: Scene().recorder.batch([0, 1], inputs=X3),
        errors.SampleIdError,
        ("2 ids came with 3 inputs", "one to one", "`recorder.announce(ids, inputs=inputs)`"),
    ),
    "step without ids": (
        step_without_ids,
        errors.SampleIdError,
        ("number 1 came without sample ids", "which training samples", "recorder.batches("),
    ),
    "step with the ids of another batch": (
        step_with_wrong_ids,
        errors.SampleIdError,
        ("At step 1 the gradient differs from that of the announced samples by", "has not moved", "not shifted"),
    ),
    "gradient with NaN": (
        step_with_nan,
        errors.NonFiniteStepError,
        ("At step 1 the gradient of `2.bias` holds NaN or infinity; its samples are [3, 4]", "1 steps before", "skip"),
    ),
    # trajectories
    "path without steps": (
        lambda: pk.KernelMachine(empty()),
        errors.TrajectoryError,
        ("`KernelMachine` was given a trajectory with no steps", "at least one", "inside `with KernelRecorder"),
    ),
    "point beyond the path": (
        lambda: run().trajectory.parameters(3),
        errors.InputError,
        ("θ at step 3", "points 0 to 2", "`parameters(2)` for the trained network"),
    ),
    "model that has changed since": (
        changed_model,
        errors.ModelMismatchError,
        ("`PathKernel` found a model that is not the recorded one: `2.bias` differs by up to 0.5", "history", "load_s"),
    ),
    "samples that do not explain the gradient": (
        machine_of_wrong_ids,
        errors.TrajectoryError,
        ("At step 1 the samples on record explain the gradient only up to", "recorded samples", "`KernelRecorder(..."),
    ),
    # samples given to a kernel or a machine
    "a single sample": (
        lambda: pk.PathKernel(run().trajectory)(X3[0]),
        errors.InputError,
        ("a single sample of shape (4,), as KernelRidge", "whole arrays", 'KernelRidge(kernel="precomputed")'),
    ),
    "samples of another shape": (
        lambda: machine().predict(make_inputs(3, (5,))),
        errors.InputError,
        ("`KernelMachine` was given samples of shape (3, 5)", "(n, 4)", "shaped as in training"),
    ),
    "a kernel of losses without targets": (
        lambda: pk.PathKernel(run().trajectory, outputs="loss")(X3),
        errors.InputError,
        ("was given a Tensor", "needs its target", "`kernel((X, y))`"),
    ),
    # quadratures
    "a quadrature without fixed nodes": (
        lambda: pk.PathKernel(run().trajectory, quadrature="adaptive"),
        errors.InputError,
        ("`Adaptive(tolerance=1e-09)` chooses its points", "fixed nodes", 'quadrature="trapezoid"'),
    ),
    "a number of nodes": (
        lambda: pk.GaussLegendre(0),
        errors.InputError,
        ("`GaussLegendre(0)`", "from 1 to 64", "`GaussLegendre(4)`"),
    ),
    "a tolerance": (
        lambda: pk.Adaptive(1.0),
        errors.InputError,
        ("`Adaptive(1.0)`", "between 0 and 1", "`Adaptive(1e-9)`"),
    ),
    "the name of a quadrature": (
        lambda: as_quadrature("simpson"),
        errors.InputError,
        ("`quadrature='simpson'`", "'trapezoid'", "GaussLegendre(4)"),
    ),
    # options of kernels and machines
    "a precision that cannot be refined": (
        lambda: pk.KernelMachine(run().trajectory, quadrature=pk.Adaptive(), dtype=torch.float32),
        errors.InputError,
        ("was asked to work in torch.float32", "needs torch.float64", "`DiscreteGradient()`"),
    ),
    "a network that diverged": (
        diverged,
        errors.TrajectoryError,
        ("training diverged. Step 0 moved", "no sum of finite shares", "with smaller steps: before step 0"),
    ),
    "a loss that is no tensor": (
        lambda: batch_loss(lambda outputs, targets: 1.0, torch.ones(2, 1), torch.ones(2, 1), None, "mean"),  # type: ignore[arg-type,return-value]
        errors.InputError,
        ("returned a float", "gradients can be taken of", "`.item()`"),
    ),
    "a leapfrog step without length": (
        lambda: leapfrog(time_step=0.0, friction=1.0),
        errors.InputError,
        ("time_step=0.0", "is above 0", "leapfrog(time_step=0.1"),
    ),
    "a leapfrog step that is too long": (
        lambda: leapfrog(time_step=1.0, friction=4.0),
        errors.InputError,
        ("friction=4.0", "2 or less", "0.5 or less"),
    ),
    "a machine that rounds more than training": (
        lambda: pk.KernelMachine(run().trajectory, dtype=torch.bfloat16),
        errors.InputError,
        ("steps in torch.float64 was asked to work in torch.bfloat16", "not rounded so coarsely", "Leave `dtype` out"),
    ),
    "a machine in TensorFloat-32": (
        lambda: pk.KernelMachine(run().trajectory, dtype="tf32"),
        errors.InputError,
        ("asked to work in 'tf32'", "not rounded more coarsely", "Leave `dtype` out"),
    ),
    "probabilities of a regressor": (
        lambda: pk.KernelMachine(record(loss="mse_mean").trajectory).predict_proba(X3),
        errors.InputError,
        ("trained with MSELoss", "CrossEntropyLoss", "decision_function"),
    ),
    "an unknown split": (
        lambda: machine().explain(X3, by="layer"),
        errors.InputError,
        ("`by='layer'`", '"module" or by "step"', 'by="module"'),
    ),
    "something else to verify": (
        lambda: machine().explain(X3, verify="channels"),
        errors.InputError,
        ("`verify='channels'`", '"shares"', 'verify="shares"'),
    ),
    "an output that is not there": (
        lambda: machine().explain(X3, outputs=3),
        errors.InputError,
        ("`outputs=3` was given for 3 samples of a network with 3 outputs", "an output index", "outputs=0"),
    ),
    "an output that a kernel's network does not have": (
        lambda: pk.PathKernel(run().trajectory, outputs=7),
        errors.InputError,
        ("`outputs=7` was given for a network with 3 outputs", "from 0 to 2, or from -3 to -1", "outputs=0"),
    ),
    "a class in place of a loss": (
        lambda: Scene(loss=nn.CrossEntropyLoss),
        errors.InputError,
        ("`loss` is the class CrossEntropyLoss", "an instance of a module, or a function", "loss=CrossEntropyLoss()"),
    ),
    "no queries of a machine": (
        lambda: machine().explain(X3[:0]),
        errors.InputError,
        ("`KernelMachine` was given no samples", "One sample or more", "Leave the call out"),
    ),
    "no samples of an operator": (
        lambda: pk.TangentKernel(make_model()).operator(X3[:0]),
        errors.InputError,
        ("`TangentKernel` was given no samples", "the kernel matrix alone may be empty", "Leave the call out"),
    ),
    "features of no samples": (
        lambda: pk.PathKernel(run().trajectory).features(X3[:0]),
        errors.InputError,
        ("`PathKernel` was given no samples", "One sample or more", "Leave the call out"),
    ),
    "a sparse matrix": (
        lambda: pk.TangentKernel(make_model())(scipy.sparse.csr_matrix(X3.numpy())),
        errors.InputError,
        ("a sparse csr_matrix of shape (3, 4)", "dense arrays", "`X.toarray()`"),
    ),
    "complex numbers": (
        lambda: pk.TangentKernel(make_model())(X3 + 0j),
        errors.InputError,
        ("Samples of type torch.complex128", "Samples are numbers", "X.astype(float)"),
    ),
    "text in an array": (
        lambda: pk.TangentKernel(make_model())(np.array([["a", "b"]], dtype=object)),
        errors.InputError,
        ("Samples of type object", "Samples are numbers", "X.astype(float)"),
    ),
    "a masked array": (
        lambda: pk.TangentKernel(make_model())(np.ma.masked_less(X3.numpy(), 0)),
        errors.InputError,
        ("a masked array with entries that are masked", "takes every entry", "X.filled(value)"),
    ),
    "rows of unequal length": (
        lambda: pk.TangentKernel(make_model())([[1.0, 2.0], [3.0]]),
        errors.InputError,
        ("a list that is no array", "rows of the same length", "one row for each sample"),
    ),
    "arrays of unequal length": (
        lambda: pk.TangentKernel(make_model())((X3, X3[:2])),
        errors.InputError,
        ("arrays of shape (3, 4), (2, 4)", "one row for each sample", "X[None]"),
    ),
    "samples of another width": (
        lambda: pk.TangentKernel(make_model())(X3[:, :3]),
        errors.InputError,
        (
            "samples of shape (3, 3) float64, and the network fails in `Linear(in_features=4",
            "samples of shape (n, …, 4)",
            "shaped as the network takes them",
        ),
    ),
    "one sample of a tangent kernel": (
        lambda: pk.TangentKernel(make_model())(X3[0]),
        errors.InputError,
        ("with a single sample of shape (4,)", "Tangent kernels take whole arrays", "PathKernelTransformer(kernel)"),
    ),
    "features of one sample of a path kernel": (
        lambda: pk.PathKernel(run().trajectory).features(X3[0], 8),
        errors.InputError,
        ("a single sample of shape (4,)", "Path kernels take whole arrays", "pass `X[None]`"),
    ),
    "features of one sample of a tangent kernel": (
        lambda: pk.TangentKernel(make_model()).features(X3[0], 8),
        errors.InputError,
        ("a single sample of shape (4,)", "Tangent kernels take whole arrays", "pass `X[None]`"),
    ),
    "features of one sample of a repaired kernel": (
        lambda: pk.kernels.RepairedKernel(sigmoid_kernel, X3.numpy()).features(X3[0].numpy()),
        errors.InputError,
        ("a single sample of shape (4,)", "Kernels take whole arrays", "pass `X[None]`"),
    ),
    "NaN in a query": (
        lambda: machine().predict(torch.cat([X3, X3 * torch.nan])),
        errors.InputError,
        ("samples with NaN or infinite numbers: row 3 and 2 more", "finite", "SimpleImputer"),
    ),
    "NaN in a target": (
        lambda: pk.TangentKernel(make_model(), outputs="loss", loss=nn.MSELoss())((X3, X3[:, :3] * torch.nan)),
        errors.InputError,
        ("targets with NaN or infinite numbers: row 0 and 2 more", "finite", "leave these rows out"),
    ),
    "fractions for token ids": (
        lambda: pk.TangentKernel(nn.Sequential(nn.Embedding(9, 2), nn.Flatten()))(np.array([[1.0, 2.0], [1.5, 2.0]])),
        errors.InputError,
        ("numbers with a fraction", "token ids", "X.astype(int)"),
    ),
    "fractions where training had integers": (
        lambda: embedded(make_inputs(3)),
        errors.InputError,
        ("float64 numbers that are no integers", "was trained on integers", "whole numbers do"),
    ),
    "a stream of samples": (
        lambda: Scene(data=Stream()),
        errors.InputError,
        ("a Stream, which has no length", "ids from 0 to N - 1", "a map-style dataset"),
    ),
    "items that are dicts": (
        lambda: next(Scene(data=Records(), steps=0).recorder.batches(2)),
        errors.InputError,
        ("a Records whose items are a dict with the keys 'x', 'y'", "pairs (input, target)", "(item_without_label"),
    ),
    "outputs of a kernel": (
        lambda: pk.TangentKernel(make_model(), outputs="all"),
        errors.InputError,
        ("`outputs='all'`", '"trace"', 'outputs="trace"'),
    ),
    "an engine": (
        lambda: pk.TangentKernel(make_model(), engine="quantum"),
        errors.InputError,
        ("`engine='quantum'`", "'jacobian'", 'engine="auto"'),
    ),
    "a vector of the wrong length": (
        lambda: pk.TangentKernel(make_model())(X3) is None or pk.TangentKernel(make_model()).matvec(X3, np.ones(2)),
        errors.InputError,
        ("3 samples and a vector of shape (2,)", "one entry for each row", "shape (n,)"),
    ),
    "parameters of another model": (
        lambda: pk.TangentKernel(make_model(), {"0.weight": torch.zeros(2, 2), "head": torch.zeros(1)}),
        errors.ModelMismatchError,
        ("`0.weight` (2, 2), `head` (1,)", "Names and shapes", "trajectory.parameters(s)"),
    ),
    "nothing to differentiate in": (
        lambda: pk.TangentKernel(make_model().requires_grad_(False)),
        errors.InputError,
        ("no trainable parameters", "gradients in the parameters", "requires_grad_(True)"),
    ),
    "a budget of memory": (
        lambda: memory_bytes("much"),
        errors.InputError,
        ("`memory='much'`", "MiB", '`memory="512MB"`'),
    ),
    "a measure": (
        lambda: pk.PathKernel(run().trajectory, measure="time"),
        errors.InputError,
        ("`measure='time'`", "'arc_length'", 'measure="learning_rate"'),
    ),
    "a preconditioner": (
        lambda: pk.PathKernel(run().trajectory, preconditioner="fisher"),
        errors.InputError,
        ("`preconditioner='fisher'`", '"optimizer"', 'preconditioner="optimizer"'),
    ),
    "a preconditioner that is no diagonal": (
        lambda: pk.PathKernel(record(rule=NotDiagonal()).trajectory, preconditioner="optimizer"),
        errors.InputError,
        ("was asked of Whitening", "positive diagonal", "preconditioner=None"),
    ),
    "a tolerance and a number of steps": (
        lambda: pk.PathKernel(run().trajectory, steps=2, tolerance=1e-3),
        errors.InputError,
        ("`tolerance=0.001` was given together with `steps`", "chooses the steps itself", "tolerance=0.001"),
    ),
    "a tolerance beyond all bounds": (
        lambda: pk.PathKernel(run().trajectory, tolerance=2.0),
        errors.InputError,
        ("`tolerance=2.0`", "between 0 and 1", "tolerance=1e-3"),
    ),
    "a tolerance with one training sample": (
        lambda: pk.PathKernel(one_sample(), tolerance=1e-3),
        errors.InputError,
        ("one training sample", "measured on others", "Leave out `tolerance`"),
    ),
    "products with a sketched kernel": (
        lambda: pk.PathKernel(run().trajectory, engine=pk.Projection(16)).operator(X3),
        errors.InputError,
        ("sketched gradients", "no more than φ", "phi @ (phi.T @ v)"),
    ),
    "the engine of a machine": (
        lambda: pk.KernelMachine(run().trajectory, engine="warp"),
        errors.InputError,
        ("`engine='warp'`", "'layerwise'", 'engine="auto"'),
    ),
    "a form that is not kept in a store": (
        lambda: pk.KernelMachine(run().trajectory, form="ensemble").explain(X3, store="nowhere"),
        errors.InputError,
        ('in the form "ensemble"', "shares, channels and the certificate", 'form="folded"'),
    ),
    "a budget for shares": (
        lambda: pk.KernelMachine(run().trajectory, memory=1).explain(X3),
        errors.InputError,
        ("One query and the least part of a batch take", "kept, not exceeded in silence", 'Write `memory="0.'),
    ),
    "a budget for predictions": (
        lambda: pk.KernelMachine(run().trajectory, memory=1).predict(X3),
        errors.InputError,
        ("the budget is 1e-06 MB", "A budget has to hold at least these", 'MB"` or more'),
    ),
    "averages and a thinned path": (
        lambda: Scene(schedule=pk.Every(4), averages={"ema": make_model()}),
        errors.RecordingError,
        ("`averages` were given", "from θ at every step", "leave out `averages`"),
    ),
    "keyframes in a store that is gone on with": (
        lambda: gone_on_with(pk.Schedule(keyframes=4)),
        errors.StoreError,
        ("with `Every()`, and `schedule=Keyframes(4)` was given", "goes on as it began", "schedule=Every()"),
    ),
    "two recorders on one store": (
        two_on_one_store,
        errors.StoreError,
        ("KernelRecorder that was started", "one writer", "another path"),
    ),
    "a path without length": (
        lambda: pk.PathKernel(no_learning_rate()),
        errors.InputError,
        ("no length by `measure='learning_rate'`", "positive weight", 'measure="uniform"'),
    ),
    "a number of steps": (
        lambda: pk.PathKernel(run().trajectory, steps=0),
        errors.InputError,
        ("`steps=0`", "from 1 to 2", "steps=50"),
    ),
    # results
    "more proponents than samples": (
        lambda: attributions().top(6),
        errors.InputError,
        ("`top(6)` was asked of 5 training samples", "between 1 and 5", "`top(5)`"),
    ),
    "labels of other samples": (
        lambda: attributions().by_class(np.zeros(4)),
        errors.InputError,
        ("Labels of shape (4,)", "each of the 5 training samples", "by_class(y_train)"),
    ),
}


REFUSALS |= OUTSIDE | MODELS | OF_OPTIMIZERS | CALLS | INFLUENCE


@functools.cache
def refuse(name: str) -> tuple[errors.PathKernelError, tuple[str, int]]:
    """The error of a row, which is tried once, and the file and line that it was raised from."""
    act, kind, _ = REFUSALS[name]
    with pytest.raises(errors.PathKernelError) as caught:
        act()
    assert type(caught.value) is kind
    frames = []
    trace: TracebackType | None = caught.tb
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and path.name != "errors.py":
            frames.append((path.relative_to(PACKAGE).as_posix(), trace.tb_lineno))
        trace = trace.tb_next
    return caught.value.with_traceback(None), frames[-1]  # or all that the frames hold would be kept


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_has_three_parts(name: str) -> None:
    error, _ = refuse(name)
    found, expected, write = REFUSALS[name][2]
    assert found in error.found
    assert expected in error.expected
    assert write in error.write
    assert str(error) == f"{error.found}. {error.expected}. {error.write}."
    assert not any(part.endswith(".") for part in (error.found, error.expected, error.write))


def sites() -> set[tuple[str, int, int]]:
    """Where the package refuses: file, first and last line of each `raise X(…)` and each `check(…)`."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if any(name == place or name.startswith(f"{place}/") for place in ELSEWHERE):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            # Python and torch ask for these two, and take them for an answer.
            asked_for = call.func.id in ("AttributeError", "NotImplementedError")
            refuses = isinstance(node, ast.Raise) and not asked_for
            if refuses or call.func.id == "check":
                found.add((name, call.lineno, call.end_lineno or call.lineno))
    return found


def test_every_refusal_is_tested() -> None:
    written = sites()
    assert len(written) > 40
    reached = {refuse(name)[1] for name in REFUSALS}
    untested = [
        f"{file}:{first}"
        for file, first, last in sorted(written)
        if not any(where == file and first <= line <= last for where, line in reached)
    ]
    assert not untested, f"no row of REFUSALS reaches {', '.join(untested)}"


# -- refusing changes nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [-1, 0],
        [0, SAMPLES],
        [[[0, 1]]],
        [0.0, 1.0],
        [True, False],
        torch.tensor(3),
        torch.tensor([0.5]),
        list(range(20)),
    ],
    ids=str,
)
def test_ids_that_are_none(ids) -> None:
    scene = Scene()
    error = scene.refused(lambda: scene.recorder.batch(ids))
    assert isinstance(error, errors.SampleIdError)
    assert "Ids are a list of integers from 0 to 9" in error.expected
    scene.goes_on()


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam", "adamw"])
def test_wrong_ids_are_found_before_the_optimizer_moves(optimizer: str) -> None:
    scene = Scene(optimizer, steps=2)
    told = ("At step 2 the gradient differs", "the forward pass after it was of others", "6 of each were taken")
    for words, announced, used in zip(told, ([3, 4, 5], [3, 4], [3]), ([4, 5, 6], [3], [3, 4]), strict=True):
        scene.recorder.batch(announced)
        scene.gradient(used)
        error = scene.refused(scene.optimizer.step)
        assert isinstance(error, errors.SampleIdError)
        assert words in error.found
    scene.goes_on()


def test_by_default_the_first_steps_and_ever_fewer_later_ones_are_audited() -> None:
    scene = Scene(audit_every=None, steps=0)
    found = []
    for index in range(9):
        before = scene.state()
        scene.recorder.batch([3, 4])
        scene.gradient([5, 6])
        try:
            scene.optimizer.step()
        except errors.SampleIdError:
            found.append(index)
            assert all(torch.equal(a, b) for a, b in zip(before, scene.state(), strict=True))
            scene.step([3, 4])
    assert found == [0, 1, 2, 4, 8]


@pytest.mark.parametrize(
    "change",
    [
        lambda scene: scene.model[0].weight.grad.add_(0.01),
        lambda scene: (0.05 * sum(p.square().sum() for p in scene.model.parameters())).backward(),
        lambda scene: scene.model[2].bias.grad.zero_(),
    ],
    ids=["noise", "a penalty outside the loss", "an edit"],
)
def test_gradients_that_the_samples_do_not_explain(change) -> None:
    scene = Scene("momentum")
    scene.recorder.batch([3, 4])
    scene.gradient([3, 4])
    change(scene)
    assert "`regularizers=`" in scene.refused(scene.optimizer.step).write
    scene.goes_on()


def test_a_loss_that_is_not_that_of_the_loop() -> None:
    """The loop's own slopes are on record, so it may be another one; where no pass was seen it is refused."""
    scene = Scene(steps=0, loss=nn.CrossEntropyLoss(label_smoothing=0.3))
    scene.loss = CE
    scene.step([3, 4])
    scene.recorder.batch([3, 4])
    scene.optimizer.zero_grad()
    CE(scene.model.forward(scene.X[3:5]), scene.y[3:5]).backward()
    error = scene.refused(scene.optimizer.step)
    assert isinstance(error, errors.SampleIdError)
    assert "No forward pass of the watched Sequential was seen for 1 of 1 batches" in error.found
    scene.goes_on()


def test_a_step_without_ids_moves_nothing() -> None:
    scene = Scene()
    scene.gradient([3])
    scene.refused(scene.optimizer.step)
    scene.goes_on()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    scene = Scene("adam", steps=3)
    scene.recorder.batch([3, 4])
    scene.gradient([3, 4])
    scene.model[0].weight.grad[0, 0] = bad
    error = scene.refused(scene.optimizer.step)
    assert "`0.weight`" in error.found and "[3, 4]" in error.found and "the 3 steps before stay valid" in error.expected
    scene.goes_on()


def test_a_recorder_that_was_refused_leaves_no_hooks() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(errors.InputError):
        recorder_of(model, optimizer, reduction="average")
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize("make", [pk.KernelMachine, pk.PathKernel])
def test_a_model_that_is_not_the_recorded_one(make) -> None:
    recording = run()
    good = {name: value.clone() for name, value in recording.model.state_dict().items()}
    with torch.no_grad():
        recording.model[0].weight.add_(0.25)
        recording.model[2] = nn.Linear(5, 2).double()
    with pytest.raises(errors.ModelMismatchError) as caught:
        make(recording.trajectory)
    for part in ("`0.weight` differs by up to 0.25", "`2.weight` has shape (2, 5), not (3, 5)"):
        assert part in caught.value.found
    recording.model[2] = nn.Identity()
    with pytest.raises(errors.ModelMismatchError, match=r"`2\.weight` is missing"):
        make(recording.trajectory)
    recording.model[2] = nn.Linear(5, 3).double()
    recording.model.load_state_dict(good)
    make(recording.trajectory)


def test_what_is_not_trained_must_not_change_either() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    model.register_buffer("mask", torch.tensor([True, False]))
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    data = make_inputs(4), torch.tensor([0, 1, 2, 0])
    with pk.KernelRecorder(model, optimizer, CE, data=data) as recorder:
        for x, y in recorder.batches(batch_size=2):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    pk.KernelMachine(recorder.trajectory)
    with torch.no_grad():
        model[0].bias.add_(1.0)
        model.mask[1] = True
    with pytest.raises(errors.ModelMismatchError, match=r"`0.bias` differs by up to 1; `mask` differs by up to 1"):
        pk.KernelMachine(recorder.trajectory)
    model.load_state_dict({**recorder.trajectory.constants, **recorder.trajectory.parameters(-1)}, strict=False)
    pk.KernelMachine(recorder.trajectory)


@pytest.mark.parametrize("make", [pk.KernelMachine, pk.PathKernel])
def test_an_empty_path(make) -> None:
    with pytest.raises(errors.TrajectoryError, match=f"`{make.__name__}` was given a trajectory with no steps"):
        make(empty())


def test_inference_mode_is_named() -> None:
    """Whatever is asked, and whenever what is asked was made."""
    trajectory, X = run().trajectory, make_inputs(4)
    machine, kernel = pk.KernelMachine(trajectory), pk.PathKernel(trajectory)
    asked: list[Callable[[], Any]] = [
        lambda: pk.KernelMachine(trajectory),
        lambda: pk.PathKernel(trajectory),
        lambda: pk.TangentKernel(trajectory.model),
        lambda: machine.explain(X),
        lambda: machine.explain(X, outputs="0"),
        lambda: machine.decision_function(X),
        lambda: kernel(X, X),
    ]
    for ask in asked:
        with pytest.raises(errors.InputError, match=r"inside `torch\.inference_mode"), torch.inference_mode():
            ask()
    with torch.no_grad():
        assert machine.explain(X).residual.shape == (4,)


def test_kernel_ridge_that_calls_pair_by_pair_is_told_of_the_pipeline() -> None:
    kernel = pk.PathKernel(run().trajectory)
    X = make_inputs(4).numpy()
    with pytest.raises(errors.InputError, match="PathKernelTransformer") as caught:
        KernelRidge(kernel=kernel).fit(X, X[:, 0])
    assert "single sample of shape (4,)" in caught.value.found


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 1), ()], ids=str)
def test_queries_of_another_shape(shape: tuple[int, ...]) -> None:
    X = torch.zeros(shape)
    recording = run()
    for call in (
        pk.PathKernel(recording.trajectory),
        pk.PathKernel(recording.trajectory).diagonal,
        pk.KernelMachine(recording.trajectory).decision_function,
        pk.KernelMachine(recording.trajectory).explain,
    ):
        with pytest.raises(errors.InputError, match=r"on samples of shape \(n, 4\)"):
            call(X)


@pytest.mark.parametrize("outputs", [1.5, True, [0, 1], [[0, 1, 2]], [0, 1, 3], -4, slice(2)], ids=str)
def test_outputs_that_are_none(outputs) -> None:
    with pytest.raises(errors.InputError, match="an output index"):
        machine().explain(X3, outputs=outputs)


@pytest.mark.parametrize("outputs", [None, 1.5, True, "all", "loss"], ids=str)
def test_outputs_of_a_kernel_that_are_none(outputs) -> None:
    with pytest.raises(errors.InputError, match="a callable of one sample's outputs"):
        pk.TangentKernel(make_model(), outputs=outputs)


@pytest.mark.parametrize("memory", [0, -1, "", "-1GB", "0MB", "12", "1 parsec", "GB"], ids=repr)
def test_budgets_that_are_none(memory) -> None:
    with pytest.raises(errors.InputError, match="positive number of bytes"):
        memory_bytes(memory)


@pytest.mark.parametrize("n", [0, -1, 65, 2.5, "4"], ids=repr)
def test_numbers_of_nodes_that_are_none(n) -> None:
    with pytest.raises(errors.InputError, match="from 1 to 64"):
        pk.GaussLegendre(n)


@pytest.mark.parametrize("steps", [0, -3, 1.5], ids=repr)
def test_numbers_of_steps_that_are_none(steps) -> None:
    with pytest.raises(errors.InputError, match="an integer from 1 to 2"):
        pk.PathKernel(run().trajectory, steps=steps)


def test_a_discrete_gradient_has_no_fixed_nodes_either() -> None:
    with pytest.raises(errors.InputError, match="chooses its points for each query"):
        pk.PathKernel(run().trajectory, quadrature=pk.DiscreteGradient())


def test_reductions_that_are_known() -> None:
    assert check_reduction("mean") == "mean" and check_reduction("sum") == "sum"


def test_errors_can_be_caught_and_sent_between_processes() -> None:
    error = errors.SampleIdError("found", "expected", "write")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.SampleIdError and str(again) == "found. expected. write."
    assert isinstance(error, ValueError) and isinstance(error, errors.RecordingError)
