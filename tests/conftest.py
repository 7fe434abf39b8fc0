"""One thread, and shapes checked at run time where the package states them."""

from __future__ import annotations

import os
import random

import hypothesis
import pytest
import torch
from beartype._check.code import codemain
from beartype._util.kind.integer import utilintget
from jaxtyping import install_import_hook

# beartype draws which item of a list it looks at: from numbers of its own, as a user's are to stay as they are.
codemain.getrandbits = utilintget.getrandbits = random.Random(0).getrandbits

# These are the modules that write shapes, which test_house.py sees to; they are hooked before the package is imported.
SHAPED = [
    "pathkernel.gradients.acceptance",
    "pathkernel.gradients.contraction",
    "pathkernel.gradients.factored",
    "pathkernel.gradients.gradient_source",
    "pathkernel.gradients.layers.coverage",
    "pathkernel.gradients.layers.factor",
    "pathkernel.gradients.layers.factors",
    "pathkernel.gradients.layers.tape",
    "pathkernel.gradients.losses",
    "pathkernel.gradients.matmul",
    "pathkernel.gradients.model_function",
    "pathkernel.gradients.parameters",
    "pathkernel.gradients.per_sample",
    "pathkernel.gradients.pushed_shares",
    "pathkernel.gradients.sample_wise",
    "pathkernel.kernel_machine.queries",
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
    "pathkernel.trajectory.stage_gradients",
]
# Checking all of them takes as long again as the tests: by default a few, and all in the run that test_house.py makes.
USUALLY = [
    "pathkernel.gradients.losses",
    "pathkernel.gradients.model_function",
    "pathkernel.gradients.per_sample",
    "pathkernel.kernel_machine.queries",
]
install_import_hook(SHAPED if os.environ.get("PATHKERNEL_CHECK_SHAPES") == "all" else USUALLY, "beartype.beartype")

torch.set_num_threads(1)

# The same examples in every run: a failure is a fact about the code, not about the day.
hypothesis.settings.register_profile("pathkernel", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("pathkernel")


TABLES = {
    "tests/gradients/test_split.py": 2,
    "tests/gradients/test_zoo.py": 3,
    "tests/kernel_machine/test_memory_plan.py": 3,
    "tests/kernel_machine/test_shares_error.py": 2,
    "tests/recording/test_training_is_as_without.py": 3,
    "tests/runtime/test_pickling.py": 2,
    "tests/tangent_kernel/test_layerwise.py": 2,
    "tests/update_rules/test_torch_optimizers.py": 2,
}
"""Large tables, of which every run takes the first and every so many rows; ``-m exhaustive`` takes the rest. Together
they would take longer than all other tests."""

SMALL_TABLE = 8
"""Rows up to which a table is run whole."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the rows of large tables that are left out unless asked for."""
    rows: dict[str, list[pytest.Item]] = {}
    for item in items:
        path, _, name = item.nodeid.partition("::")
        if path in TABLES and hasattr(item, "callspec"):
            rows.setdefault(f"{path}::{name.partition('[')[0]}", []).append(item)
    for function, own in rows.items():
        every = TABLES[function.partition("::")[0]]
        for place, item in enumerate(own):
            if len(own) > SMALL_TABLE and place % every:
                item.add_marker(pytest.mark.exhaustive)
