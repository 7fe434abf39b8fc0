"""The command line: ``pathkernel demo``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pathkernel import __version__
from pathkernel.errors import PathKernelError


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def demo(arguments: argparse.Namespace) -> int:
    """Run the main job and print its table."""
    # Imported here: `pathkernel --help` should not wait for torch.
    from pathkernel import demo as job

    result = job.run(arguments.seed, arguments.output, arguments.nodes, progress=not arguments.quiet)
    print(job.table(result))
    print(f"report: {arguments.output / 'report.html'}")
    if arguments.json is not None:
        write_json(arguments.json, result.numbers)
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    commands = argparse.ArgumentParser(prog="pathkernel", description="Trained networks as kernel machines.")
    commands.add_argument("--version", action="version", version=f"pathkernel {__version__}")
    subcommands = commands.add_subparsers(dest="command", required=True, metavar="COMMAND")
    job = subcommands.add_parser(
        "demo",
        help="train a network on handwritten digits and turn it into a kernel machine",
        description="Trains a small network on scikit-learn's handwritten digits under a KernelRecorder, reproduces it "
        "by its exact kernel machine, trains an SVC on its path kernel, and writes a report.",
    )
    job.add_argument("--json", type=Path, metavar="FILE", help="write every printed number to FILE")
    job.add_argument("--seed", type=int, default=0, help="of split, weights and batches (default 0)")
    job.add_argument(
        "--output", type=Path, default=Path("pathkernel-demo"), metavar="DIR", help="where report.html goes"
    )
    job.add_argument("--nodes", type=int, default=8, help="steps of the path that the path kernel uses (default 8)")
    job.add_argument("--quiet", action="store_true", help="no progress bars")
    job.set_defaults(run=demo)
    return commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit code 0 on success, 2 for bad input."""
    parsed = parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except PathKernelError as error:
        print(f"pathkernel {parsed.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
