"""Scripts in processes of their own, forked from one that has imported what they need, which takes seconds each time."""

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
    "sklearn.datasets",
    "sklearn.gaussian_process",
    "sklearn.model_selection",
    "sklearn.svm",
    "scipy.stats",
    "matplotlib.pyplot",
    *(f"pathkernel.{name}" for name in ("path_kernel", "kernel_machine", "influence", "estimators", "plotting")),
    *(f"pathkernel.{name}" for name in ("update_rules.table", "recording.recorder", "storage.disk")),
]
ENVIRONMENT = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}


def run_script(script: Path, arguments: tuple[str, ...], folder: Path, said: Path) -> int:
    """The exit status of a script, run in `folder` as ``python script arguments``; what it says goes to a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_as_main, args=(script, arguments, folder, said))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _as_main(script: Path, arguments: tuple[str, ...], folder: Path, said: Path) -> None:
    with open(said, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    # As python has it: the script's own folder, and none of those that tests share.
    sys.path[:] = [str(script.parent), *(path for path in sys.path if path != str(Path(__file__).parent))]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
