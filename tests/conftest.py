"""One thread, and shapes checked at run time where the package states them."""

from __future__ import annotations

import os
import random
from collections import Counter

import hypothesis
import pytest
import torch
from beartype._check.code import codemain
from beartype._util.kind.integer import utilintget
from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

# beartype draws which item of a list it looks at: from numbers of its own, as a user's are to stay as they are.
codemain.getrandbits = utilintget.getrandbits = random.Random(0).getrandbits

# These are the modules that write shapes, which test_house.py sees to; they are hooked before the package is imported.
SHAPED = [
    "pathkernel.gradients.acceptance",
    "pathkernel.gradients.contraction",
    "pathkernel.gradients.factored",
    "pathkernel.gradients.gradient_source",
    "pathkernel.gradients.inner_products",
    "pathkernel.gradients.layers.coverage",
    "pathkernel.gradients.layers.factor",
    "pathkernel.gradients.layers.factors",
    "pathkernel.gradients.layers.proved_stacks",
    "pathkernel.gradients.layers.recorded_passes",
    "pathkernel.gradients.layers.stacked_passes",
    "pathkernel.gradients.layers.stacked_pieces",
    "pathkernel.gradients.layers.tape",
    "pathkernel.gradients.losses",
    "pathkernel.gradients.matmul",
    "pathkernel.gradients.model_function",
    "pathkernel.gradients.parameters",
    "pathkernel.gradients.per_sample",
    "pathkernel.gradients.pushed_shares",
    "pathkernel.gradients.sample_wise",
    "pathkernel.kernel_machine.queries",
    "pathkernel.kernel_machine.scaled_steps",
    "pathkernel.kernel_machine.stacked_segments",
    "pathkernel.kernel_machine.step_contributions",
    "pathkernel.path_kernel.features",
    "pathkernel.path_kernel.node_selection",
    "pathkernel.path_kernel.nodes",
    "pathkernel.path_kernel.streaming",
    "pathkernel.tangent_kernel.engines.jacobian_products",
    "pathkernel.tangent_kernel.engines.layerwise",
    "pathkernel.tangent_kernel.engines.projection",
    "pathkernel.tangent_kernel.engines.tiles",
    "pathkernel.tangent_kernel.measured_error",
    "pathkernel.tangent_kernel.operators",
    "pathkernel.tangent_kernel.output_probes",
    "pathkernel.trajectory.coupled_samples",
    "pathkernel.trajectory.split_certificate",
    "pathkernel.trajectory.stage_gradients",
]
# Checking all of them takes as long again as the tests: by default a few, and all in the run that test_house.py makes.
USUALLY = [
    "pathkernel.gradients.losses",
    "pathkernel.gradients.model_function",
    "pathkernel.gradients.per_sample",
    "pathkernel.kernel_machine.queries",
]
ALL_SHAPES = os.environ.get("PATHKERNEL_CHECK_SHAPES") == "all"
install_import_hook(SHAPED if ALL_SHAPES else USUALLY, "beartype.beartype")

torch.set_num_threads(1)

# The same examples in every run: a failure is a fact about the code, not about the day.
hypothesis.settings.register_profile("pathkernel", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("pathkernel")


TABLES = {
    "tests/gradients/layers/test_architectures.py": 5,
    "tests/gradients/test_split.py": 9,
    "tests/gradients/test_zoo.py": 12,
    "tests/kernel_machine/test_backward_sweep.py": 8,
    "tests/kernel_machine/test_forms.py": 8,
    "tests/kernel_machine/test_kernel_machine.py": 8,
    "tests/kernel_machine/test_memory_plan.py": 12,
    "tests/kernel_machine/test_shares_error.py": 10,
    "tests/recording/test_batch_axis_and_watch.py": 5,
    "tests/recording/test_call_forms.py": 5,
    "tests/recording/test_captured_cotangents.py": 8,
    "tests/recording/test_compiled.py": 5,
    "tests/recording/test_kept_inputs.py": 5,
    "tests/recording/test_layers_with_state.py": 5,
    "tests/recording/test_losses_and_shapes.py": 5,
    "tests/recording/test_observing.py": 5,
    "tests/recording/test_recorder.py": 9,
    "tests/recording/test_resume.py": 5,
    "tests/recording/test_schedule.py": 5,
    "tests/recording/test_training_is_as_without.py": 10,
    "tests/runtime/test_other_device.py": 5,
    "tests/runtime/test_pickling.py": 9,
    "tests/storage/test_levels_on_disk.py": 5,
    "tests/storage/test_question.py": 4,
    "tests/tangent_kernel/test_layerwise.py": 9,
    "tests/tangent_kernel/test_operators.py": 5,
    "tests/tangent_kernel/test_projection.py": 5,
    "tests/tangent_kernel/test_tangent_kernel.py": 5,
    "tests/test_inputs.py": 5,
    "tests/trajectory/test_coupled_samples.py": 5,
    "tests/trajectory/test_discrepancies.py": 5,
    "tests/trajectory/test_replay.py": 8,
    "tests/update_rules/test_torch_optimizers.py": 10,
}
"""Large tables, of which every run takes the first and every so many rows, and rows for what these leave out of the
optimizers, levels, networks … that a table combines; ``-m exhaustive`` takes the rest. Together they would take longer
than all other tests."""

SMALL_TABLE = 8
"""Rows up to which a table of one parameter is run whole."""

SMALL_PRODUCT = 4
"""Rows up to which one is that combines the values of several, each of which is in a row that is run."""

LONGEST = ("test_scripts.py", "test_house.py")
"""Files whose slow tests take up to a minute each."""

MANY = 30
"""Values up to which a parameter of a table, if it is not the only one, has each of them in a row that is run."""

UNCHECKED = pytest.StashKey[bool]()
CHECKED_ROWS = 5
"""Of the rows of a parametrized test, the first and every so many are run with their shapes checked, which takes a
fifth of the time of a test; tests by themselves always are."""

OF_ONE = 4
"""At most so many rows to one that is run, where a table has one parameter: every row is something else."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the rows of large tables that are left out unless asked for, and begin with what takes longest."""
    # pytest-xdist gives each worker tests that follow each other: these would keep one busy when all others are done.
    items.sort(key=lambda item: not (item.path.name in LONGEST and item.get_closest_marker("slow")))
    rows: dict[str, list[pytest.Item]] = {}
    for item in items:
        path, _, name = item.nodeid.partition("::")
        if path in TABLES and hasattr(item, "callspec"):
            rows.setdefault(f"{path}::{name.partition('[')[0]}", []).append(item)
    for function, own in rows.items():
        run = rows_to_run(own, TABLES[function.partition("::")[0]])
        for item in own:
            if item not in run:
                item.add_marker(pytest.mark.exhaustive)
    met: Counter[str] = Counter()
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("exhaustive"):
            function = item.nodeid.partition("[")[0]
            item.stash[UNCHECKED] = bool(met[function] % CHECKED_ROWS) and not ALL_SHAPES
            met[function] += 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes, or leave it to another row of the same table."""
    shape_checks.update("jaxtyping_disable", item.stash.get(UNCHECKED, False))


def rows_to_run(table: list[pytest.Item], every: int) -> set[pytest.Item]:
    """Every so many rows, and few that have the values that none of these has."""
    values = {item: {(name, id(value)) for name, value in item.callspec.params.items()} for item in table}
    many = Counter(name for name, _ in set().union(*values.values()))
    of_one = max(many.values()) == len(table)
    if len(table) <= (SMALL_TABLE if of_one else SMALL_PRODUCT):
        return set(table)
    every = min(every, OF_ONE) if of_one else every
    there = [item for item in table if not item.get_closest_marker("exhaustive")]
    run = {item for item in table[::every] if item in there}
    few = {name for name, number in many.items() if number <= MANY and number < len(table)}
    wanted = {(name, value) for item in there for name, value in values[item] if name in few}
    wanted -= set().union(*(values[item] for item in run))
    while wanted:
        run.add(most := max(there, key=lambda item: len(values[item] & wanted)))
        wanted -= values[most]
    return run
