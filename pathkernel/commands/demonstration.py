"""The demo as a command."""

from __future__ import annotations

import argparse

from pathkernel import demo as job
from pathkernel.commands.stores import Result


def demo(arguments: argparse.Namespace) -> Result:
    """Run the main job."""
    result = job.run(arguments.seed, arguments.output, arguments.nodes, progress=not arguments.quiet)
    report = arguments.output / "report.html"
    return 0, result.numbers, f"{job.table(result)}\nreport: {report}"
