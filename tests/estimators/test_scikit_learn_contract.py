"""scikit-learn's own checks of an estimator: none fails, none is left out, and none is expected to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Networks as small, and trainings as short, as the checks allow that ask for accuracy.
SMALL = "hidden=(8,), epochs=6, learning_rate=0.1, batch_size=50"
OF_A_KERNEL = f"steps=1, {SMALL}"

ESTIMATORS = {
    "KernelMachineClassifier": SMALL,
    "KernelMachineRegressor": SMALL,
    "PathKernelSVC": OF_A_KERNEL,
    "PathKernelSVR": OF_A_KERNEL,
    "PathKernelRidge": OF_A_KERNEL,
    "PathKernelRidgeClassifier": OF_A_KERNEL,
    "PathKernelGP": OF_A_KERNEL,
    "PathKernelGPClassifier": OF_A_KERNEL,
}

CHECKED = """
import warnings
import torch
torch.set_num_threads(1)
from sklearn.utils.estimator_checks import check_estimator
import pathkernel as pk

warnings.simplefilter("ignore")
for estimator in ({estimators}):
    found = check_estimator(estimator, on_skip=None, on_fail=None)
    assert len(found) > 45
    wrong = [str((one["check_name"], one["status"], one["exception"])) for one in found if one["status"] != "passed"]
    assert not wrong, type(estimator).__name__ + "\\n" + "\\n".join(wrong)
"""


@pytest.mark.slow
def test_estimators_pass_every_check() -> None:
    # A process of its own: scipy reads this variable when it is imported, and without it checks of array types are
    # left out.
    made = ", ".join(f"pk.{name}({options})" for name, options in ESTIMATORS.items())
    done = subprocess.run(
        [sys.executable, "-c", CHECKED.format(estimators=made)],
        cwd=ROOT, env=os.environ | {"SCIPY_ARRAY_API": "1"}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
