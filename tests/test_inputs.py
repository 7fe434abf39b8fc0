"""Samples as people pass them: every form of the same numbers gives the same answer, or a refusal in three parts.

The answer is that of plain autograd, sample by sample.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from sklearn.decomposition import KernelPCA
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel
from sklearn.kernel_approximation import Nystroem
from sklearn.kernel_ridge import KernelRidge
from sklearn.svm import SVC
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pathkernel as pk
from pathkernel import errors
from pathkernel.estimators.gaussian_process import GaussianProcessKernel
from pathkernel.estimators.transformer import PathKernelTransformer
from pathkernel.gradients.pytrees import as_tensors, copied_samples, same_samples
from pathkernel.path_kernel.streaming import StreamingGram
from pathkernel.trajectory.schedule import Streaming

N = 12
COUNTS = np.random.default_rng(0).integers(-3, 4, (N, 4))
LABELS = torch.arange(N) % 3
CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def train(model: nn.Module, data: Any, **options: Any) -> pk.Trajectory:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with pk.KernelRecorder(model, optimizer, CE, data=data, **options) as recorder:
        for x, y in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    return recorder.trajectory


def plain_kernel(model: nn.Module, X: torch.Tensor, outputs: Any = slice(None)) -> np.ndarray:
    """Σ_k ⟨∇f_k(x), ∇f_k(x')⟩ by autograd, sample by sample."""
    rows = []
    for x in X:
        z = model(x[None])[0].reshape(-1)[outputs].reshape(-1)
        own = [torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in z]
        rows.append(torch.stack([torch.cat([g.reshape(-1) for g in gradient]) for gradient in own]))
    J = torch.stack(rows).double()
    return torch.einsum("ikp,jkp->ij", J, J).numpy()


def read_only(X: np.ndarray) -> np.ndarray:
    X = X.copy()
    X.flags.writeable = False
    return X


def on_disk(X: np.ndarray, folder: Path) -> np.ndarray:
    np.save(folder / "X.npy", X)
    return np.load(folder / "X.npy", mmap_mode="r")


def field(X: np.ndarray) -> np.ndarray:
    """A view of every row that stands beside a byte of something else."""
    rows = np.zeros(N, dtype=[("x", "f8", 4), ("label", "u1")])
    rows["x"] = X
    return rows["x"]


FORMS = {
    "int64": lambda X: X,
    "int32": lambda X: X.astype(np.int32),
    "int8": lambda X: X.astype(np.int8),
    "list of integer rows": lambda X: X.tolist(),
    "list of floating-point rows": lambda X: X.astype(float).tolist(),
    "list of arrays' rows": lambda X: [list(row) for row in X],
    "float16": lambda X: X.astype(np.float16),
    "float32": lambda X: X.astype(np.float32),
    "float64": lambda X: X.astype(float),
    "longdouble": lambda X: X.astype(np.longdouble),
    "big-endian": lambda X: X.astype(">f8"),
    "big-endian integers": lambda X: X.astype(">i4"),
    "Fortran order": lambda X: np.asfortranarray(X.astype(np.float32)),
    "reversed rows": lambda X: X.astype(float)[::-1].copy()[::-1],
    "reversed columns": lambda X: X.astype(np.float32)[:, ::-1].copy()[:, ::-1],
    "every other row": lambda X: np.repeat(X.astype(np.float32), 2, axis=0)[::2],
    "a field of a record": lambda X: field(X),
    "read-only": lambda X: read_only(X.astype(np.float32)),
    "read-only float64": lambda X: read_only(X.astype(float)),
    "broadcast": lambda X: np.broadcast_to(X.astype(np.float32), (1, N, 4))[0],
    "DataFrame": lambda X: pd.DataFrame(X.astype(float), columns=list("abcd")),
    "DataFrame of integers": lambda X: pd.DataFrame(X, columns=list("abcd")),
    "DataFrame of mixed columns": lambda X: pd.DataFrame({k: X[:, k].astype((float, int)[k % 2]) for k in range(4)}),
    "DataFrame of float32": lambda X: pd.DataFrame(X.astype(np.float32)),
    "DataFrame of nullable numbers": lambda X: pd.DataFrame(X, dtype="Float64"),
    "DataFrame of nullable integers": lambda X: pd.DataFrame(X, dtype="Int64"),
    "tensor": lambda X: torch.tensor(X, dtype=torch.float32),
    "tensor of integers": lambda X: torch.tensor(X),
    "tensor with a gradient": lambda X: torch.tensor(X, dtype=torch.float32, requires_grad=True),
    "tensor of a graph": lambda X: torch.tensor(X, dtype=torch.float32, requires_grad=True) * 1,
    "float16 tensor": lambda X: torch.tensor(X, dtype=torch.float16),
    "bfloat16 tensor": lambda X: torch.tensor(X, dtype=torch.bfloat16),
    "transposed tensor": lambda X: torch.tensor(X.T.copy(), dtype=torch.float64).T,
}


@pytest.mark.parametrize("form", [*FORMS, "memory map"])
def test_every_form_of_the_same_numbers_gives_the_same_answers(form: str, tmp_path: Path) -> None:
    X = on_disk(COUNTS.astype(np.float32), tmp_path) if form == "memory map" else FORMS[form](COUNTS)
    before = copied_samples(X)
    model, floats = network(), torch.tensor(COUNTS, dtype=torch.float32)
    expected = plain_kernel(model, floats)
    kernel = pk.TangentKernel(model)
    np.testing.assert_allclose(kernel(X), expected, rtol=1e-5)
    np.testing.assert_allclose(kernel(X, floats), expected, rtol=1e-5)
    np.testing.assert_allclose(kernel.diagonal(X), np.diag(expected), rtol=1e-5)
    trajectory = train(model, (floats, LABELS))
    path, machine = pk.PathKernel(trajectory), pk.KernelMachine(trajectory)
    np.testing.assert_allclose(path(X), path(floats), rtol=1e-5)  # rounding depends on where numbers lie in memory
    with torch.no_grad():
        outputs = model(floats).numpy()
    np.testing.assert_allclose(machine.decision_function(X), outputs, atol=1e-5)
    assert np.array_equal(machine.predict(X), outputs.argmax(axis=1))
    np.testing.assert_allclose(machine.explain(X).shares, machine.explain(floats).shares, rtol=1e-3, atol=1e-6)
    assert same_samples(X, before)


@pytest.mark.parametrize("form", [*FORMS, "memory map"])
def test_training_data_in_every_form(form: str, tmp_path: Path) -> None:
    """The loop gets what the network takes, and the record is that of the same run with tensors."""
    X = on_disk(COUNTS.astype(np.float32), tmp_path) if form == "memory map" else FORMS[form](COUNTS)
    floats = torch.tensor(COUNTS, dtype=torch.float32)
    if isinstance(X, torch.Tensor) and X.is_floating_point():
        X = X.to(torch.float32)  # tensors reach the loop in their own type
    found, expected = train(network(), (X, LABELS)), train(network(), (floats, LABELS))
    torch.testing.assert_close(found.final, expected.final)
    shares = [pk.KernelMachine(path).explain(floats[:2]).shares for path in (found, expected)]
    np.testing.assert_allclose(*shares, rtol=1e-3, atol=1e-6)


def test_a_reopened_run_on_integers(tmp_path: Path) -> None:
    run = train(network(), (COUNTS, LABELS), store=tmp_path / "run")
    opened = pk.Trajectory.open(tmp_path / "run", model=run.model, loss=CE, data=(COUNTS, LABELS))
    shares = [pk.KernelMachine(path).explain(COUNTS[:3]).shares for path in (run, opened)]
    assert np.array_equal(*shares)


class Bytes(Dataset):
    """Pictures as bytes, whose loading draws random numbers."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        random.random(), np.random.rand(), torch.rand(1)
        return (COUNTS[index] + 3).astype(np.uint8), int(LABELS[index])


def test_a_dataset_of_bytes_and_the_users_random_numbers() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    recorder = pk.KernelRecorder(model, optimizer, CE, data=Bytes())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    with recorder:
        for x, y in recorder.track(DataLoader(pk.IndexedDataset(Bytes()), batch_size=4)):
            optimizer.zero_grad()
            CE(model(x.float()), y).backward()  # as a loop on bytes does
            optimizer.step()
    kernel = pk.PathKernel(recorder.trajectory)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    K = kernel((COUNTS + 3).astype(np.uint8))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    assert np.array_equal(K, kernel((COUNTS + 3).astype(float)))


# -- integers for networks that take integers ------------------------------------------------------------------------


def embedding() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 3))


def test_token_ids_stay_what_they_are() -> None:
    ids, model = COUNTS + 3, embedding()
    expected = plain_kernel(model, torch.tensor(ids))
    kernel = pk.TangentKernel(model)
    for X in (ids, ids.astype(np.int32), ids.astype(float), ids.astype(np.float32), ids.tolist(), pd.DataFrame(ids)):
        np.testing.assert_allclose(kernel(X), expected, rtol=1e-5)
    trajectory = train(model, (ids, LABELS))
    assert not trajectory.data[torch.arange(2)][0].is_floating_point()
    path = pk.PathKernel(trajectory)
    assert np.array_equal(path(ids.astype(float)), path(ids))  # as scikit-learn passes them
    fitted = SVC(kernel=path).fit(ids, LABELS.numpy())
    direct = SVC(kernel="precomputed").fit(path(ids), LABELS.numpy())
    assert np.array_equal(fitted.predict(ids), direct.predict(path(ids)))
    with pytest.raises(errors.InputError, match="numbers that are no integers"):
        path(ids + 0.5)
    with pytest.raises(errors.InputError, match="numbers that are no integers"):
        path(np.full((1, 4), 2.0**30, dtype=np.float32))  # float32 does not tell it from its neighbours


class Masked(nn.Module):
    """Features and a mask: floating point and booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.where(mask, x, 0.0))


def test_booleans_in_training_are_booleans_in_queries() -> None:
    X, mask = torch.tensor(COUNTS, dtype=torch.float32), torch.tensor(COUNTS > 0)
    model = Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=((X, mask), LABELS)) as recorder:
        for x, y in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            CE(model(*x), y).backward()
            optimizer.step()
    kernel = pk.PathKernel(recorder.trajectory)
    K = kernel((X, mask))
    for given in (mask.int(), mask.float(), mask.numpy()):
        assert np.array_equal(kernel((X, given)), K)
    with pytest.raises(errors.InputError, match="numbers that are no booleans"):
        kernel((X, mask.int() * 2))
    expected = plain_kernel(nn.Linear(4, 3), torch.where(mask, X, 0.0))
    np.testing.assert_allclose(pk.TangentKernel(model)((X, mask)), expected, rtol=1e-5)


# -- several inputs ----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.a(a).tanh() * self.b(b)


class Pair(Two):
    def forward(self, pair: Any) -> torch.Tensor:  # type: ignore[override]
        return super().forward(*pair)


class Named(Two):
    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return super().forward(inputs["a"], inputs["b"])


class Items(Dataset):
    def __init__(self, form: Any) -> None:
        self.form = form

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Any, int]:
        a = torch.tensor(COUNTS[index], dtype=torch.float32)
        return self.form(a, a[:2]), int(LABELS[index])


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize(
    ("model", "form", "call"),
    [
        (Two, lambda a, b: (a, b), lambda model, x: model(*x)),
        (Two, lambda a, b: [a, b], lambda model, x: model(*x)),
        (Pair, lambda a, b: [a, b], lambda model, x: model(x)),
        (Named, lambda a, b: {"a": a, "b": b}, lambda model, x: model(x)),
    ],
    ids=["tuple", "list", "list as one argument", "dict"],
)
def test_networks_with_several_inputs(model: Any, form: Any, call: Any, as_dataset: bool) -> None:
    X = torch.tensor(COUNTS, dtype=torch.float32)
    given, network = form(X, X[:, :2]), model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    data = Items(form) if as_dataset else (given, LABELS)
    with pk.KernelRecorder(network, optimizer, CE, data=data) as recorder:
        for x, y in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            CE(call(network, x), y).backward()
            optimizer.step()
    if as_dataset and isinstance(given, tuple):
        given = list(given)  # as torch's collate function makes of it
    with torch.no_grad():
        outputs = call(network, given).numpy()
    machine = pk.KernelMachine(recorder.trajectory)
    np.testing.assert_allclose(machine.decision_function(given), outputs, atol=1e-5)
    assert pk.PathKernel(recorder.trajectory)(given).shape == (N, N)
    both = Two()
    both.load_state_dict(network.state_dict())
    outputs_of_both = both(X[:3], X[:3, :2]).flatten()
    rows = [torch.autograd.grad(z, list(both.parameters()), retain_graph=True) for z in outputs_of_both]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).reshape(3, 3, -1)
    few = form(X[:3], X[:3, :2])
    np.testing.assert_allclose(pk.TangentKernel(network)(few), torch.einsum("ikp,jkp->ij", J, J), rtol=1e-4, atol=1e-5)


# -- nothing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "jacobian", "layerwise", "products"])
def test_no_rows_or_no_columns(engine: str) -> None:
    X, model = torch.tensor(COUNTS, dtype=torch.float32), network()
    trajectory = train(model, (X, LABELS))
    for make, of in ((pk.TangentKernel, model), (pk.PathKernel, trajectory)):
        kernel = make(of, engine=engine)
        blocks = make(of, engine=engine, outputs="full") if engine != "products" else None
        for none in (X[:0], X[:0].numpy(), COUNTS[:0]):
            assert kernel(none, X).shape == (0, N) and kernel(X, none).shape == (N, 0)
            assert kernel(none).shape == (0, 0) and kernel.diagonal(none).shape == (0,)
            assert kernel(none).dtype == np.float64
            if blocks is not None:
                assert blocks(none, X).shape == (0, N, 3, 3) and blocks(none).shape == (0, 0, 3, 3)
                assert blocks(X, none).shape == (N, 0, 3, 3) and blocks.diagonal(none).shape == (0, 3, 3)
        for given in ((X[:0],), (X, X[:0])):
            with pytest.raises(errors.InputError, match="was given no samples"):
                kernel.operator(*given)
    machine = pk.KernelMachine(train(network(), (X, LABELS)))
    for ask in (machine.explain, machine.predict, machine.decision_function, machine.predict_proba):
        with pytest.raises(errors.InputError, match=r"`KernelMachine` was given no samples\. .*\. Leave the call out"):
            ask(X[:0])


def test_no_losses() -> None:
    X, model = torch.tensor(COUNTS, dtype=torch.float32), network()
    kernel = pk.TangentKernel(model, outputs="loss", loss=CE)
    assert kernel((X[:0], LABELS[:0]), (X, LABELS)).shape == (0, N)
    assert kernel((X, LABELS)).shape == (N, N)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(act: Any) -> errors.InputError:
    with pytest.raises(errors.InputError) as caught:
        act()
    return caught.value


ASKED = {
    "TangentKernel": lambda: pk.TangentKernel(network()),
    "PathKernel": lambda: pk.PathKernel(train(network(), (COUNTS.astype(float), LABELS))),
    "predict": lambda: pk.KernelMachine(train(network(), (COUNTS.astype(float), LABELS))).predict,
    "explain": lambda: pk.KernelMachine(train(network(), (COUNTS.astype(float), LABELS))).explain,
    "decision_function": lambda: pk.KernelMachine(train(network(), (COUNTS.astype(float), LABELS))).decision_function,
    "data": lambda: lambda X: train(network(), (X, LABELS)),
}
WRONG = {
    "sparse matrix": (lambda X: scipy.sparse.csr_matrix(X), "X.toarray()"),
    "sparse array": (lambda X: scipy.sparse.coo_array(X), "X.toarray()"),
    "sparse tensor": (lambda X: torch.tensor(X, dtype=torch.float32).to_sparse(), "X.to_dense()"),
    "complex": (lambda X: X + 1j, "Encode"),
    "text": (lambda X: X.astype(str), "Encode"),
    "objects": (lambda X: X.astype(object), "X.astype(float)"),
    "a column of text": (lambda X: pd.DataFrame(X).assign(name="x"), "X.astype(float)"),
    "masked": (lambda X: np.ma.masked_less(X, 0), "X.filled(value)"),
    "ragged": (lambda X: [[1.0], [1.0, 2.0]], "one row for each sample"),
    "nothing": (lambda X: None, "Encode"),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_array_of_numbers_is_refused_at_once(asked: str, wrong: str) -> None:
    make, advice = WRONG[wrong]
    assert advice in refusal(lambda: ASKED[asked]()(make(COUNTS))).write


@pytest.mark.parametrize("asked", [name for name in ASKED if name != "data"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1), (4,), (3, 4, 2), (0, 3)], ids=str)
def test_another_shape_is_refused_with_both(asked: str, shape: tuple[int, ...]) -> None:
    ask = ASKED[asked]()
    if asked == "TangentKernel" and shape == (0, 3):
        assert ask(np.zeros(shape)).shape == (0, 0)
        return
    error = refusal(lambda: ask(np.ones(shape)))
    assert str(shape) in error.found
    assert "4" in error.expected + error.found


class Blocks(nn.Module):
    """The layer that refuses is deep inside, behind a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


@pytest.mark.parametrize(
    ("model", "shape", "found", "expected"),
    [
        (Blocks(), (2, 3, 5), "`Linear(in_features=12, out_features=5, bias=True)`, which was given (1, 15)", "…, 12)"),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), (2, 1, 5, 5), "(2, 1, 5, 5) float64", "(n, 3, …)"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)), (2, 5), "BatchNorm1d(4", "(n, 4, …)"),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1)), (2, 5), "LayerNorm", "(n, …, (4,))"),
    ],
    ids=str,
)
def test_the_layer_that_refuses_says_what_it_takes(model: nn.Module, shape: Any, found: str, expected: str) -> None:
    error = refusal(lambda: pk.TangentKernel(model.double())(np.ones(shape)))
    assert str(shape) in error.found and found in error.found and expected in error.expected


@pytest.mark.parametrize("asked", [name for name in ASKED if name != "data"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 7])
def test_a_query_that_is_not_finite_is_named(asked: str, value: float, row: int) -> None:
    X = COUNTS.astype(float)
    X[row, 2] = value
    assert refusal(lambda: ASKED[asked]()(X)).found.endswith(f"NaN or infinite numbers: row {row}")


def test_what_is_missing_in_a_table_is_named() -> None:
    table = pd.DataFrame(COUNTS, dtype="Int64")
    table.iloc[5, 1] = pd.NA
    assert refusal(lambda: pk.TangentKernel(network())(table)).found.endswith("row 5")
    flags = pd.DataFrame({"a": COUNTS[:, 0] * 1.0, "b": COUNTS[:, 1] > 0, "c": COUNTS[:, 2], "d": COUNTS[:, 3]})
    kernel = pk.TangentKernel(network())
    assert np.array_equal(kernel(flags), kernel(flags.astype(float).to_numpy()))


class Filled(nn.Linear):
    """A network that fills in what is missing, or takes a mask of zeros and minus infinities."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.nan_to_num(nan=0.5, neginf=-1.0))


def test_networks_made_for_missing_numbers_get_them() -> None:
    X = torch.tensor(COUNTS, dtype=torch.float32)
    X[2, 1], X[5, 0] = torch.nan, -torch.inf
    model = Filled(4, 3)
    expected = plain_kernel(model, X)
    np.testing.assert_allclose(pk.TangentKernel(model)(X), expected, rtol=1e-5)
    path = train(model, (X, LABELS))
    assert np.isfinite(pk.PathKernel(path)(X)).all() and np.isfinite(pk.KernelMachine(path).explain(X).shares).all()


# -- outputs and losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "jacobian", "layerwise", "products"])
def test_an_output_by_its_index(engine: str) -> None:
    model, X = network(torch.float64), torch.tensor(COUNTS, dtype=torch.float64)
    for index in (0, 2, -1, np.int64(1), np.uint8(1), np.int32(-3)):
        K = pk.TangentKernel(model, outputs=index, engine=engine)(X)
        np.testing.assert_allclose(K, plain_kernel(model, X, int(index)), rtol=1e-8)
    for index in (3, -4, 7, np.int64(5)):
        error = refusal(lambda index=index: pk.TangentKernel(model, outputs=index, engine=engine)(X))
        assert "3 outputs" in error.found and "from 0 to 2" in error.expected
        path = train(network(), (COUNTS, LABELS))
        assert "3 outputs" in refusal(lambda index=index, path=path: pk.PathKernel(path, outputs=index)).found


@pytest.mark.parametrize("outputs", [True, False, np.True_, 1.0, None, np.array([0, 1]), [0, 1], "first", nn.Linear])
def test_what_is_no_choice_of_outputs(outputs: Any) -> None:
    assert "must be" in refusal(lambda: pk.TangentKernel(network(), outputs=outputs)).expected


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss, "cross_entropy", 3])
def test_what_is_no_loss(loss: Any, tmp_path: Path) -> None:
    model, X = network(), torch.tensor(COUNTS, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = train(model, (X, LABELS), store=tmp_path / "run")
    for act in (
        lambda: pk.KernelRecorder(model, optimizer, loss, data=(X, LABELS)),
        lambda: pk.TangentKernel(model, outputs="loss", loss=loss),
        lambda: pk.Trajectory.open(tmp_path / "run", model=run.model, loss=loss, data=(X, LABELS)),
    ):
        error = refusal(act)
        assert error.found.startswith("`loss` is") and "()" in error.write


# -- scikit-learn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [4, 1])
@pytest.mark.parametrize("estimator", [KernelRidge, KernelPCA, Nystroem])
def test_callers_that_go_pair_by_pair_are_told_of_the_pipeline(estimator: Any, columns: int) -> None:
    X = COUNTS[:, :columns].astype(float)
    model = nn.Sequential(nn.Linear(columns, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, X[:, :1])) as recorder:
        for x, y in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    for kernel in (pk.TangentKernel(model), pk.PathKernel(recorder.trajectory)):
        fitted = estimator(kernel=kernel, **{"n_components": 3} if estimator is Nystroem else {})
        error = refusal(lambda fitted=fitted: fitted.fit(X, X[:, 0]))
        assert f"a single sample of shape ({columns},)" in error.found
        assert "PathKernelTransformer(kernel)" in error.write


class OfNumbers(nn.Module):
    """A network of one number a sample, without an axis for it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.w[0] * x, self.w[1] * x**2], dim=1)


def test_networks_of_single_numbers_are_no_pairs() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    expected = x[:, None] * x + x[:, None] ** 2 * x**2
    np.testing.assert_allclose(pk.TangentKernel(OfNumbers())(x), expected, rtol=1e-6)
    np.testing.assert_allclose(pk.TangentKernel(OfNumbers())(np.array([1, 2, 3])), expected, rtol=1e-6)
    table = nn.Embedding(5, 2)
    assert np.array_equal(pk.TangentKernel(table)(torch.tensor([1, 1, 3])), [[2, 2, 0], [2, 2, 0], [0, 0, 2]])


# -- arrays that are filled anew ---------------------------------------------------------------------------------------


def gaussian_process(kernel: Any, X: Any, y: Any) -> GaussianProcessRegressor:
    covariance = GaussianProcessKernel(kernel, scale_bounds="fixed") + WhiteKernel(0.1)
    return GaussianProcessRegressor(covariance, optimizer=None).fit(X, y)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_gaussian_process_answers_for_what_is_in_an_array(as_tensor: bool) -> None:
    generator = np.random.default_rng(1)
    X = generator.standard_normal((N, 4))
    kernel = pk.TangentKernel(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double())
    covariance, buffer = GaussianProcessKernel(kernel, scale=2.0), np.empty((5, 4))
    buffer = torch.from_numpy(buffer) if as_tensor else buffer
    process = gaussian_process(kernel, X, X[:, 0])
    for _ in range(3):
        candidates = generator.standard_normal((5, 4))
        buffer[:] = torch.from_numpy(candidates) if as_tensor else candidates
        fresh = buffer.clone() if as_tensor else buffer.copy()
        assert np.array_equal(covariance(buffer), 2.0 * kernel(fresh))
        assert np.array_equal(covariance(buffer, X), 2.0 * kernel(fresh, X))
        assert np.array_equal(covariance(X, buffer), 2.0 * kernel(X, fresh))
        if not as_tensor:
            right = gaussian_process(kernel, X, X[:, 0]).predict(fresh)
            assert np.array_equal(process.predict(buffer), right)


def test_a_covariance_answers_for_its_own_kernel_and_computes_a_matrix_once() -> None:
    asked = []

    class Counting(pk.TangentKernel):
        def __call__(self, X: Any, Y: Any = None) -> np.ndarray:
            asked.append(len(X))
            return super().__call__(X, Y)

    X = COUNTS.astype(float)
    covariance = GaussianProcessKernel(Counting(network()))
    trials = [covariance.clone_with_theta(np.array([t])) for t in (0.1, 0.2)]
    K = covariance(X)
    assert all(np.allclose(trial(X.copy()), np.exp(t) * K) for trial, t in zip(trials, (0.1, 0.2), strict=True))
    again = covariance.clone_with_theta(np.array([0.3]))
    assert np.allclose(again(X.copy()), np.exp(0.3) * K) and len(asked) == 3  # each of the trials once, never again
    other = Counting(network(torch.float64))
    with torch.no_grad():
        other.theta.mul_(0.5)
    covariance.set_params(kernel=other)
    assert np.array_equal(covariance(X), other(X))
    assert repr(GaussianProcessKernel(other, scale=2.0)) == "GaussianProcessKernel(Counting, scale=2)"
    both = "GaussianProcessKernel(Counting, scale=1) + WhiteKernel(noise_level=0.5)"
    assert repr(covariance + WhiteKernel(0.5)) == both


def test_the_reference_of_a_transformer_is_what_was_fitted() -> None:
    kernel, X = pk.TangentKernel(network(torch.float64)), COUNTS.astype(float)
    buffer = X.copy()
    transformer = PathKernelTransformer(kernel).fit(buffer)
    assert np.array_equal(transformer.transform(buffer), kernel(X))
    buffer *= 2
    assert np.array_equal(transformer.transform(buffer), kernel(2 * X, X))
    assert np.array_equal(transformer.transform(X.copy()), kernel(X))


def test_an_operator_is_of_the_samples_that_it_was_made_for() -> None:
    X, v = torch.tensor(COUNTS, dtype=torch.float32), np.arange(N, dtype=float)
    for kernel in (pk.TangentKernel(network()), pk.PathKernel(train(network(), (X, LABELS)))):
        buffer = X.clone()
        operator, expected = kernel.operator(buffer), kernel.operator(X) @ v
        buffer.mul_(2)
        assert np.array_equal(operator @ v, expected)


def test_queries_that_stream_along_and_announced_batches_are_kept_as_they_were() -> None:
    X = torch.tensor(COUNTS, dtype=torch.float32)
    queries, model = X[:3].clone(), network()
    gram, optimizer = StreamingGram(queries), torch.optim.SGD(model.parameters(), lr=0.1)
    queries.mul_(2)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, LABELS), schedule=Streaming(gram)) as recorder:
        for x, y in recorder.batches(batch_size=4):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    model, buffer = network(), torch.empty(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, LABELS)) as recorder:
        for ids in torch.arange(N).split(4):
            x, y = recorder.batch(ids, inputs=buffer.copy_(X[ids]))  # one array for every batch
            assert x.data_ptr() == buffer.data_ptr()
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    np.testing.assert_allclose(pk.PathKernel(recorder.trajectory)(X[:3]), gram.matrix, rtol=1e-6)
    why = pk.KernelMachine(recorder.trajectory).explain(X[:3])
    assert abs(why.residual).max() < 1e-5 and abs(why.channels["rounding"]).max() < 1e-6


def test_tensors_are_not_copied_without_need() -> None:
    X = np.ones((3, 4), dtype=np.float32)
    assert as_tensors(X, torch.float32).data_ptr() == X.ctypes.data
    assert as_tensors(torch.from_numpy(X), torch.float32).data_ptr() == X.ctypes.data


def test_a_dataset_of_pairs_of_dicts_is_recorded() -> None:
    network = Named()
    data = Items(lambda a, b: {"a": a, "b": b})
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with pk.KernelRecorder(network, optimizer, CE, data=data) as recorder:
        for x, y in recorder.track(DataLoader(pk.IndexedDataset(data), batch_size=4)):
            optimizer.zero_grad()
            CE(network(x), y).backward()
            optimizer.step()
    trajectory = recorder.trajectory
    assert abs(pk.KernelMachine(trajectory).explain(trajectory.data[torch.arange(3)][0]).residual).max() < 1e-5


@pytest.mark.parametrize("item", [{"x": 1}, torch.ones(4), (torch.ones(4),), "text", 3])
def test_items_that_are_no_pairs(item: Any) -> None:
    class Wrong(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            return item

    model = network()
    data = Wrong(torch.ones(N, 4), LABELS)
    recorder = pk.KernelRecorder(model, torch.optim.SGD(model.parameters()), CE, data=data)
    error = refusal(lambda: next(recorder.batches(4)))
    assert "`data` is a Wrong whose items are a" in error.found and "pairs (input, target)" in error.expected
