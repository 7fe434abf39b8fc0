"""Several optimizers on one network: one trajectory, exact in total and in its split."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from several import (
    BATCH,
    CE,
    QUERIES,
    SAMPLES,
    Step,
    X,
    Y,
    adafactor_and_sgd,
    all_step,
    at_other_rates,
    body_and_head,
    by_closures,
    clipped_apart,
    clipped_together,
    complete,
    muon_and_adamw,
    network,
    one_after_the_other,
    scaled,
    three,
    train,
    two_rates,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import pathkernel as pk
from pathkernel import errors
from pathkernel.update_rules.joint import JointRule

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # of one that does not step at first

RUNS = [
    (muon_and_adamw, all_step),
    (three, one_after_the_other),
    (body_and_head, clipped_together),
    (two_rates, clipped_apart),
    (body_and_head, at_other_rates),
    (three, by_closures),
    (muon_and_adamw, scaled),
    (adafactor_and_sgd, all_step),
]


@pytest.mark.parametrize(("make", "loop"), RUNS)
def test_the_machine_is_exact_and_training_is_as_without(make: Callable[[Any], Any], loop: Step) -> None:
    model, trajectory = train(make, loop)
    alone, _ = train(make, loop, recorded=False)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trajectory is not None
    complete(trajectory)


def test_steps_that_use_one_backward_pass_are_one() -> None:
    _, trajectory = train(muon_and_adamw)
    assert trajectory is not None
    assert len(trajectory) == 6
    assert all(step.active == set(trajectory.layout.names) for step in trajectory.steps())
    assert trajectory.rule.name == "Muon and AdamW"
    assert trajectory.rule.memory == ("momentum_buffer or exp_avg",)
    assert [group["lr"] for group in trajectory.store.read(0).hyperparameters] == [0.02, 3e-3]
    assert [group["lr"] for group in trajectory.store.read(1).hyperparameters] == [0.02 * 0.9, 3e-3 * 0.8]


def test_optimizers_of_one_rule_have_that_rule() -> None:
    _, trajectory = train(two_rates, epochs=1)
    assert trajectory is not None
    assert not isinstance(trajectory.rule, JointRule)
    assert trajectory.rule.name == "AdamW"


def test_several_optimizers_are_as_one_with_all_their_groups() -> None:
    """Every number of the explanation, where one optimizer with two groups does the same."""

    def groups(model: Any) -> list[dict[str, Any]]:
        own = ((model[:3], 1e-3), (model[3], 1e-2))
        return [{"params": list(part.parameters()), "lr": rate} for part, rate in own]

    def explained(make: Callable[[Any], list[Optimizer]]) -> pk.Attributions:
        _, trajectory = train(make, slower=0.0)
        assert trajectory is not None
        return pk.KernelMachine(trajectory).explain(QUERIES)

    two = explained(lambda model: [SGD([group], momentum=0.9, lr=1.0) for group in groups(model)])
    one = explained(lambda model: [SGD(groups(model), momentum=0.9, lr=1.0)])
    np.testing.assert_array_equal(two.shares, one.shares)
    np.testing.assert_array_equal(two.residual, one.residual)


# -- at other rates ----------------------------------------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Two small networks in one module, each with an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = nn.Linear(5, 2).double(), nn.Linear(5, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.actor(x), self.critic(x)], 1)


def actor_critic(every: int, *, one_pass: bool) -> tuple[ActorCritic, pk.Trajectory, list[tuple[str, Tensor, float]]]:
    """The critic steps with each batch, the actor every other; what each of the steps was taken with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = ActorCritic()
    slow, fast = SGD(model.actor.parameters(), lr=0.05), SGD(model.critic.parameters(), lr=0.2, momentum=0.5)
    taken: list[tuple[str, Tensor, float]] = []
    goal = X.sum(1, keepdim=True)
    with pk.KernelRecorder(model, [slow, fast], data=(X, goal), task="regression", audit_every=1) as recorder:
        for k, ids in enumerate(torch.arange(SAMPLES).split(BATCH)):
            x, target = recorder.announce(ids)
            out = model(x)
            fast.zero_grad()
            (out[:, 2:] - target).square().mean().backward(retain_graph=True)
            fast.step()
            taken.append(("critic", ids, 0.2))
            if k % every == 0:
                if not one_pass:
                    out = model(x)
                slow.zero_grad()
                (out[:, :2] * target).tanh().mean().backward()
                slow.step()
                taken.append(("actor", ids, 0.05))
    return model, recorder.trajectory, taken


@pytest.mark.parametrize("one_pass", [True, False])
def test_shares_of_an_actor_and_its_critic_are_those_of_autograd(one_pass: bool) -> None:
    """Linear networks: a query moves by ⟨∇z(x), Δ⟩, and Δ is a sum of samples' gradients, unrolled by hand."""
    model, trajectory, taken = actor_critic(2, one_pass=one_pass)
    assert [("critic" if "critic.weight" in step.active else "actor") for step in trajectory.steps()] == [
        name for name, _, _ in taken
    ]
    for step, (name, _, _) in zip(trajectory.steps(), taken, strict=True):
        slow, fast = (group["lr"] for group in step.hyperparameters)
        assert (slow == 0) == (name == "critic")
        assert (fast == 0) == (name == "actor")
    expected = np.zeros((len(QUERIES), 3, SAMPLES))
    theta = {name: value.clone() for name, value in trajectory.parameters(0).items()}
    momentum = {i: [torch.zeros_like(theta[f"critic.{n}"]) for n in ("weight", "bias")] for i in range(SAMPLES)}
    goal = X.sum(1, keepdim=True)
    for name, ids, rate in taken:
        outputs, own = (slice(0, 2), []) if name == "actor" else (slice(2, 3), momentum)
        at = [theta[f"{name}.{n}"].clone().requires_grad_() for n in ("weight", "bias")]
        moves = {}
        for i in range(SAMPLES):
            z = X[i] @ at[0].T + at[1]
            error = (z - goal[i]).square() if name == "critic" else (z * goal[i]).tanh()
            loss = error.sum() / (len(ids) * error.numel()) * (i in ids)
            moves[i] = list(torch.autograd.grad(loss, at))
            if own:
                momentum[i] = moves[i] = [0.5 * m + g for m, g in zip(momentum[i], moves[i], strict=True)]
            expected[:, outputs, i] -= rate * (QUERIES @ moves[i][0].T + moves[i][1]).numpy()
        for n, moved in zip(("weight", "bias"), zip(*moves.values(), strict=True), strict=True):
            theta[f"{name}.{n}"] -= rate * torch.stack(moved).sum(0)
    for name, value in model.named_parameters():
        torch.testing.assert_close(theta[name], value.detach(), rtol=1e-12, atol=1e-12)
    for output in range(3):
        why = pk.KernelMachine(trajectory).explain(QUERIES, outputs=output)
        np.testing.assert_allclose(why.shares, expected[:, output], atol=1e-12)
        assert why.split_error <= 1e-10


def test_each_optimizer_steps_once_by_an_announcement() -> None:
    model = network()
    body, head = body_and_head(model)
    with pk.KernelRecorder(model, [body, head], CE, data=(X, Y), audit_every=0) as recorder:
        x, y = recorder.announce(torch.arange(8))
        for optimizer in (body, head):
            CE(model(x), y).backward()
            optimizer.step()
        CE(model(x), y).backward()
        with pytest.raises(errors.SampleIdError, match="number 2 came without sample ids"):
            body.step()
    assert len(recorder.trajectory) == 2


class Trunk(nn.Module):
    """A policy and a value on one trunk, which the policy's optimizer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        return torch.cat([self.policy(hidden), self.value(hidden)], 1)


@pytest.mark.parametrize("cleared", [True, False])
def test_what_another_loss_left_in_the_gradients_is_cleared_or_refused(cleared: bool) -> None:
    """The value's loss flows into the trunk, whose optimizer has its turn after the value's has moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Trunk().double()
    fast = SGD(model.value.parameters(), lr=0.1, momentum=0.9)
    slow = AdamW([*model.trunk.parameters(), *model.policy.parameters()], lr=0.01)
    goal = X.sum(1, keepdim=True)

    def run() -> pk.Trajectory:
        with pk.KernelRecorder(model, [fast, slow], data=(X, goal), task="regression", audit_every=1) as recorder:
            for x, target in recorder.batches(BATCH):
                fast.zero_grad()
                (model(x)[:, 2:] - target).square().mean().backward()
                fast.step()
                if cleared:
                    slow.zero_grad()
                (model(x)[:, :2] * target).mean().backward()
                slow.step()
        return recorder.trajectory

    if cleared:
        trajectory = run()
        assert [len(step.active) for step in trajectory.steps()] == [2, 4] * 3
        complete(trajectory)
    else:
        with pytest.raises(errors.SampleIdError, match=r"At step 1 .*clear what earlier passes left.*not moved"):
            run()


def test_one_that_never_steps_is_inactive() -> None:
    model = network()
    still, moving = SGD(model[0].parameters(), lr=0.1), Adam(model[1:].parameters(), lr=0.01)
    with pk.KernelRecorder(model, [still, moving], CE, data=(X, Y), audit_every=1) as recorder:
        for x, y in recorder.batches(BATCH):
            model.zero_grad()
            CE(model(x), y).backward()
            moving.step()
    trajectory = recorder.trajectory
    assert len(trajectory) == 3
    assert all(not {"0.weight", "0.bias"} & step.active for step in trajectory.steps())
    assert all(step.gradient[trajectory.layout.slices["0.weight"]].abs().max() == 0 for step in trajectory.steps())
    complete(trajectory)


# -- within the backward pass -----------------------------------------------------------------------------------------


def in_backward(recorded: bool, wrong: int = 0) -> tuple[nn.Module, pk.Trajectory | None]:
    model = network()
    each = {p: AdamW([p], lr=1e-2) for p in model.parameters()}

    def step(p: nn.Parameter) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in each:
        p.register_post_accumulate_grad_hook(step)
    if not recorded:
        for ids in torch.arange(2 * SAMPLES).split(BATCH):
            CE(model(X[ids % SAMPLES]), Y[ids % SAMPLES]).backward()
        return model, None
    with pk.KernelRecorder(model, list(each.values()), CE, data=(X, Y), audit_every=1) as recorder:
        for ids in torch.arange(2 * SAMPLES).split(BATCH):
            recorder.announce((ids + wrong) % SAMPLES)
            CE(model(X[ids % SAMPLES]), Y[ids % SAMPLES]).backward()
    return model, recorder.trajectory


def test_an_optimizer_for_each_parameter_that_steps_in_backward() -> None:
    model, trajectory = in_backward(True)
    alone, _ = in_backward(False)
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trajectory is not None
    assert [len(step.active) for step in trajectory.steps()] == [6] * 6
    assert trajectory.rule.name == "AdamW"
    complete(trajectory)


def test_wrong_ids_are_noticed_at_the_end_of_the_backward_pass() -> None:
    with pytest.raises(errors.SampleIdError, match="moved already"):
        in_backward(True, wrong=1)


# -- audits ------------------------------------------------------------------------------------------------------------


def test_wrong_ids_are_refused_before_any_optimizer_has_moved() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizers = body_and_head(model)
    with (
        pytest.raises(errors.SampleIdError, match="not moved"),
        pk.KernelRecorder(model, optimizers, CE, data=(X, Y)) as recorder,
    ):
        recorder.announce(torch.arange(1, 9))
        CE(model(X[:8]), Y[:8]).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_edit_of_the_second_gradient_alone_is_found() -> None:
    model = network()
    optimizers = body_and_head(model)
    with (
        pytest.raises(errors.SampleIdError, match=r"3\.weight"),
        pk.KernelRecorder(model, optimizers, CE, data=(X, Y)) as recorder,
    ):
        x, y = recorder.announce(torch.arange(8))
        CE(model(x), y).backward()
        optimizers[0].step()
        model[3].weight.grad[0, 0] += 1.0
        optimizers[1].step()


def test_changes_between_two_steps_have_their_channel() -> None:
    """Weights of the first are clamped after it has stepped, and noise is added to the gradient of the second."""
    model = network()
    first, second = optimizers = body_and_head(model)
    with pk.KernelRecorder(model, optimizers, CE, data=(X, Y), audit_every=1) as recorder:
        for x, y in recorder.batches(BATCH):
            model.zero_grad()
            CE(model(x), y).backward()
            first.step()
            with torch.no_grad(), recorder.channel("clamp"):
                model[0].weight.clamp_(-0.3, 0.3)
            with recorder.channel("noise"):
                model[3].weight.grad.add_(0.01)
            second.step()
    trajectory = recorder.trajectory
    assert len(trajectory) == 3
    assert all(len(step.active) == 6 for step in trajectory.steps())
    why = pk.KernelMachine(trajectory).explain(QUERIES, outputs=0)
    assert why.relative_residual <= 1e-10
    assert why.split_error <= 1e-10
    assert {"clamp", "noise"} <= set(why.channels)
    assert "unexplained" not in why.channels


def test_a_step_that_overflowed_belongs_to_nobody() -> None:
    """Unfused under loss scaling: the first optimizer's gradients overflow, and the second steps alone."""
    model = network()
    optimizers = body_and_head(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pk.KernelRecorder(model, optimizers, CE, data=(X, Y), audit_every=1) as recorder:
        for k, (x, y) in enumerate(recorder.batches(BATCH)):
            model.zero_grad()
            scaler.scale(CE(model(x), y)).backward()
            if k == 1:
                model[0].weight.grad.fill_(torch.inf)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    active = [step.active for step in recorder.trajectory.steps()]
    assert [len(names) for names in active] == [6, 2, 6]
    complete(recorder.trajectory)


def test_a_gradient_that_is_no_number_leaves_what_the_others_did_on_record() -> None:
    model = network()
    body, head = body_and_head(model)
    with pk.KernelRecorder(model, [body, head], CE, data=(X, Y), audit_every=1) as recorder:
        for k in range(3):
            x, y = recorder.announce(torch.arange(8) + k)
            model.zero_grad()
            CE(model(x), y).backward()
            body.step()
            if k == 1:
                model[3].bias.grad[0] = torch.nan
                with pytest.raises(errors.NonFiniteStepError, match=r"`3\.bias`.*its samples are \[1, 2, 3"):
                    head.step()
            else:
                head.step()
    assert [len(step.active) for step in recorder.trajectory.steps()] == [6, 4, 6]
    complete(recorder.trajectory)


def test_a_step_that_ends_with_an_error_is_none() -> None:
    model = network()
    body, head = body_and_head(model)
    with pk.KernelRecorder(model, [body, head], CE, data=(X, Y), audit_every=1) as recorder:
        for k in range(3):
            x, y = recorder.announce(torch.arange(8) + k)
            model.zero_grad()
            CE(model(x), y).backward()
            body.step()
            head.param_groups[0]["betas"] = "nonsense" if k == 1 else (0.9, 0.999)
            if k == 1:
                with pytest.raises(ValueError, match="unpack"):
                    head.step()
            else:
                head.step()
    assert [len(step.active) for step in recorder.trajectory.steps()] == [6, 4, 6]
    complete(recorder.trajectory)


# -- refused by name, and unwrapped  ----------------------------------------------------------------------------------


def test_lbfgs_is_refused_by_name_among_others() -> None:
    model = network()
    optimizers = [SGD(model[0].parameters(), lr=0.1), torch.optim.LBFGS(model[3].parameters())]
    with pytest.raises(errors.UnsupportedOptimizerError, match="LBFGS"):
        pk.KernelRecorder(model, optimizers, CE, data=(X, Y))


class Wrapper(Optimizer):
    """Holds an optimizer, as accelerate's does, and has no hooks of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()


def test_optimizers_that_hold_one_are_unwrapped() -> None:
    model = network()
    body, head = body_and_head(model)
    wrapped = [Wrapper(Wrapper(body)), Wrapper(head)]
    with pk.KernelRecorder(model, wrapped, CE, data=(X, Y)) as recorder:
        for x, y in recorder.batches(BATCH):
            model.zero_grad()
            CE(model(x), y).backward()
            for optimizer in wrapped:
                optimizer.step()
    assert len(recorder.trajectory) == 3
    complete(recorder.trajectory)
