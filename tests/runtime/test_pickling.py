"""Kernels and what holds them through pickle, copy and joblib: the same bits come back, or a refusal says why not."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC
from torch import nn

import pathkernel as pk
from pathkernel import errors
from pathkernel.estimators.gaussian_process import GaussianProcessKernel
from pathkernel.estimators.transformer import PathKernelTransformer
from pathkernel.quadrature import GaussLegendre
from pathkernel.tangent_kernel.engines.projection import Projection
from pathkernel.tangent_kernel.output_probes import OutputProbes
from pathkernel.trajectory.schedule import Schedule

N = 24
LEVELS = {"memory": (None, None), "disk": ("run", None)}
LEVELS |= {
    f"{name} {place}": (place, level)
    for place in (None, "run")
    for name, level in {
        "thinned": Schedule(every=3),
        "keyframes": Schedule(keyframes=4),
        "weights": Schedule(keep="weights"),
    }.items()
}


def difference(z: torch.Tensor) -> torch.Tensor:
    return z[0] - z[1]


def halved(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target) / 2


def written(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items())


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def train(store: Any = None, schedule: Any = None, loss: Any = None, width: int = 6, **options: Any) -> pk.Trajectory:
    X, y = samples()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-2), loss or nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, (X, y), store=store, schedule=schedule, **options) as recorder:
        for _ in range(3):
            for x, target in recorder.batches(batch_size=8):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    model.eval()
    return recorder.trajectory


def through_joblib(thing: Any) -> Any:
    buffer = io.BytesIO()
    joblib.dump(thing, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


WAYS = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "oldest protocol": lambda thing: pickle.loads(pickle.dumps(thing, protocol=2)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "joblib": through_joblib,
    "twice": lambda thing: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(thing)))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"outputs": "full", "dtype": torch.float64},
        {"outputs": 1, "engine": "jacobian"},
        {"outputs": "loss", "loss": nn.CrossEntropyLoss()},
        {"outputs": difference, "parameters": ["0.weight", "3.*"]},
        {"engine": Projection(64, seed=3), "memory": "64MB"},
        {"dtype": torch.bfloat16},
    ],
    ids=written,
)
def test_tangent_kernels(options: dict[str, Any], way: str) -> None:
    X, y = samples()
    trajectory = train()
    kernel = pk.TangentKernel(trajectory.model, **options)
    given = (X, y) if options.get("outputs") == "loss" else X
    K = kernel(given)
    with torch.no_grad():
        trajectory.model[0].weight.add_(1.0)  # the kernel keeps copies
    back = WAYS[way](kernel)
    assert np.array_equal(back(given), K) and np.array_equal(back.diagonal(given), kernel.diagonal(given))
    assert repr(back) == repr(kernel)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("level", LEVELS)
def test_path_kernels_on_every_kind_of_record(level: str, way: str, tmp_path: Path) -> None:
    place, schedule = LEVELS[level]
    kernel = pk.PathKernel(train(None if place is None else tmp_path / place, schedule))
    X, _ = samples()
    back = WAYS[way](kernel)
    assert np.array_equal(back(X[:5], X), kernel(X[:5], X)) and back.nodes == [
        type(node)(back.measure, node.position, node.time, node.weight, node.number) for node in kernel.nodes
    ]
    assert repr(back) == repr(kernel) and back.error == kernel.error


@pytest.mark.parametrize(
    "options",
    [
        {"outputs": OutputProbes(2, seed=1)},
        {"engine": Projection(32), "outputs": "mean"},
        {"tolerance": 0.3},
        {"steps": 4, "measure": "arc_length", "quadrature": GaussLegendre(2), "dtype": torch.float64},
        {"preconditioner": "optimizer", "outputs": difference},
        {"outputs": "full", "quadrature": "midpoint"},
    ],
    ids=written,
)
def test_path_kernels_with_every_kind_of_option(options: dict[str, Any]) -> None:
    kernel = pk.PathKernel(train(), **options)
    X, _ = samples()
    K = kernel(X)
    for way in WAYS.values():
        assert np.array_equal(way(kernel)(X), K)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("level", ["memory", "disk", "keyframes None", "keyframes run"])
def test_machines_and_their_trajectories(level: str, way: str, tmp_path: Path) -> None:
    place, schedule = LEVELS[level]
    trajectory = train(None if place is None else tmp_path / place, schedule)
    X, _ = samples()
    machine = pk.KernelMachine(trajectory, quadrature="trapezoid", dtype=torch.float64)
    why, back = machine.explain(X[:3]), WAYS[way](machine)
    found = back.explain(X[:3])
    assert np.array_equal(found.shares, why.shares) and np.array_equal(found.output, why.output)
    assert {name: value.tolist() for name, value in found.channels.items()} == {
        name: value.tolist() for name, value in why.channels.items()
    }
    assert np.array_equal(back.predict(X), machine.predict(X)) and repr(back) == repr(machine)
    path = WAYS[way](trajectory)
    assert torch.equal(path.final, trajectory.final)
    for one, other in zip(path.steps(), trajectory.steps(), strict=True):
        assert torch.equal(one.after, other.after) and torch.equal(one.gradient, other.gradient)


def test_an_average_travels_with_its_machine() -> None:
    X, y = samples()
    model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    with pk.KernelRecorder(model, optimizer, loss, (X, y), averages={"swa": average}) as recorder:
        for x, target in recorder.batches(batch_size=8):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
            average.update_parameters(model)
    machine = pk.KernelMachine(recorder.trajectory, weights="swa")
    assert np.array_equal(pickle.loads(pickle.dumps(machine)).explain(X[:2]).shares, machine.explain(X[:2]).shares)


def test_an_opened_trajectory_travels(tmp_path: Path) -> None:
    run = train(tmp_path / "run")
    opened = pk.Trajectory.open(tmp_path / "run", model=run.model, loss=run.loss, data=samples())
    X, _ = samples()
    kernel = pk.PathKernel(pickle.loads(pickle.dumps(opened)))
    assert np.array_equal(kernel(X), pk.PathKernel(run)(X))


@pytest.mark.parametrize("place", [None, "run"])
@pytest.mark.parametrize("make", [pk.TangentKernel, pk.PathKernel])
def test_estimators_fitted_with_kernels(make: Any, place: str | None, tmp_path: Path) -> None:
    run = train(None if place is None else tmp_path / place)
    kernel = make(run.model if make is pk.TangentKernel else run)
    X, y = (part.numpy() for part in samples())
    covariance = GaussianProcessKernel(kernel, scale_bounds="fixed") + WhiteKernel(0.1)
    for estimator in (
        SVC(kernel=kernel),
        make_pipeline(PathKernelTransformer(kernel), KernelRidge(kernel="precomputed")),
        GaussianProcessRegressor(covariance),
    ):
        fitted = estimator.fit(X, y)
        for way in WAYS.values():
            assert np.array_equal(way(fitted).predict(X[:7]), fitted.predict(X[:7]))
    operator = kernel.operator(X)
    v = np.arange(N, dtype=float)
    assert np.array_equal(pickle.loads(pickle.dumps(operator)) @ v, operator @ v)


def test_features_keep_their_error() -> None:
    features = pk.PathKernel(train()).features(samples()[0], 32)
    for name in ("pickle", "joblib", "deepcopy"):
        back = WAYS[name](features)
        assert np.array_equal(back, features) and back.error == features.error and features[:2].error is None


def test_a_new_process_gets_the_same_bits(tmp_path: Path) -> None:
    X, _ = samples()
    things = (pk.PathKernel(train(tmp_path / "run")), pk.TangentKernel(train().model))
    joblib.dump(things, tmp_path / "kernels.joblib")
    np.save(tmp_path / "X.npy", X.numpy())
    code = (
        f"import joblib, numpy as np, torch; torch.set_num_threads({torch.get_num_threads()}); X = np.load('X.npy')\n"
        "np.savez('K.npz', *[kernel(X) for kernel in joblib.load('kernels.joblib')])"
    )
    path = ":".join([str(Path(pk.__file__).parents[1]), *sys.path])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": path}, check=True)
    found = np.load(tmp_path / "K.npz")
    for K, kernel in zip(found.values(), things, strict=True):
        assert np.array_equal(K, kernel(X))


@pytest.mark.parametrize("outputs", ["trace", lambda z: z[0]], ids=["trace", "lambda"])
def test_a_search_in_processes(outputs: Any, tmp_path: Path) -> None:
    """Joblib's processes take functions by value, so that a lambda is no obstacle there."""
    X, y = (part.numpy() for part in samples())
    kernel = pk.PathKernel(train(tmp_path / "run"), outputs=outputs)
    searches = [GridSearchCV(SVC(kernel=kernel), {"C": [0.1, 10.0]}, cv=2, n_jobs=jobs).fit(X, y) for jobs in (None, 2)]
    assert np.array_equal(*(search.cv_results_["mean_test_score"] for search in searches))


# -- a store on disk travels as its path ------------------------------------------------------------------------------


def test_a_store_on_disk_travels_as_its_path_and_is_opened_when_it_is_needed(tmp_path: Path) -> None:
    raw = pickle.dumps(pk.PathKernel(train(tmp_path / "run", width=4096)))
    theta = 4 * train(width=4096).layout.size
    assert len(raw) < 4 * theta  # weights, start and constants, but no step
    shutil.move(tmp_path / "run", tmp_path / "away")
    kernel, (X, _) = pickle.loads(raw), samples()
    assert kernel.nodes and not kernel(X[:0], X).size
    with pytest.raises(errors.StoreError):
        kernel(X)
    shutil.move(tmp_path / "away", tmp_path / "run")
    assert kernel(X).shape == (N, N)


def test_another_store_in_its_place_is_seen(tmp_path: Path) -> None:
    raw = pickle.dumps(pk.PathKernel(train(tmp_path / "run")))
    shutil.rmtree(tmp_path / "run")
    train(tmp_path / "run", loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(errors.StoreError, match=r"does not hold what it held .* 9 steps .* Put the folder back"):
        pickle.loads(raw)(samples()[0])


def test_a_recording_that_is_not_over_can_be_saved(tmp_path: Path) -> None:
    X, y = samples()
    for place in (None, tmp_path / "run"):
        model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pk.KernelRecorder(model, optimizer, loss, (X, y), store=place) as recorder:
            for step, (x, target) in enumerate(recorder.batches(batch_size=4)):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
                if step == 2:
                    kernel = pk.PathKernel(recorder.trajectory)
                    assert np.array_equal(pickle.loads(pickle.dumps(kernel))(X), kernel(X))
        assert len(recorder.trajectory) == 6


def test_steps_in_memory_take_what_they_hold() -> None:
    """Vectors are cut from slabs of 4 MB, each of which a pickle of its own would hold whole."""
    trajectory = train(width=4096)
    vectors = 4 * trajectory.layout.size * (3 * len(trajectory) + 4)  # θ, gradient, denominator; model and constants
    assert len(pickle.dumps(trajectory)) < 2 * vectors
    path = pickle.loads(pickle.dumps(trajectory))
    steps = list(path.steps())
    assert all(one.after is other.before for one, other in pairwise(steps))
    assert all(one.frozen.after is one.after for one in steps)


# -- refusals ----------------------------------------------------------------------------------------------------------


def local_network() -> nn.Module:
    class Local(nn.Linear):
        pass

    return Local(4, 3)


def with_a_local_hook() -> nn.Module:
    model = nn.Linear(4, 3)
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("save", [pickle.dumps, through_joblib], ids=["pickle", "joblib"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: pk.TangentKernel(nn.Linear(4, 3), outputs=lambda z: z[0]), "outputs"),
        (lambda: pk.TangentKernel(nn.Linear(4, 3), outputs="loss", loss=lambda z, t: (z - t).mean()), "outputs"),
        (lambda: pk.TangentKernel(local_network()), "model"),
        (lambda: pk.TangentKernel(with_a_local_hook()), "model"),
        (lambda: SVC(kernel=pk.TangentKernel(local_network())), "model"),
        (lambda: pk.PathKernel(train(), outputs=lambda z: z[0]), "outputs"),
        (lambda: pk.PathKernel(train(loss=lambda z, t: nn.functional.cross_entropy(z, t))), "loss"),
        (lambda: pk.KernelMachine(train(loss=lambda z, t: nn.functional.cross_entropy(z, t))), "loss"),
        (lambda: train(regularizers={"l2": lambda p: 0 * p["0.weight"].sum()}), "regularizers"),
    ],
)
def test_what_cannot_be_saved_is_named(make: Any, name: str, save: Any) -> None:
    with pytest.raises(errors.InputError, match=rf"`{name}` cannot be pickled \(.*Define `{name}` at the top"):
        save(make())


def test_copies_take_what_cannot_be_saved() -> None:
    X, _ = samples()
    kernel = pk.PathKernel(train(loss=lambda z, t: nn.functional.cross_entropy(z, t)), outputs=lambda z: z[0])
    for way in (copy.copy, copy.deepcopy):
        assert np.array_equal(way(kernel)(X), kernel(X))
    named = pk.PathKernel(train(loss=halved))
    assert np.array_equal(pickle.loads(pickle.dumps(named))(X), named(X))


def test_a_trajectory_that_an_earlier_version_saved() -> None:
    trajectory, (X, _) = train(), samples()
    names = "model objective data layout initial constants rule initial_memory store tail final_buffers averages"
    state = {name: getattr(trajectory, name) for name in (*names.split(), "schedule", "reference", "returns", "task")}
    earlier = pk.Trajectory.__new__(pk.Trajectory)
    earlier.__setstate__(state)
    back = pickle.loads(pickle.dumps(earlier))
    assert np.array_equal(pk.PathKernel(back)(X[:4]), pk.PathKernel(trajectory)(X[:4]))
    assert torch.equal(back.reference.final, trajectory.reference.final)


def test_nobody_writes_a_trajectory_from_outside() -> None:
    trajectory = train()
    for name in ("run", "store", "end", "initial", "layout", "rule", "tail", "final_buffers", "reference"):
        with pytest.raises(AttributeError):
            setattr(trajectory, name, None)
