"""How much of public architectures goes layer by layer, and is it right?

    python benchmarks/coverage.py [--only NAME ...] [--quick] [--json FILE]

Each architecture of `tests/architectures.py` is written with the idioms of the code that people train (positions
without a batch axis, masks made in `forward`, tied weights, rotary positions, grouped queries, depthwise and transposed
convolutions, class tokens, cells in a loop). For each of them, in float64 and in float32:

covered           part of θ whose gradients come from activations and signals; the rest is rows by `torch.func`
plain_parameters  names of the rest, and `reason` why the first of them is
error             of the tangent kernel (trace), against `pathkernel.reference` in float64: largest difference by
                  largest entry
error_of_shares   of the shares of two samples after four steps of training (SGD, mean squared error), layer by layer
                  against rows by plain autograd, largest difference by largest share

Exit status 1 if less than 99 % of an architecture is covered, or an error exceeds 1e-10 in float64, 1e-5 in float32.
`--quick` takes fifteen of them. To add an architecture, add it to ARCHITECTURES there.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pathkernel as pk
from pathkernel import reference

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from architectures import ARCHITECTURES, Architecture

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
COVERED = 0.99
SAMPLES, QUERIES, STEPS = 6, 2, 4
QUICK = (
    *("GPT-2", "LLaMA", "BERT", "ViT", "ResNet", "ResNeXt, GroupNorm", "MobileNetV3", "ConvNeXt", "U-Net", "TCN"),
    *("LSTM classifier", "GRU sequence", "LSTM and GRU cells", "MLP-Mixer", "autoencoder"),
)


def error_of_kernel(kernel: pk.TangentKernel, model: nn.Module, X: torch.Tensor) -> float:
    """Largest difference from the oracle, relative to its largest entry."""
    expected = reference.tangent_kernel(model, dict(model.named_parameters()), X[:3], X[:QUERIES])
    trace = torch.einsum("nmcc->nm", expected).numpy()
    return float(abs(kernel(X[:3], X[:QUERIES]) - trace).max() / abs(trace).max())


def error_of_shares(architecture: Architecture, dtype: torch.dtype) -> float:
    """Largest difference of the shares from those by plain autograd, relative to the largest share."""
    model, X = architecture.build(dtype), architecture.samples(SAMPLES, dtype)
    with torch.no_grad():
        y = 0.5 - model(X)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.01), nn.MSELoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for step in range(STEPS):
            x, target = recorder.batch(torch.arange(step % 2, SAMPLES, 2))
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    one = lambda z: z.reshape(-1)[0]  # noqa: E731
    found, expected = (
        pk.KernelMachine(recorder.trajectory, engine=engine).explain(X[:QUERIES], outputs=one).shares
        for engine in ("layerwise", "autograd")
    )
    return float(abs(found - expected).max() / abs(expected).max())


def row(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Figures of one architecture in one floating type."""
    model, X = ARCHITECTURES[name].build(dtype), ARCHITECTURES[name].samples(SAMPLES, dtype)
    kernel = pk.TangentKernel(model, engine="layerwise")
    error = error_of_kernel(kernel, model, X)
    layout, plain = kernel.function.layout, kernel.engine.tapes.coverage.plain
    size = sum(layout.slices[own].stop - layout.slices[own].start for own in plain)
    return {
        "architecture": name,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": layout.size,
        "covered": 1 - size / layout.size,
        "plain_parameters": ", ".join(own for own in layout.names if own in plain),
        "reason": next(iter(plain.values()), ""),
        "error": error,
        "error_of_shares": error_of_shares(ARCHITECTURES[name], dtype),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    names = arguments.only or (QUICK if arguments.quick else ARCHITECTURES)
    rows, missed = [], 0
    print(f"{'architecture':26}{'parameters':>11}{'covered':>10}{'dtype':>9}{'kernel':>9}{'shares':>9}  plain")
    for name in names:
        for dtype, limit in LIMITS.items():
            found = row(name, dtype)
            rows.append(found)
            missed += found["covered"] < COVERED or not max(found["error"], found["error_of_shares"]) <= limit
            print(
                f"{name:26}{found['parameters']:11}{found['covered']:10.2%}{found['dtype']:>9}{found['error']:9.1e}"
                f"{found['error_of_shares']:9.1e}  {found['plain_parameters']}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"{len(names)} architectures, {missed} limits missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
