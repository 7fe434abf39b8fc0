"""Scripts in processes of their own, forked from one that has imported what they need: seconds, once for all."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest

IMPORTED = [
    "torch._dynamo",  # by the first optimizer
    "matplotlib.pyplot",
    "scipy.stats",
    *(f"sklearn.{name}" for name in ("datasets", "gaussian_process", "kernel_ridge", "model_selection", "svm")),
    "tqdm.auto",
    *(f"pathkernel.{name}" for name in ("dynamics.game", "estimators.path_kernels", "influence.datamodels")),
    *(f"pathkernel.{name}" for name in ("kernel_machine.kernel_machine", "path_kernel.path_kernel")),
    *(f"pathkernel.{name}" for name in ("plotting.attribution", "recording.recorder", "storage.disk")),
    *(f"pathkernel.{name}" for name in ("tangent_kernel.operators", "update_rules.table")),
]
ENVIRONMENT = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}


def run_script(script: Path, arguments: tuple[str, ...], folder: Path, said: Path, seconds: float | None = None) -> int:
    """The exit status of a script, run in `folder` as ``python script arguments``; what it says goes to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_as_main, args=(script, arguments, folder, said))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"{script.name} was not done after {seconds} seconds: {said.read_text('utf-8')[-3000:]}")
    return process.exitcode


def _as_main(script: Path, arguments: tuple[str, ...], folder: Path, said: Path) -> None:
    with open(said, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # `multiprocessing` leaves out in silence what it does not find.
    assert not set(IMPORTED) - set(sys.modules), f"not imported before: {set(IMPORTED) - set(sys.modules)}"
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    # As python has it: the script's own folder, and none of those that tests share.
    sys.path[:] = [str(script.parent), *(path for path in sys.path if path != str(Path(__file__).parent))]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
