"""What benchmarks of a default share: their options, the machine that they name, and the file of their rows."""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import torch


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """Options ``--quick``, ``--choose`` and ``--json``, which all of them have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help=quick)
    options.add_argument("--choose", action="store_true", help="print what the default was chosen by, and end")
    options.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    return options


def on_one_thread() -> None:
    """Compute on one thread, and say where."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {time.strftime('%F')}")


def write(rows: list[dict[str, Any]], path: str | None) -> None:
    """Write the rows, where a file was asked for."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
