"""The public face: every name is where the documentation says, in a process that has imported nothing else."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from cases import record
from fresh_processes import FINE, in_a_fresh_process, raised_by

import pathkernel as pk

ROOT = Path(__file__).resolve().parent.parent

AUTHORS = {
    "pathkernel.gradients.layers": ["Dense", "Factor", "Lookup", "NoRule", "Outer", "layer_rule"],
    "pathkernel.trajectory": ["MemoryStore", "MicroBatch", "Segment", "Step", "StepObserver", "Store", "Trajectory"],
    "pathkernel.tangent_kernel.engines": ["Engine", "Projection"],
    "pathkernel.optimizers": ["Heun", "Lion", "Momentum", "RungeKutta4", "leapfrog"],
    "pathkernel.analysis": ["effective_rank", "kernel_alignment", "kernel_velocity"],
    "pathkernel.kernels": ["CenteredKernel", "CosineKernel", "Kernel", "RepairedKernel", "distance"],
    "pathkernel.plotting": ["AttributionDisplay", "GramDisplay", "SpectrumDisplay", "write_report"],
    "pathkernel.estimators": ["GaussianProcessKernel", "PathKernelFeatures", "PathKernelTransformer"],
}
"""What authors of layers, stores, engines and observers import, and from where."""


def one_import(name: str) -> str:
    return f"import pathkernel as pk; assert pk.{name}.__name__ == {name.split('.')[1]!r}"


ELEMENTS = (
    *("errors.InputError", "testing.check_update_rule", "plotting.GramDisplay", "analysis.effective_rank"),
    "optimizers.Lion",
)


@pytest.mark.parametrize("name", ELEMENTS)
def test_submodules_need_no_second_import(name: str) -> None:
    assert raised_by(tuple(map(one_import, ELEMENTS)))[one_import(name)] == FINE


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'scipy', 'sklearn', 'matplotlib', 'zarr', 'numcodecs', 'jinja2', 'tqdm'}"
    in_a_fresh_process(f"import sys, pathkernel; assert not {heavy} & set(sys.modules), sys.modules.keys()")


FIRST_USES = """
import sys
import torch
import pathkernel as pk

X, y = torch.randn(6, 3), torch.randn(6, 2)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
kernel = pk.TangentKernel(model)
kernel(X), kernel.diagonal(X)
assert "scipy" not in sys.modules, "of a tangent kernel"
loss, optimizer = torch.nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)
with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    for x, target in recorder.batches(batch_size=3):
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
pk.KernelMachine(recorder.trajectory).explain(X[:2])
assert "scipy" not in sys.modules, "of a kernel machine"
pk.PathKernel(recorder.trajectory)(X)
assert "scipy" not in sys.modules, "of a path kernel"
kernel.operator(X) @ torch.ones(6).numpy()
pk.PathKernel(recorder.trajectory, tolerance=0.5), kernel.features(X)
assert {"scipy.sparse.linalg", "scipy.optimize"} <= set(sys.modules)
"""


def test_first_uses_load_no_scipy_that_they_do_not_need() -> None:
    in_a_fresh_process(FIRST_USES)


@pytest.mark.parametrize("home", AUTHORS)
def test_authors_find_their_names(home: str) -> None:
    codes = {home: f"from {home} import {', '.join(names)}" for home, names in AUTHORS.items()}
    assert raised_by(tuple(codes.values()))[codes[home]] == FINE


def test_every_public_name_is_found_and_listed() -> None:
    for name in pk.__all__:
        assert getattr(pk, name) is not None and name in dir(pk)
    told = set(re.findall(r"^    from pathkernel\.[\w.]+ import (\w+) as", inspect.getsource(pk), flags=re.MULTILINE))
    assert told == {n for n in pk.__all__ if not n.startswith("_") and not inspect.ismodule(getattr(pk, n))}


LAZY = [pk.analysis, pk.dynamics, pk.optimizers, pk.plotting, *map(import_module, AUTHORS)]
LAZY += [import_module(f"pathkernel.{name}") for name in ("path_kernel", "kernel_machine")]


@pytest.mark.parametrize("module", {each.__name__: each for each in LAZY}.values(), ids=lambda each: each.__name__)
def test_a_type_checker_is_told_every_name_and_no_other(module: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(module))
    branches = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.asname for node in branches for child in node.body for alias in getattr(child, "names", [])}
    assert told == set(module.__all__)
    loaded = [node for node in tree.body if "__getattr__" in ast.unparse(node)]
    assert all(node in branches and ast.unparse(node.test) == "not TYPE_CHECKING" for node in loaded)


def listed_in_the_reference() -> set[str]:
    """Full names in the autosummaries of docs/reference/index.md."""
    names, module = set(), ""
    for line in (ROOT / "docs" / "reference" / "index.md").read_text("utf-8").splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split(":: ")[1]
        elif re.fullmatch(r"   [\w.]+", line):
            names.add(f"{module}.{line.strip()}")
    return names


def test_the_reference_lists_every_public_name() -> None:
    names = listed_in_the_reference()
    callbacks = {name for name in names if name.startswith("pathkernel.callbacks.")}  # their frameworks may be missing
    assert callbacks == {f"pathkernel.callbacks.{name}" for name in pk.callbacks.__all__}
    listed = {resolved(name) for name in names - callbacks}
    missing = [name for name in pk.__all__ if not name.startswith("_") and not inspect.ismodule(getattr(pk, name))]
    missing = [name for name in missing if getattr(pk, name) not in listed]
    for module in (pk.errors, pk.testing, pk.plotting, pk.analysis, pk.kernels, pk.optimizers):
        public = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, Exception | Warning) and value.__module__ == module.__name__
        ]
        missing += [f"{module.__name__}.{name}" for name in public if getattr(module, name) not in listed]
    assert not missing


def resolved(name: str) -> object:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: object = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def test_older_names_stay_and_say_nothing(recwarn: pytest.WarningsRecorder) -> None:
    run = record()
    assert pk.KernelRecorder.batch is pk.KernelRecorder.announce
    assert pk.TangentKernel.explain is pk.TangentKernel.describe
    why = pk.KernelMachine(run.trajectory).explain(run.queries)
    np.testing.assert_array_equal(why.samples, why.query_index)
    np.testing.assert_array_equal(why.outputs, why.output_index)
    model = torch.nn.Linear(4, 3).double()
    optimizer, averaged = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.swa_utils.AveragedModel(model)
    loss, averages = torch.nn.CrossEntropyLoss(), {"ema": averaged}
    with pk.KernelRecorder(model, optimizer, loss, data=(run.X, run.y), averages=averages) as recorder:
        x, y = recorder.batch([0, 1])
        loss(model(x), y).backward()
        optimizer.step()
        averaged.update_parameters(model)
    old, new = (pk.KernelMachine(recorder.trajectory, **{name: "ema"}) for name in ("weights", "average"))
    np.testing.assert_array_equal(old.decision_function(run.queries), new.decision_function(run.queries))
    assert repr(old) == repr(new) and "average='ema'" in repr(new)
    assert not [w for w in recwarn if "pathkernel" in str(w.filename)]


# -- extras -----------------------------------------------------------------------------------------------------------

EXTRAS = {
    "plot": (["matplotlib", "jinja2"], "import pathkernel as pk; pk.plotting"),
    "dynamics": (["torchdiffeq"], """
import torch, pathkernel as pk
data = torch.randn(4, 2), torch.randn(4, 1)
pk.dynamics.gradient_flow(torch.nn.Linear(2, 1), torch.nn.MSELoss(), data)
"""),
    "store": (["numcodecs", "filelock"], "import pathkernel as pk; pk.DiskStore('nowhere')"),
    "pandas": (["pandas"], TRAINED := """
import torch, pathkernel as pk
X, y, model = torch.randn(8, 4), torch.tensor([0, 1] * 4), torch.nn.Linear(4, 2)
optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.CrossEntropyLoss()
with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    for x, target in recorder.batches(4):
        optimizer.zero_grad()
        loss(model(x), target).backward()
        optimizer.step()
assert pk.PathKernel(recorder.trajectory)(X).shape == (8, 8)
pk.KernelMachine(recorder.trajectory).explain(X).to_frame()
"""),
}  # fmt: skip


def libraries_of_extras() -> list[str]:
    """The libraries of all extras, but for filelock: it comes with torch, which imports it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    names = {re.split(r"[\[>=]", name)[0] for extra in declared.values() for name in extra} - {"pathkernel"}
    return sorted(names - {"filelock"})


def without(libraries: list[str], code: str) -> str:
    """The code, run where none of these is found."""
    return f"import sys; sys.modules.update(dict.fromkeys({libraries!r}))\n{code}"


WITHOUT = {extra: without(*tried) for extra, tried in EXTRAS.items()}
WITHOUT["all"] = without(libraries_of_extras(), TRAINED.replace(".to_frame()", ""))


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_named(extra: str) -> None:
    libraries, _ = EXTRAS[extra]
    said = raised_by(tuple(WITHOUT.values()))[WITHOUT[extra]]
    assert said.startswith("pathkernel.errors.MissingExtraError: ") and f"needs `{libraries[0]}`" in said
    assert f"comes with the extra `[{extra}]`" in said and f"pip install 'pathkernel[{extra}]'" in said


def test_recording_in_memory_needs_no_extra() -> None:
    assert raised_by(tuple(WITHOUT.values()))[WITHOUT["all"]] == FINE
