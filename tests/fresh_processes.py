"""Code in processes that have imported torch, which takes longest, and nothing else: forked from one."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FINE = "nothing was raised"

FORKING = """
import os, sys, traceback
import torch  # which takes longest, once for all; the package is left for each to import
for code in {codes!r}:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        exec(code, {{}})
        print({fine!r}, flush=True)
    except BaseException:
        print(traceback.format_exc().strip().splitlines()[-1], flush=True)
    finally:
        os._exit(0)
"""


def in_a_fresh_process(code: str, **environment: str) -> str:
    """What the code prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | environment, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def raised_by(codes: tuple[str, ...], **environment: str) -> dict[str, str]:
    """The last line of what each code raises, or `FINE`."""
    said = in_a_fresh_process(FORKING.format(codes=codes, fine=FINE), **environment).splitlines()
    return dict(zip(codes, said, strict=True))
