"""The main job on real data: a network trained on handwritten digits becomes a kernel machine.

Every number that `run` returns is measured in that run; nothing is stored.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import nn
from tqdm.auto import tqdm

from pathkernel.analysis.alignment import target_alignment
from pathkernel.analysis.velocity import kernel_distance
from pathkernel.cli.stores import Result
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.path_kernel.node_selection import check_tolerance
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.runtime.extras import require_extra
from pathkernel.tangent_kernel.tangent_kernel import TangentKernel
from pathkernel.trajectory.trajectory import Trajectory

EPOCHS, BATCH, HIDDEN, RATE = 14, 64, 64, 6e-3
EXPLAINED = 6
"""Test digits shown one by one."""
PROBE = 300
"""Training digits on which the tangent kernel is watched."""


@dataclass
class Demo:
    """Measurements of the demo.

    Attributes
    ----------
    numbers
        Every printed number by a plain key such as ``"network.accuracy"``.
    rows
        The printed table.
    """

    numbers: dict[str, float | int] = field(default_factory=dict)
    rows: list[dict[str, object]] = field(default_factory=list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Put the seconds spent inside under ``seconds.<name>``."""
        start = time.perf_counter()
        yield
        self.numbers[f"seconds.{name}"] = time.perf_counter() - start

    def row(self, key: str, label: str, predicted: np.ndarray, network: np.ndarray, y: np.ndarray) -> None:
        """Add a line to the table: accuracy, and agreement with the network."""
        accuracy, agreement = float((predicted == y).mean()), float((predicted == network).mean())
        self.numbers[f"{key}.accuracy"] = accuracy
        self.numbers[f"{key}.agreement"] = agreement
        self.rows.append({"method": label, "test accuracy": accuracy, "agreement with the network": agreement})


@dataclass
class Digits:
    """scikit-learn's 1,797 handwritten digits, a fifth of each class held out."""

    X_train: np.ndarray
    X_test: np.ndarray
    y_train: np.ndarray
    y_test: np.ndarray

    @classmethod
    def load(cls, seed: int) -> Digits:
        """Pixels scaled to [0, 1], stratified split."""
        X, y = load_digits(return_X_y=True)
        return cls(*train_test_split(X / 16.0, y, test_size=0.2, stratify=y, random_state=seed))


def train(digits: Digits, seed: int, progress: bool) -> tuple[nn.Module, Trajectory]:
    """An ordinary training loop under a recorder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    loss = nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(seed)

    with KernelRecorder(model, optimizer, loss, data=(digits.X_train, digits.y_train)) as recorder:
        for _ in tqdm(range(EPOCHS), desc="training", unit="epoch", disable=not progress):
            for x, y in recorder.batches(batch_size=BATCH, shuffle=True, generator=generator):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
    return model, recorder.trajectory


def kernel_predictions(demo: Demo, key: str, kernel: PathKernel | TangentKernel, digits: Digits) -> dict:
    """SVC, and for the path kernel also kernel ridge regression, on one Gram matrix."""
    with demo.timed(f"{key}_gram"):
        gram, cross = kernel(digits.X_train), kernel(digits.X_test, digits.X_train)
    scale = np.trace(gram) / len(gram)  # a mean diagonal of 1, so that C and alpha mean the same for every kernel
    gram, cross = gram / scale, cross / scale
    svc = SVC(kernel="precomputed", C=10.0).fit(gram, digits.y_train)
    ridge = KernelRidge(kernel="precomputed", alpha=1e-3).fit(gram, np.eye(10)[digits.y_train])
    return {"gram": gram, "svc": svc.predict(cross), "ridge": ridge.predict(cross).argmax(axis=1)}


def evolution(trajectory: Trajectory, digits: Digits, points: int = 13) -> dict[str, np.ndarray]:
    """How far the tangent kernel turned in training, and how it aligned with the labels."""
    S = len(trajectory)
    # Denser at the beginning, where the kernel moves fast.
    steps = np.unique((np.linspace(0, 1, points) ** 2 * S).round().astype(int))
    probe, labels = digits.X_train[:PROBE], digits.y_train[:PROBE]
    grams = [TangentKernel(trajectory.model, trajectory.parameters(int(s)))(probe) for s in steps]
    return {
        "steps": steps,
        "from_start": np.array([kernel_distance(gram, grams[0]) for gram in grams]),
        "from_end": np.array([kernel_distance(gram, grams[-1]) for gram in grams]),
        "alignment": np.array([target_alignment(gram, labels) for gram in grams]),
    }


def chosen_digits(predicted: np.ndarray, outputs: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Test digits worth explaining: mistakes first, then the surest digit of other classes.

    Where the network makes no mistake, its least certain digit stands for one.
    """
    ordered = np.sort(outputs, axis=1)
    margin = ordered[:, -1] - ordered[:, -2]
    wrong = np.flatnonzero(predicted != y)
    first = wrong[:2] if len(wrong) else np.array([margin.argmin()])
    sure = [np.flatnonzero(predicted == c)[margin[predicted == c].argmax()] for c in np.unique(predicted)]
    others = [i for i in sure if i not in first and predicted[i] == y[i]]
    return np.array([*first, *others])[:EXPLAINED]


def run(seed: int = 0, output: Path | None = None, tolerance: float = 1e-3, progress: bool = True) -> Demo:
    """Do the whole job.

    Parameters
    ----------
    seed
        Of the split, the initial weights and the order of the batches.
    output
        Folder for ``report.html``; None for no report.
    tolerance
        Relative error up to which the path kernel uses few nodes of the path; the kernel machine uses every step.
    progress
        Show progress bars.

    Raises
    ------
    MissingExtraError
        For a report without the libraries that draw it, before anything is trained.
    """
    if output is not None:
        require_extra("demo", "The report of `pathkernel demo`", "matplotlib", "jinja2")
    demo = Demo()
    start = time.perf_counter()
    digits = Digits.load(seed)
    check_tolerance(tolerance, None, len(digits.y_train))
    with demo.timed("training"):
        model, trajectory = train(digits, seed, progress)
    with torch.no_grad():
        outputs = model(torch.as_tensor(digits.X_test, dtype=torch.float32)).double().numpy()
    network = outputs.argmax(axis=1)
    demo.row("network", "network", network, network, digits.y_test)

    machine = KernelMachine(trajectory, progress=progress)
    with demo.timed("machine_predict"):
        decisions = machine.decision_function(digits.X_test)
    with demo.timed("machine_explain"):
        why = machine.explain(digits.X_test)
    demo.row("machine", "exact kernel machine", decisions.argmax(axis=1), network, digits.y_test)
    demo.numbers["machine.residual"] = why.relative_residual
    demo.numbers["machine.quadrature_error"] = float(np.median(why.quadrature_error))
    demo.numbers["machine.largest_difference"] = float(np.abs(decisions - outputs).max())

    with demo.timed("path_nodes"):
        path_kernel = PathKernel(trajectory, tolerance=tolerance, memory="2GB", progress=progress)
    path = kernel_predictions(demo, "path", path_kernel, digits)
    demo.row("svc_path", "SVC(path kernel)", path["svc"], network, digits.y_test)
    demo.row("kernel_ridge_path", "KernelRidge(path kernel)", path["ridge"], network, digits.y_test)
    tangent = kernel_predictions(demo, "tangent", TangentKernel(model, memory="2GB"), digits)
    demo.row("svc_tangent", "SVC(final tangent kernel)", tangent["svc"], network, digits.y_test)
    rbf = SVC(kernel="rbf", C=10.0).fit(digits.X_train, digits.y_train)
    demo.row("svc_rbf", "SVC(rbf)", rbf.predict(digits.X_test), network, digits.y_test)

    demo.numbers |= {
        "path.steps": len(trajectory),
        "path.nodes": len(path_kernel.nodes),
        "path.error": path_kernel.error.relative,
        "path.error_deviation": path_kernel.error.deviation,
        "parameters": trajectory.layout.size,
        "samples.train": len(digits.y_train),
        "samples.test": len(digits.y_test),
        "seed": seed,
    }
    if output is not None:
        with demo.timed("report"):
            moved = evolution(trajectory, digits)
            shown = chosen_digits(network, outputs, digits.y_test)
            write(demo, output, digits, path["gram"], moved, why, shown)
    demo.numbers["seconds.total"] = time.perf_counter() - start
    return demo


def write(
    demo: Demo,
    output: Path,
    digits: Digits,
    gram: np.ndarray,
    moved: dict[str, np.ndarray],
    why: Attributions,
    shown: np.ndarray,
) -> None:
    """Draw the figures and write ``report.html``."""
    # Drawing needs matplotlib, which takes its time to load: only when a report is asked for.
    from pathkernel.plotting.attribution import AttributionDisplay
    from pathkernel.plotting.completeness import CompletenessDisplay
    from pathkernel.plotting.evolution import KernelEvolutionDisplay
    from pathkernel.plotting.gram import GramDisplay
    from pathkernel.plotting.report import KeyFigure, ReportFigure, Section, close_figures, write_report
    from pathkernel.plotting.spectrum import SpectrumDisplay

    images, queries = digits.X_train.reshape(-1, 8, 8), digits.X_test.reshape(-1, 8, 8)
    predictions = []
    for i in shown:
        said, truth = int(why.output_index[i]), int(digits.y_test[i])
        verdict = f"rightly called {said}" if said == truth else f"a {truth} mistaken for {said}"
        display = AttributionDisplay.from_attributions(
            why, int(i), images, labels=digits.y_train, query_image=queries[i], title=f"test digit {i}: {verdict}"
        ).plot()
        alt = f"Test digit {i}, {verdict}, with the training digits that pushed this prediction up and down most"
        predictions.append(ReportFigure(display.figure_, alt))
    n = demo.numbers
    steps, path = n["path.steps"], nodes_and_error(n)
    sections = [
        Section(
            "Why the network said it",
            "Each training digit's share is how much it moved the logit of the predicted class in this training run. "
            "Shares, the untrained network's output and weight decay add up to the network's output.",
            predictions,
        ),
        Section(
            "The network and its kernel machine",
            "Outputs of the network against the sum of all shares and channels, over the whole test set.",
            [
                ReportFigure(
                    CompletenessDisplay.from_attributions(why).plot().figure_,
                    "Network outputs against kernel machine outputs: all points on the diagonal",
                )
            ],
        ),
        Section(
            "The path kernel",
            f"Cosine-normalised Gram matrix of the training digits, ordered by class, and its spectrum: {path} stand "
            f"for all {steps} steps.",
            [
                ReportFigure(
                    GramDisplay.from_gram(gram, digits.y_train).plot().figure_,
                    "Gram matrix of the path kernel with one bright block per class",
                ),
                ReportFigure(
                    SpectrumDisplay.from_gram(gram).plot().figure_, "Eigenvalues of the Gram matrix in descending order"
                ),
            ],
        ),
        Section(
            "How the tangent kernel moved",
            f"Distance of the tangent kernel from where it began and from where it ended, and its alignment with the "
            f"labels, on {PROBE} training digits.",
            [
                ReportFigure(
                    KernelEvolutionDisplay(moved["steps"], moved["from_start"], moved["from_end"], moved["alignment"])
                    .plot()
                    .figure_,
                    "Kernel distance from start and end, and target alignment, against training step",
                )
            ],
        ),
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_report(
        output / "report.html",
        title="A network as a kernel machine",
        subtitle=f"{n['samples.train']} training and {n['samples.test']} test digits, MLP 64-{HIDDEN}-10 with "
        f"{n['parameters']} parameters, {steps} steps of AdamW",
        key_figures=[
            KeyFigure("Test accuracy", f"{n['network.accuracy']:.1%}", "of the network"),
            KeyFigure(
                "Same class",
                f"{n['machine.agreement']:.1%}",
                "of test digits: kernel machine and network",
                "within tolerance" if n["machine.agreement"] == 1 else "above tolerance",
            ),
            KeyFigure(
                "Residual",
                n["machine.residual"],
                "what shares and channels leave of the change in training",
                "within tolerance" if n["machine.residual"] <= 1e-5 else "above tolerance",
            ),
            KeyFigure("Quadrature error", n["machine.quadrature_error"], "median error along the steps"),
        ],
        table=[
            {key: f"{value:.2%}" if isinstance(value, float) else value for key, value in row.items()}
            for row in demo.rows
        ],
        sections=sections,
        settings={
            "network": f"Linear(64, {HIDDEN}) → ReLU → Linear({HIDDEN}, 10)",
            "optimizer": f"AdamW, learning rate {RATE}, batches of {BATCH}, {EPOCHS} epochs",
            "kernel machine": "discrete gradient, every step",
            "path kernel": f"trace over outputs, learning-rate measure, {path}",
            "SVC and KernelRidge": "C = 10, alpha = 1e-3, kernels scaled to a mean diagonal of 1",
            "seed": n["seed"],
            "torch": torch.__version__,
        },
    )
    close_figures(sections)


def nodes_and_error(numbers: Mapping[str, float | int]) -> str:
    """How few nodes of the path the kernel uses, and what that costs."""
    error = f"{numbers['path.error']:.1e} ± {numbers['path.error_deviation']:.0e}"
    return f"{numbers['path.nodes']} nodes at a measured error of {error}"


def table(demo: Demo) -> str:
    """The printed result."""
    n = demo.numbers
    width = max(len(str(row["method"])) for row in demo.rows)
    lines = [f"{'':{width}}  test accuracy  agreement with the network"]
    for row in demo.rows:
        accuracy, agreement = row["test accuracy"], row["agreement with the network"]
        lines.append(f"{row['method']:{width}}  {accuracy:13.2%}  {agreement:26.2%}")
    lines += [
        "",
        f"kernel machine: residual {n['machine.residual']:.1e}, quadrature error {n['machine.quadrature_error']:.1e} "
        f"(median), every one of {n['path.steps']} steps",
        f"path kernel: {nodes_and_error(n)}, in place of every one of {n['path.steps']} steps",
        "seconds: "
        + ", ".join(f"{key.removeprefix('seconds.')} {n[key]:.1f}" for key in n if key.startswith("seconds.")),
    ]
    return "\n".join(lines)


def demo(arguments: argparse.Namespace) -> Result:
    """Run the main job."""
    result = run(arguments.seed, arguments.output, arguments.tolerance, progress=not arguments.quiet)
    report = arguments.output / "report.html"
    return 0, result.numbers, f"{table(result)}\nreport: {report}"
