"""Does every row belong to its sample? The split of the sum, against plain autograd one sample at a time.

    python benchmarks/certificate.py [--quick] [--json FILE] [--only WORD …] [--parts PART …]

A residual proves the sum of the shares, not whose they are. Parts:

zoo         networks that permute, route, merge, mask, split or share their samples inside (`tests/zoo.py`), at as many
            samples as the lengths inside and at others: kernels, and shares of runs of SGD and AdamW, in float64
coupled     layers that couple the samples of a batch in training: what counts is the batch as it ran
refused     networks that are no functions of one sample
broken      engines with wrong rows whose sum is right: of the layer-wise rows, and of all rows
alarms      the networks and optimizers of `exactness.py`: is right called wrong?
bars        `shares_error`: does the true error of a query's shares lie within it?
cost        an explanation of 100 queries with and without the check
threads     two threads on one kernel and one machine

refused        what the user was told before training
split_error    the certificate: the worst sample's ⟨row_i, v⟩ against λ_i·(J v)_i over random directions v
true_error     Σ|found − true| / Σ|true| of the worst query's shares; of kernels, max|found − true| / max|true|
residual       what Σ shares + Σ channels misses of the output
covered        part of the queries whose true error lies within `shares_error`, the median of which is printed
median_ratio   median of `shares_error` ÷ true error over the queries
seconds_of_check  of the explanation's time, what measuring `split_error` took

Exit status 1 if a limit is missed. To add a network, add it to a table of `tests/zoo.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these networks are so small that threads would wait for each other
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import _certificate_truth as truth
import exactness
import numpy as np
import torch
from _certificate_broken import BATCH, FAULTS, broken
from _certificate_threads import threaded
from torch import nn
from zoo import COUPLED, COUPLED_IN_TRAINING, ZOO, Specimen

import pathkernel as pk
import pathkernel.gradients.layers.coverage
import pathkernel.gradients.per_sample
import pathkernel.kernel_machine.kernel_machine
import pathkernel.trajectory.split_certificate
from pathkernel.errors import PathKernelError

LIMIT = 1e-6
"""Largest true error of a right answer in float64."""
SPLIT_LIMIT = {"float64": 1e-8, "float32": 1e-4}
"""Above it the library warns."""
NETWORKS_RIGHT = 20
COVERED, BAR_RATIO, COST = 0.99, 10.0, 0.1
STEPS, JUDGED, OUTPUT = 4, 3, 0
ENGINES = ("auto", "layerwise", "jacobian", "autograd")
OTHER = 7
"""A number of samples that is no length of any network."""

RIGHT, WRONG, REFUSED, LATE, ERROR = "right", "wrong", "refused", "refused late", "error"


@dataclass
class Row:
    """One answer: to what question it was, and how right."""

    network: str
    engine: str
    n: int
    part: str = "zoo"
    quantity: str = ""
    status: str = ""
    used: str = ""
    refused: str | None = None
    split_error: float | None = None
    true_error: float | None = None
    residual: float | None = None
    quadrature_error: float | None = None
    shares_error: float | None = None
    covered: float | None = None
    median_ratio: float | None = None
    seconds_of_check: float | None = None
    seconds: float | None = None


LINE = "{:<8} {:<32} {:<14} {:<10} {:>3} {:<13} {:>9} {:>9} {:>9} {:>9} {:>7}  {}"


def print_header() -> None:
    print(
        LINE.format(
            *("part", "network", "quantity", "engine", "n", "status", "split", "true", "residual", "quad.", "seconds"),
            "engines used, or what the user is told",
        ),
        flush=True,
    )


def print_row(row: Row) -> None:
    numbers = (row.split_error, row.true_error, row.residual, row.quadrature_error)
    shown = ["–" if number is None else f"{number:.1e}" for number in numbers]
    seconds = "–" if row.seconds is None else f"{row.seconds:.2f}"
    names = row.part, row.network, row.quantity, row.engine, row.n, row.status
    told = row.refused or row.used
    if row.seconds_of_check is not None:
        told += f"; check {row.seconds_of_check:.3f} s"
    if row.covered is not None:
        told = f"bar {row.shares_error:.1e}, covers {row.covered:.0%}; {told}"
    print(LINE.format(*names, *shown, seconds, told[:150]), flush=True)


# -- answers --------------------------------------------------------------------------------------------------------


def answered(row: Row, ask: Callable[[Callable[[str], None]], float]) -> Row:
    """The row with what became of the question; ``ask`` says when training begins and returns the true error."""
    stage, start = ["before"], time.perf_counter()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row.true_error = ask(lambda name: stage.__setitem__(0, name))
        row.status = RIGHT if row.true_error <= LIMIT else WRONG
    except PathKernelError as refusal:
        row.status, row.refused = REFUSED if stage[0] == "before" else LATE, str(refusal)
    except Exception as error:
        row.status, row.refused = ERROR, f"{type(error).__name__}: {error}"
    row.seconds = time.perf_counter() - start
    if row.refused is not None:
        row.refused = " ".join(row.refused.split())
    return row


def kernel_row(row: Row, net: nn.Module, X: torch.Tensor, right: np.ndarray) -> Row:
    """A kernel matrix."""

    def ask(_: Callable[[str], None]) -> float:
        kernel = pk.TangentKernel(net, engine=row.engine)
        found = kernel(X)
        row.split_error = kernel.check(X)
        return float(abs(found - right).max() / abs(right).max())

    return answered(row, ask)


@dataclass
class Training:
    """A short run of a network, with and without a recorder."""

    specimen: Specimen
    n: int
    optimizer: str
    coupled: bool = False

    def __post_init__(self) -> None:
        self.X = self.specimen.samples(2 * self.n)
        generator = torch.Generator().manual_seed(2)
        self.y = torch.randint(3, (2 * self.n,), generator=generator)
        self.batches = [torch.randperm(2 * self.n, generator=generator)[: self.n] for _ in range(STEPS)]
        self.loss = nn.CrossEntropyLoss()

    def queries(self, n: int) -> torch.Tensor:
        return self.specimen.samples(n, seed=5)

    def plain(self) -> truth.Run:
        """The run without a recorder."""
        torch.manual_seed(6)
        arguments = self.specimen.build(), self.loss, self.X, self.y, self.batches
        return truth.train(*arguments, truth.OPTIMIZERS[self.optimizer](), self.coupled)

    def recorded(self, say: Callable[[str], None]) -> pk.Trajectory:
        """The same run under a recorder."""
        torch.manual_seed(6)
        net = self.specimen.build()
        optimizer = truth.OPTIMIZERS[self.optimizer]().make(list(net.parameters()))
        with pk.KernelRecorder(net, optimizer, self.loss, data=(self.X, self.y)) as recorder:
            for ids in self.batches:
                x, y = recorder.batch(ids)
                optimizer.zero_grad()
                self.loss(net(x), y).backward()
                optimizer.step()
                say("training")
        return recorder.trajectory


@dataclass
class RightShares:
    """Shares (Q, N) of the first few queries, and θ_S."""

    shares: np.ndarray
    end: torch.Tensor
    quadrature: pk.quadrature.Quadrature


def right_shares(training: Training, queries: torch.Tensor) -> RightShares:
    """By plain autograd; the rule is refined until it does not matter, or, at kinks, the same for both."""
    run = training.plain()
    if not training.specimen.smooth:
        shares = run.shares(queries[:JUDGED], OUTPUT, [(0.0, 1.0)])
        return RightShares(shares.numpy(), run.path[-1], pk.LeftEndpoint())
    shares = run.shares(queries[:JUDGED], OUTPUT, truth.gauss_legendre())
    coarse = run.shares(queries[:1], OUTPUT, truth.gauss_legendre(panels=1))
    missed = float((coarse - shares[:1]).abs().sum() / shares[:1].abs().sum())
    if missed > LIMIT / 100:
        raise RuntimeError(f"the truth itself is known only up to {missed:.0e}")
    return RightShares(shares.numpy(), run.path[-1], pk.GaussLegendre(12))


def shares_row(row: Row, training: Training, right: RightShares, queries: torch.Tensor) -> Row:
    """Shares of a recorded run."""

    def ask(say: Callable[[str], None]) -> float:
        trajectory = training.recorded(say)
        say("explaining")
        if not torch.equal(trajectory.final.double(), right.end):
            raise RuntimeError("training under the recorder ended elsewhere than training without it")
        machine = pk.KernelMachine(trajectory, quadrature=right.quadrature, engine=row.engine)
        why = machine.explain(queries, outputs=OUTPUT)
        row.split_error, row.used = float(why.split_error), why.engine
        row.residual, row.quadrature_error = why.relative_residual, float(np.median(why.quadrature_error))
        return worst_query(why.shares[: len(right.shares)], right.shares)

    return answered(row, ask)


def worst_query(found: np.ndarray, right: np.ndarray) -> float:
    """Σ|found − right| / Σ|right| of the worst query."""
    return float((abs(found - right).sum(1) / abs(right).sum(1)).max())


# -- parts ----------------------------------------------------------------------------------------------------------


def zoo(quick: bool, chosen: Callable[[str], bool]) -> Iterator[Row]:
    for name, specimen in ZOO.items():
        if not chosen(name):
            continue
        lengths = specimen.lengths or (5,)
        for n in (lengths[0], OTHER) if quick else (*lengths, OTHER):
            yield from _kernels(name, specimen, n, ENGINES[:1] if quick else ENGINES)
            for optimizer in ("sgd",) if quick else truth.OPTIMIZERS:
                every = not quick and optimizer == "sgd" and n == lengths[0]
                yield from _shares(name, specimen, n, optimizer, ENGINES if every else ENGINES[:1])


def _kernels(name: str, specimen: Specimen, n: int, engines: tuple[str, ...]) -> Iterator[Row]:
    net, X = specimen.build(), specimen.samples(n)
    right = truth.kernel(net, X)
    for engine in engines:
        yield kernel_row(Row(name, engine, n, quantity="kernel"), net, X, right)


def _shares(
    name: str, specimen: Specimen, n: int, optimizer: str, engines: tuple[str, ...], part: str = "zoo"
) -> Iterator[Row]:
    training = Training(specimen, n, optimizer, coupled=part == "coupled")
    queries = training.queries(n)
    right = right_shares(training, queries)
    for engine in engines:
        row = Row(name, engine, n, part, f"shares, {optimizer}")
        yield shares_row(row, training, right, queries)


def coupled(quick: bool, chosen: Callable[[str], bool]) -> Iterator[Row]:
    for name, specimen in COUPLED_IN_TRAINING.items():
        if chosen(name):
            for n, optimizer in itertools.product((5, OTHER), truth.OPTIMIZERS):
                yield from _shares(name, specimen, n, optimizer, ("auto",), "coupled")


def refused(quick: bool, chosen: Callable[[str], bool]) -> Iterator[Row]:
    """Whatever is computed of these is wrong, since there is nothing right."""
    for name, specimen in COUPLED.items():
        if not chosen(name):
            continue
        for n, engine in itertools.product((5, OTHER), ENGINES[:1] if quick else ENGINES):
            net, X = specimen.build().eval(), specimen.samples(n)
            row = Row(name, engine, n, "refused", "kernel")

            def ask(_: Callable[[str], None], net=net, X=X, engine=engine) -> float:
                pk.TangentKernel(net, engine=engine)(X)
                return np.inf

            yield answered(row, ask)
        training = Training(specimen, OTHER, "sgd")

        def ask_machine(say: Callable[[str], None], training=training) -> float:
            pk.KernelMachine(training.recorded(say)).explain(training.queries(2), outputs=OUTPUT)
            return np.inf

        yield answered(Row(name, "auto", OTHER, "refused", "shares, sgd"), ask_machine)


FOUND, FALLEN_BACK, MISSED = "found", "other engine", "missed"


def broken_engines(quick: bool, chosen: Callable[[str], bool]) -> Iterator[Row]:
    """Right results by another engine, a refusal, or a large `split_error`: anything but a wrong result that passes."""
    specimen = Specimen(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    training = Training(specimen, BATCH, "sgd")
    queries, net, X = training.queries(JUDGED), specimen.build(), specimen.samples(BATCH)
    shares, matrix = right_shares(training, queries), truth.kernel(net, X)
    for (name, fault), everywhere in itertools.product(FAULTS.items(), (False, True)):
        if not chosen(name):
            continue
        ways = "all" if everywhere else "layers"
        with broken(fault, everywhere):
            row = Row(name, "auto", BATCH, "broken", f"shares, {ways}")
            yield judged_broken(shares_row(row, training, shares, queries))
            if not fault.slopes:  # a kernel has the same λ for all
                yield judged_broken(kernel_row(Row(name, "auto", BATCH, "broken", f"kernel, {ways}"), net, X, matrix))


def judged_broken(row: Row) -> Row:
    if row.status == RIGHT:
        row.status = FALLEN_BACK
    elif row.status == WRONG:
        row.status = FOUND if row.split_error is not None and row.split_error > SPLIT_LIMIT["float64"] else MISSED
    elif row.status != ERROR:
        row.status = FOUND
    return row


def exactness_run(network: str, optimizer: str, dtype: torch.dtype, steps: int) -> tuple[pk.Trajectory, torch.Tensor]:
    """A run of `exactness.py` on the first problem that suits the network, and samples."""
    problem = exactness.PROBLEMS[exactness.SUITS[network][0]]
    arrays = problem.load()
    X, y = (torch.tensor(a, dtype=dtype if a.dtype.kind == "f" else torch.int64) for a in arrays)
    torch.manual_seed(0)
    model = exactness.NETWORKS[network].build(X.shape[1], problem.outputs).to(dtype)
    arguments = exactness.OPTIMIZERS[optimizer], model, problem.loss, (X, y), steps, 0
    return exactness.record(*arguments, exactness.Loop(exactness.plain))[0], X


def alarms(quick: bool, chosen: Callable[[str], bool]) -> Iterator[Row]:
    """Runs of `exactness.py`; the split of each is right."""
    optimizers = ("sgd", "adamw") if quick else tuple(exactness.OPTIMIZERS)
    every = itertools.product(enumerate(exactness.SUITS), enumerate(optimizers), enumerate(exactness.DTYPES))
    for (i, network), (j, optimizer), (k, dtype) in every:
        if not chosen(network) or (quick and (i + j + k) % 2):  # each network and each optimizer is there in both types
            continue
        kind = str(dtype).removeprefix("torch.")
        trajectory, X = exactness_run(network, optimizer, dtype, steps=4)
        start = time.perf_counter()
        why = pk.KernelMachine(trajectory).explain(X[:JUDGED], outputs=0)
        row = Row(network, "auto", exactness.BATCH_SIZE, "alarms", f"{optimizer}, {kind}")
        row.split_error, row.used, row.residual = float(why.split_error), why.engine, why.relative_residual
        row.quadrature_error, row.seconds = float(np.median(why.quadrature_error)), time.perf_counter() - start
        # What is not a number was not measured.
        row.status = "quiet" if row.split_error <= SPLIT_LIMIT[kind] else "alarm"
        yield row


def bars(quick: bool, chosen: Callable[[str], bool]) -> Iterator[Row]:
    from _shares_error import rows

    for found in rows(quick):
        if not chosen(found["network"]):
            continue
        row = Row(found["network"], "auto", found["queries"], "bars", f"{found['optimizer']}, {found['dtype']}")
        row.status, row.used = "measured", found["quadrature"]
        for key in ("shares_error", "true_error", "covered", "median_ratio", "quadrature_error", "seconds"):
            setattr(row, key, found[key])
        yield row


UNCHECKED = {
    (pathkernel.trajectory.split_certificate.SplitCheck, "is_due"): False,
    (pathkernel.gradients.layers.coverage, "_are_own_rows"): True,
    (pathkernel.gradients.per_sample, "_are_own_rows"): True,
    (pathkernel.kernel_machine.kernel_machine, "check_sample_wise"): None,
}
"""What is measured or proved of rows, and what it says where it is left out."""
COST_CASES = (("mlp_tanh", "adamw"), ("mlp_relu", "sgd"), ("cnn_groupnorm", "adamw"), ("cnn_batchnorm", "momentum"))
QUERIES, REPEATED = 100, 5


def cost(quick: bool, chosen: Callable[[str], bool]) -> Iterator[Row]:
    """A new machine each time, with and without the check in turn; the median of the differences."""
    for network, optimizer in COST_CASES[: 2 if quick else None]:
        if not chosen(network):
            continue
        trajectory, X = exactness_run(network, optimizer, torch.float32, steps=30)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for checked in (True, False) * (REPEATED + 1):
            with ExitStack() as stack:
                for (of, name), says in UNCHECKED.items() if not checked else ():
                    stack.enter_context(mock.patch.object(of, name, lambda *_, says=says: says))
                start = time.process_time()  # of one thread, whatever else the machine is doing
                why = pk.KernelMachine(trajectory).explain(X[:QUERIES], outputs=0)
                seconds[checked].append(time.process_time() - start)
        differences = np.subtract(seconds[True], seconds[False])[1:]  # the first of each warms up
        row = Row(network, "auto", exactness.BATCH_SIZE, "cost", optimizer, "measured", why.engine)
        row.seconds, row.seconds_of_check = float(np.median(seconds[True][1:])), float(np.median(differences))
        yield row


def threads(quick: bool, chosen: Callable[[str], bool]) -> Iterator[Row]:
    for quantity in ("kernel", "path kernel", "machine"):
        if chosen(quantity):
            start = time.perf_counter()
            wrong, moved, told = threaded(quantity, calls=20 if quick else 200)
            row = Row("two threads", "auto", 60, "threads", quantity, RIGHT if not (wrong or moved or told) else WRONG)
            row.true_error, row.refused, row.seconds = float(wrong), told, time.perf_counter() - start
            yield row


PARTS = {
    "zoo": zoo,
    "coupled": coupled,
    "refused": refused,
    "broken": broken_engines,
    "alarms": alarms,
    "bars": bars,
    "cost": cost,
    "threads": threads,
}


# -- the verdict ----------------------------------------------------------------------------------------------------


def verdict(rows: list[Row]) -> bool:
    """Print the judged figures against their limits; False if one is missed."""
    passed = True

    def judge(line: str, good: bool) -> None:
        nonlocal passed
        print(f"{line}: {'ok' if good else 'MISSED'}")
        passed &= good

    print()
    parts = {part: [row for row in rows if row.part == part] for part in PARTS}
    if parts["zoo"]:
        outcome = {name: of_network([r for r in parts["zoo"] if r.network == name]) for name in names(parts["zoo"])}
        counts = {kind: [name for name in outcome if outcome[name] == kind] for kind in (RIGHT, WRONG, REFUSED, ERROR)}
        line = f"{len(outcome)} networks: " + ", ".join(f"{len(found)} {kind}" for kind, found in counts.items())
        good = len(counts[RIGHT]) >= min(NETWORKS_RIGHT, len(outcome)) and len(counts[RIGHT]) == len(outcome)
        judge(f"{line}; limit: none wrong, none refused, at least {NETWORKS_RIGHT} right", good)
        for kind in (WRONG, REFUSED, ERROR):
            if counts[kind]:
                print(f"    {kind}: {', '.join(counts[kind])}")
        others = [r for r in parts["zoo"] if r.status == RIGHT and r.split_error > SPLIT_LIMIT["float64"]]
        judge(f"right answers that `split_error` doubts: {len(others)}", not others)
    if parts["coupled"]:
        right = sum(row.status == RIGHT for row in parts["coupled"])
        judge(f"coupled in training: {right} of {len(parts['coupled'])} right", right == len(parts["coupled"]))
    if parts["refused"]:
        told = sum(row.status == REFUSED for row in parts["refused"])
        line = f"not functions of one sample: {told} of {len(parts['refused'])} refused before training"
        judge(line, told == len(parts["refused"]))
    if parts["broken"]:
        missed = {row.network for row in parts["broken"] if row.status not in (FOUND, FALLEN_BACK)}
        tried = names(parts["broken"])
        judge(f"broken engines: {len(tried) - len(missed)} of {len(tried)} detected", not missed)
    if parts["alarms"]:
        false = [row for row in parts["alarms"] if row.status != "quiet"]
        judge(f"false alarms on the networks of exactness.py: {len(false)} of {len(parts['alarms'])}", not false)
    if parts["bars"]:
        share = float(np.average([row.covered for row in parts["bars"]], weights=[row.n for row in parts["bars"]]))
        judge(f"true error within `shares_error`: {share:.2%} of queries; limit {COVERED:.0%}", share >= COVERED)
        ratio = float(np.median([row.median_ratio for row in parts["bars"] if row.median_ratio is not None]))
        judge(f"median of `shares_error` ÷ true error: {ratio:.1f}; limit {BAR_RATIO:.0f}", ratio <= BAR_RATIO)
    if parts["cost"]:
        worst = max(row.seconds_of_check / row.seconds for row in parts["cost"])
        judge(f"the check costs {worst:.1%} of an explanation of 100 queries; limit {COST:.0%}", worst <= COST)
    if parts["threads"]:
        wrong = [row for row in parts["threads"] if row.status != RIGHT]
        judge(f"two threads: {len(wrong)} of {len(parts['threads'])} wrong", not wrong)
    return passed


def names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.network for row in rows))


def of_network(rows: list[Row]) -> str:
    """The worst of a network's answers; an engine that was asked for by name may refuse."""
    automatic = [row.status for row in rows if row.engine == "auto"]
    if any(row.status == WRONG for row in rows):
        return WRONG
    if any(status in (ERROR, LATE) for status in automatic) or any(row.status == ERROR for row in rows):
        return ERROR
    return REFUSED if REFUSED in automatic else RIGHT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, optimizers and engines")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--only", metavar="WORD", nargs="+", default=[""], help="networks with such a word in the name")
    parser.add_argument("--parts", metavar="PART", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    print(f"The certificate of the split{' (quick)' if arguments.quick else ''}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {time.strftime('%F')}")
    print_header()
    rows = []
    for part in arguments.parts:
        for row in PARTS[part](arguments.quick, lambda name: any(word in name for word in arguments.only)):
            rows.append(row)
            print_row(row)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    return 0 if verdict(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
