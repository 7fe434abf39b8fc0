"""The command line: ``pathkernel COMMAND``; what the commands do is in `pathkernel.cli`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pathkernel._version import __version__
from pathkernel.errors import PathKernelError

EXIT_CODES = "exit codes: 0 success, 1 damage found, 2 bad input, 130 interrupted (what is finished is kept)"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file at once or not at all."""
    from pathkernel.storage.format import write_atomically  # `pathkernel --help` should not wait for numpy

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [f"{json.dumps(value, indent=2)}\n".encode()])


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    commands = argparse.ArgumentParser(
        prog="pathkernel", description="Trained networks as kernel machines.", epilog=EXIT_CODES
    )
    commands.add_argument("--version", action="version", version=f"pathkernel {__version__}")
    subcommands = commands.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        *(_demo, _flow, _game, _plan, _info, _verify, _gram, _explain),
        *(_labels, _duplicates, _prune, _label_next, _export),
    ):
        own = add(subcommands)
        own.add_argument("--json", type=Path, metavar="FILE", help="write every printed number to FILE")
        own.epilog = EXIT_CODES
    return commands


def _demo(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "demo",
        help="train a network on handwritten digits and turn it into a kernel machine",
        description="Trains a small network on scikit-learn's handwritten digits under a KernelRecorder, reproduces it "
        "by its exact kernel machine, trains an SVC on its path kernel, and writes a report.",
    )
    job.add_argument("--seed", type=int, default=0, help="of split, weights and batches (default 0)")
    job.add_argument(
        "--output", type=Path, default=Path("pathkernel-demo"), metavar="DIR", help="where report.html goes"
    )
    job.add_argument("--tolerance", type=float, default=1e-3, help="relative error of the path kernel (default 1e-3)")
    job.add_argument("--quiet", action="store_true", help="no progress bars")
    job.set_defaults(run_command="pathkernel.cli.demo:demo")
    return job


def _game(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "game",
        help="two networks that are trained against each other, and a picture",
        description="Plays a built-in game. dirac: the variants of the Dirac GAN, with their eigenvalues and their "
        "trajectories under simultaneous and alternating updates. gaussians, digits: a small GAN on a mixture of eight "
        "Gaussians or on scikit-learn's handwritten digits, both of its players as exact kernel machines, and which "
        "real and generated samples shaped the discriminator's view of a sample.",
    )
    job.add_argument("example", nargs="?", default="dirac", choices=("dirac", "gaussians", "digits"), metavar="EXAMPLE",
                     help="dirac (default), gaussians or digits")  # fmt: skip
    job.add_argument("--rounds", type=int, help="steps of the generator (default: as the example needs)")
    job.add_argument("--rate", type=float, default=0.2, help="of the steps whose stability is reported (default 0.2)")
    job.add_argument("--seed", type=int, default=0, help="of weights, batches and latents (default 0)")
    job.add_argument(
        "--output", type=Path, metavar="FILE", help="the picture, .png, .svg or .pdf (default game-EXAMPLE.png)"
    )
    job.add_argument("--quiet", action="store_true", help="no progress bars")
    job.set_defaults(run_command="pathkernel.cli.game:game")
    return job


def _plan(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "plan",
        help="what recording costs, before anybody trains",
        description="Prints, for each level of record, what it serves, its bytes and its extra compute.",
    )
    job.add_argument("size", metavar="MODEL-SIZE", help="parameters, such as 85000, 85k or 1.2M")
    job.add_argument("steps", metavar="STEPS", help="optimizer steps, such as 500 or 10k")
    job.add_argument("--optimizer", default="adamw", help="sgd, momentum, adamw, … (default adamw)")
    job.add_argument("--batch-size", type=int, default=64, help="samples per step (default 64)")
    job.add_argument("--bytes", type=int, default=4, help="per number (default 4: float32)")
    job.set_defaults(run_command="pathkernel.cli.kernels:plan")
    return job


def _info(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser("info", help="what a store holds")
    job.add_argument("run", metavar="RUN", help="the folder given to KernelRecorder(..., store=RUN)")
    job.set_defaults(run_command="pathkernel.cli.stores:info")
    return job


def _verify(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "verify", help="read everything and check it: exit code 1 where something is damaged"
    )
    job.add_argument("run", metavar="RUN", help="the folder given to KernelRecorder(..., store=RUN)")
    job.set_defaults(run_command="pathkernel.cli.stores:verify")
    return job


def _computing(job: argparse.ArgumentParser, resumable: bool = True) -> None:
    job.add_argument("run", metavar="RUN", help="the folder given to KernelRecorder(..., store=RUN)")
    job.add_argument(
        "--model", required=True, metavar="PLACE", help="makes the network: module:function or file.py:function"
    )
    job.add_argument(
        "--data", required=True, metavar="FILE", help="training data: .npz with arrays X and y, or module:name"
    )
    job.add_argument("--loss", metavar="PLACE", help="module:name; by default as recorded, if it is one of torch.nn")
    job.add_argument("--rule", metavar="PLACE", help="module:name; by default as recorded, if it is one of pathkernel")
    job.add_argument(
        "--optimizer", metavar="PLACE", help="module:name; with keyframes, by default as recorded, from torch.optim"
    )
    job.add_argument("--regularizers", metavar="PLACE", help="module:name of the mapping given to KernelRecorder")
    if resumable:
        job.add_argument("--store", type=Path, metavar="DIR", help="keep what is finished here, and go on from it")
    job.add_argument("--output", type=Path, metavar="FILE", help="write the arrays to an .npz file")
    job.add_argument("--memory", default="1GB", help="budget for intermediate results (default 1GB)")
    job.add_argument("--quiet", action="store_true", help="no progress bars")


def _gram(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "gram",
        help="the Gram matrix of a path kernel",
        description="Computes K(queries, training samples), or K of the training samples with themselves.",
    )
    _computing(job)
    job.add_argument("--queries", metavar="FILE", help=".npz with an array X, or .npy")
    job.add_argument("--outputs", default="trace", help='"trace" (default), "mean", "sum", "full", or an index')
    job.add_argument("--measure", default="learning_rate", help='"learning_rate" (default), "arc_length", "uniform"')
    job.add_argument("--preconditioner", help='"optimizer" for the optimizer\'s own scaling')
    job.add_argument("--steps", type=int, help="how many steps of the path to use (default all)")
    job.add_argument("--tolerance", type=float, help="choose the nodes of the path to this relative error")
    job.set_defaults(run_command="pathkernel.cli.kernels:gram")
    return job


def _explain(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "explain",
        help="which training samples moved some outputs",
        description="Computes the exact shares of all training samples in the outputs of some queries.",
    )
    _computing(job)
    job.add_argument("--queries", required=True, metavar="FILE", help=".npz with an array X, or .npy")
    job.add_argument("--output-index", type=int, help="which output (default: the predicted class)")
    job.add_argument("--top", type=int, default=5, help="samples to print for each query (default 5)")
    job.set_defaults(run_command="pathkernel.cli.kernels:explain")
    return job


def _labels(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "labels",
        aliases=["audit"],
        help="which training samples may have wrong labels, and why",
        description="Ranks the training samples by how doubtful their labels are, from what one recorded run did with "
        "them, and names the samples that pulled the other way.",
    )
    _computing(job)
    job.add_argument("--top", type=int, default=20, help="samples to list (default 20)")
    job.add_argument("--nodes", type=int, default=20, help="points of the path that are looked at (default 20)")
    job.add_argument("--reasons", type=int, default=3, help="samples that pulled the other way, for each (default 3); "
                     "0 for none, which leaves out the most expensive part")  # fmt: skip
    job.add_argument("--picture", type=Path, metavar="FILE", help="draw the samples, .png, .svg or .pdf (images only)")
    job.set_defaults(run_command="pathkernel.cli.labels:labels")
    return job


def _duplicates(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "duplicates",
        help="which samples are there twice, or leaked from training into test",
        description="Lists pairs of samples that are near-duplicates under a kernel of the network: among the training "
        "samples, or between them and test samples. What counts follows from the distances of neighbours.",
    )
    _computing(job, resumable=False)
    job.add_argument("--test", metavar="FILE", help="test samples: .npz with an array X, and y to compare labels; .npy")
    job.add_argument("--top", type=int, default=20, help="pairs to list (default 20)")
    job.add_argument("--kernel", default="path", choices=("path", "initial", "final", "inputs"),
                     help="along the training (default), before or after it, or of the inputs")  # fmt: skip
    job.add_argument("--steps", type=int, default=10, help="steps of the path to use (default 10); 0 for all")
    job.add_argument("--copies", type=int, default=3, help="near-duplicates of a sample, at most (default 3)")
    job.add_argument("--false-discovery-rate", type=float, default=0.05, metavar="RATE",
                     help="part of what is found that may be there by chance (default 0.05)")  # fmt: skip
    job.add_argument("--dimension", type=float, help="of the data, where few test samples are given (default: found)")
    job.add_argument("--picture", type=Path, metavar="FILE", help="draw the pairs, .png, .svg or .pdf (images only)")
    job.set_defaults(run_command="pathkernel.cli.duplicates:duplicates")
    return job


def _prune(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "prune",
        help="which training samples can be left out with least loss",
        description="Chooses the training samples that are kept, from what one recorded run learnt of them, so that "
        "training again on them alone loses least.",
    )
    _computing(job)
    job.add_argument("--keep", default="0.5", metavar="PART", help="the part that is kept, or how many (default 0.5)")
    criteria = ("gradient_herding", "self_influence", "area_under_margin", "final_loss")
    job.add_argument("--criterion", default=criteria[0], choices=criteria, metavar="NAME",
                     help=f"{criteria[0]} (default), or the hardest by {', '.join(criteria[1:])}")  # fmt: skip
    job.add_argument("--nodes", type=int, default=10, help="points of the path that are looked at (default 10)")
    job.set_defaults(run_command="pathkernel.cli.subsets:prune")
    return job


def _label_next(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "label-next",
        help="which candidates to label next",
        description="Chooses, among samples without labels, those whose labels a network gains most from, by a "
        "recorded run on the samples that have one.",
    )
    _computing(job)
    job.add_argument("--candidates", required=True, metavar="FILE", help=".npz with an array X, or .npy")
    job.add_argument("--count", type=int, default=20, help="how many are chosen (default 20)")
    criteria = ("experimental_design", "variance", "margin", "entropy")
    job.add_argument("--criterion", choices=criteria, metavar="NAME",
                     help=f"{', '.join(criteria)} (default: the first of a classifier, else the second)")  # fmt: skip
    job.add_argument("--nodes", type=int, default=10, help="points of the path that are looked at (default 10)")
    job.set_defaults(run_command="pathkernel.cli.subsets:label_next")
    return job


def _export(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "export",
        help="weights along the path, or a table of the steps, in common formats",
        description="FILE ends in .npz or .safetensors (weights, points first, by parameter name) or in .parquet or "
        ".csv (one row for each step: settings, lengths, sample ids).",
    )
    job.add_argument("run", metavar="RUN", help="the folder given to KernelRecorder(..., store=RUN)")
    job.add_argument("file", type=Path, metavar="FILE", help="what to write")
    job.add_argument("--steps", help="points of the path, such as 0,100,-1 (default all)")
    job.add_argument("--memory", default="1GB", help="budget (default 1GB)")
    job.set_defaults(run_command="pathkernel.cli.stores:export")
    return job


def _flow(subcommands: Any) -> argparse.ArgumentParser:
    job: argparse.ArgumentParser = subcommands.add_parser(
        "flow",
        help="an optimizer on handwritten digits beside the flow that it discretises",
        description="Follows a flow of a small network on handwritten digits, records the optimizer that discretises "
        "it from the same start, and draws both.",
    )
    kinds = ("gradient", "momentum", "nesterov", "rmsprop", "adam")
    job.add_argument("kind", nargs="?", default="gradient", choices=kinds, help="which flow (default gradient)")
    job.add_argument("--time", type=float, metavar="T", help="how long (default: by the flow)")
    job.add_argument("--step", type=float, metavar="H", help="time step of the optimizer (default: by the flow)")
    job.add_argument("--seed", type=int, default=0, help="of the weights at the start (default 0)")
    job.add_argument(
        "--output", type=Path, default=Path("flow.png"), metavar="FILE", help="picture to write (default flow.png)"
    )
    job.set_defaults(run_command="pathkernel.cli.flow:flow")
    return job


def _printable(text: str) -> str:
    """Text that does nothing to a terminal: names in a store are somebody else's, and may hold its commands."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; see `EXIT_CODES`."""
    parsed = parser().parse_args(arguments)
    try:
        # Imported here: `pathkernel --help` should not wait for torch.
        from pathkernel.cli.places import check_arguments

        check_arguments(parsed)
        module, _, function = parsed.run_command.partition(":")
        code, numbers, text = getattr(importlib.import_module(module), function)(parsed)
        print(_printable(text))
        if parsed.json is not None:
            write_json(parsed.json, numbers)
        return int(code)
    except PathKernelError as error:
        print(_printable(f"pathkernel {parsed.command}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = getattr(parsed, "store", None)
        again = f"; what is finished is kept in {kept}: the same command goes on from there" if kept else ""
        print(f"pathkernel {parsed.command}: interrupted{again}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
