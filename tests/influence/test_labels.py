"""Label quality: every score by plain arithmetic, what stands out, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, SAMPLES, make_inputs, make_model, record
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from tolerances import TOLERANCES
from torch import Tensor, nn

import pathkernel as pk
from pathkernel import errors, reference
from pathkernel.influence.labels import WEIGHTS

DOUBLE = TOLERANCES[torch.float64]


def close(found: Any, expected: Any, tolerance: float = DOUBLE.rounding) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1e-3, np.abs(expected).max()))


def squared(run: Any, s: int, metric: Tensor | float = 1.0) -> Tensor:
    """⟨D ∇ℓ_i, ∇ℓ_i⟩ at θ_s."""
    theta = run.trajectory.parameters(s)
    rows = [
        reference.sample_gradients(run.start, theta, run.loss, run.X[i : i + 1], run.y[i : i + 1])[0]
        for i in range(SAMPLES)
    ]
    return (torch.stack(rows) ** 2 * metric).sum(1)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_every_score_by_plain_arithmetic(optimizer: str) -> None:
    run = record(optimizer=optimizer)
    path = range(len(run.trajectory))
    quality = pk.label_quality(run.trajectory, nodes=len(path))
    assert quality.steps == tuple(path) and quality.functional == "margin"
    margins = torch.zeros(SAMPLES)
    influence, share = torch.zeros(SAMPLES), torch.zeros(SAMPLES)
    rate, v = OPTIMIZERS[optimizer].settings["lr"], torch.zeros(())
    for s in path:
        with torch.no_grad():
            z = torch.func.functional_call(run.start, run.trajectory.parameters(s), (run.X,))
        own = torch.stack([reference.margin(a, int(b)) for a, b in zip(z, run.y, strict=True)])
        margins = margins + own / len(path)
        influence = influence + squared(run, s) / len(path)
        metric: Tensor | float = 1.0
        if optimizer == "adam":
            g = run.trajectory.store.read(s).gradient
            v = 0.999 * v + 0.001 * g**2
            metric = 0.1 / (1 - 0.9 ** (s + 1)) / ((v / (1 - 0.999 ** (s + 1))).sqrt() + 1e-8)
        share = share - rate * squared(run, s, metric) / SAMPLES
    close(quality.area_under_margin, margins)
    close(quality.self_influence, influence)
    close(quality.self_share, share)
    z = run.model(run.X).detach()
    close(quality.final_loss, nn.functional.cross_entropy(z, run.y, reduction="none"))
    np.testing.assert_array_equal(quality.predictions, z.argmax(1))
    np.testing.assert_array_equal(quality.targets, run.y)


def test_the_combined_score_is_the_weighted_mean_of_ranks() -> None:
    quality = pk.label_quality(record().trajectory)
    assert set(WEIGHTS) == set(quality.doubts) and sum(WEIGHTS.values()) == 1
    expected = sum(WEIGHTS[name] * (rankdata(own) - 0.5) / SAMPLES for name, own in quality.doubts.items())
    close(quality.score, expected)
    assert (np.diff(quality.score[quality.ids]) <= 0).all()
    np.testing.assert_array_equal(quality.ids[quality.rank], np.arange(SAMPLES))
    np.testing.assert_array_equal(quality.top(3), quality.ids[:3])
    frame = quality.to_frame()
    assert frame["sample"].tolist() == quality.ids.tolist()
    assert list(frame)[:2] == ["sample", "score"] and {"label", "prediction", *WEIGHTS} <= set(frame)
    assert repr(quality).startswith("LabelQuality(10 training samples at 6 points of the path; most doubtful labels: ")


def test_few_points_stand_for_the_path() -> None:
    run = record()
    few = pk.label_quality(run.trajectory, nodes=2)
    assert few.steps == (1, 4)  # the middle steps of 0 … 2 and 3 … 5
    close(few.self_influence, (squared(run, 1) + squared(run, 4)) / 2)


def test_exact_self_shares() -> None:
    run = record(optimizer="adamw")
    quality = pk.label_quality(run.trajectory, self_shares="every step")
    close(quality.self_share, pk.KernelMachine(run.trajectory).self_shares())


def test_a_regression_has_residuals() -> None:
    run = record(loss="mse_mean")
    quality = pk.label_quality(run.trajectory, nodes=len(run.trajectory))
    path = [torch.func.functional_call(run.start, run.trajectory.parameters(s), (run.X,)) for s in range(6)]
    close(quality.area_under_margin, -sum((z - run.y).norm(dim=1) for z in path).detach() / 6)
    assert quality.functional == "residual" and quality.predictions.shape == (SAMPLES, 2)
    assert "label" not in quality.to_frame()


def test_one_output() -> None:
    run = record(loss="bce")
    quality = pk.label_quality(run.trajectory)
    np.testing.assert_array_equal(quality.predictions, (run.model(run.X)[:, 0] > 0).long())
    assert quality.targets.shape == (SAMPLES,)


def test_rows_of_whole_gradients_where_no_layer_accounts_for_them() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x[:, :, None] * self.w).sum(1)

    X, y = make_inputs(6), torch.arange(6) % 3
    model, loss = Own(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for x, target in recorder.batches(2):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    quality = pk.label_quality(recorder.trajectory, nodes=3)
    kernel = pk.PathKernel(recorder.trajectory, outputs="loss", measure="uniform", quadrature="left")
    close(quality.self_influence, kernel.diagonal((X, y)) / kernel.total_weight)


@pytest.mark.parametrize("level", [pk.WeightsOnly(), pk.Every(2), pk.Keyframes(2)], ids=repr)
def test_every_level_of_record_with_a_path(level: Any) -> None:
    def trained(**options: Any) -> Any:
        model, X, y = make_model(), make_inputs(SAMPLES), torch.arange(SAMPLES) % 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pk.KernelRecorder(model, optimizer, nn.CrossEntropyLoss(), data=(X, y), **options) as recorder:
            for i in range(6):
                x, target = recorder.announce([i, i + 1, i + 2])
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), target).backward()
                optimizer.step()
        return recorder.trajectory

    whole, found = pk.label_quality(trained()), pk.label_quality(trained(schedule=level), nodes=6)
    if not isinstance(level, pk.Every) or level.n == 1:
        close(found.self_influence, whole.self_influence)
        close(found.self_share, whole.self_share)
    close(found.final_loss, whole.final_loss)
    assert found.steps == ((0, 2, 4) if level == pk.Every(2) else tuple(range(6)))


def test_wrong_labels_stand_out() -> None:
    """A network that learns every label by heart: 15 % of the labels are wrong."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 10, generator=generator, dtype=torch.float64)
    X[:, :3] *= 3
    y = X[:, :3].argmax(1)
    wrong = torch.zeros(200, dtype=torch.bool)
    wrong[torch.randperm(200, generator=generator)[:30]] = True
    y = torch.where(wrong, (y + 1) % 3, y)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3)).double()
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for epoch in range(20):
            for x, target in recorder.batches(25, generator=torch.Generator().manual_seed(epoch)):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    quality = pk.label_quality(recorder.trajectory)
    areas = {name: roc_auc_score(wrong, own) for name, own in quality.doubts.items()}
    combined = roc_auc_score(wrong, quality.score)
    assert combined > 0.85 and combined > areas["final_loss"] + 0.05 and combined > max(areas.values()) - 0.01


def test_targets_that_are_no_labels() -> None:
    X, model = make_inputs(6), make_model()
    targets = torch.randint(2, (6, 3), generator=torch.Generator().manual_seed(0)).double()
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.BCEWithLogitsLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, targets)) as recorder:
        for x, target in recorder.batches(3):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    with pytest.raises(errors.InputError, match=r"shape \(6, 3\).*integers from 0 to 2.*outputs='loss'"):
        pk.label_quality(recorder.trajectory)


REFUSED = {
    "another way to self-shares": (lambda path: pk.label_quality(path, self_shares="all"), "'all'.*'every step'"),
    "no points": (lambda path: pk.label_quality(path, nodes=0), "`nodes=0`.*whole number, greater than 0.*`nodes=20`"),
    "half a sample": (lambda path: pk.label_quality(path).top(1.5), r"`top\(1.5\)` was asked of 10"),
    "more than there are": (lambda path: pk.label_quality(path).top(11), r"`top\(11\)` was asked of 10.*`top\(10\)`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(errors.InputError, match=said):
        call(record().trajectory)


def test_a_loss_that_nobody_knows_and_samples_that_are_no_longer_at_hand() -> None:
    X, y = make_inputs(6), torch.arange(6) % 3
    for options, said in (({"data": (X, y)}, "needs the loss as a function"), ({"data": 6}, "asked for by their ids")):
        model = make_model()
        optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
        known = loss if options["data"] == 6 else None
        with pk.KernelRecorder(model, optimizer, known, **options) as recorder:
            for i in (0, 3):
                ids = torch.arange(i, i + 3)
                recorder.announce(ids, inputs=X[ids], targets=y[ids])
                optimizer.zero_grad()
                loss(model(X[ids]), y[ids]).backward()
                optimizer.step()
        with pytest.raises(errors.InputError, match=said):
            pk.label_quality(recorder.trajectory)


def test_targets_of_a_regression_that_do_not_fit() -> None:
    X, model = make_inputs(6), make_model()
    targets, optimizer = torch.zeros(6, 2, dtype=torch.float64), torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda z, t: (z[:, :2] - t).square().mean()  # noqa: E731
    with pk.KernelRecorder(model, optimizer, loss, data=(X, targets)) as recorder:
        for x, target in recorder.batches(3):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    with pytest.raises(errors.InputError, match=r"targets of shape \(6, 2\) for outputs of shape \(6, 3\)"):
        pk.label_quality(recorder.trajectory)


def test_losses_of_ones_own_are_judged_by_what_they_do() -> None:
    """|z − y| says nothing where the loss of a logit falls beyond its label."""
    X, y = make_inputs(SAMPLES), (torch.arange(SAMPLES) % 2).double()

    starts = []

    def of(loss: Any, targets: Tensor) -> pk.LabelQuality:
        model = nn.Linear(4, 1).double()
        starts.append(model(X)[:, 0].detach().numpy())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pk.KernelRecorder(model, optimizer, loss, data=(X, targets)) as recorder:
            for x, target in recorder.batches(batch_size=SAMPLES):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
        return pk.label_quality(recorder.trajectory)

    flat = of(lambda z, t: nn.functional.binary_cross_entropy_with_logits(z[:, 0], t), y)
    assert flat.functional == "margin"
    close(flat.area_under_margin, starts[0] * (2 * y.numpy() - 1))
    assert of(lambda z, t: (z[:, 0] - t).abs().mean(), y).functional == "residual"
    with pytest.raises(errors.InputError, match="not smallest where outputs equal targets"):
        of(lambda z, t: (1 - z[:, 0] * t).relu().mean(), 2 * y - 1)
