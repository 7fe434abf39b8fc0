"""What if Adam is taken for SGD? Shares under the wrong optimizer beside the exact ones.

    python benchmarks/sgd_or_adam.py [--quick] [--json FILE] [--seed N] [--figure FILE]

Gradient-product methods (TracIn and its kin) add up learning rate × ⟨∇f, ∇ℓ_i⟩ whatever the optimizer was. On digits, a
network is trained with SGD, momentum, Adam and AdamW; its shares are computed by the recorded optimizer's rule and as
if it had been plain SGD. Printed for each optimizer: the rank correlation (Spearman) between the two over the training
samples, median over the queries; how many of the ten strongest samples they have in common; and what the wrong shares
leave unexplained of the network's outputs, beside what the exact ones leave.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn, optim

import pathkernel as pk

OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.03, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=3e-3),
    "AdamW": lambda p: optim.AdamW(p, lr=3e-3, weight_decay=1e-2),
}


class AsIfSGD(pk.UpdateRule):
    """Δ = −η g, whatever was done."""

    name = "as if SGD"

    def step(self, gradient, memory, frozen, settings):
        return -settings["lr"] * gradient, ()


def shares(name: str, epochs: int, queries: int, seed: int) -> tuple[pk.Attributions, pk.Attributions]:
    """Exact attributions of test samples, and those of the wrong rule."""
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, _ = train_test_split(X / 16, y, test_size=360, stratify=y, random_state=seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer, loss = OPTIMIZERS[name](model.parameters()), nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(seed)
    with pk.KernelRecorder(model, optimizer, loss, data=(X_train, y_train)) as recorder:
        for _ in range(epochs):
            for x, target in recorder.batches(batch_size=64, shuffle=True, generator=generator):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    trajectory = recorder.trajectory
    run = dataclasses.replace(trajectory.run, rule=AsIfSGD())
    wrong = pk.Trajectory(run, trajectory.store, trajectory.end)
    return (
        pk.KernelMachine(trajectory).explain(X_test[:queries]),
        pk.KernelMachine(wrong, unexplained=np.inf).explain(X_test[:queries]),
    )


def compare(name: str, exact: pk.Attributions, wrong: pk.Attributions) -> dict[str, object]:
    ranks = [spearmanr(a, b).statistic for a, b in zip(exact.shares, wrong.shares, strict=True)]
    ten = zip(exact.top(10).proponents, wrong.top(10).proponents, strict=True)
    return {
        "optimizer": name,
        "rank_correlation": float(np.median(ranks)),
        "common_of_top_10": float(np.mean([len(set(a) & set(b)) for a, b in ten])),
        "residual_exact": exact.relative_residual,
        "residual_as_sgd": not_in_shares(wrong),
    }


def not_in_shares(why: pk.Attributions) -> float:
    """What the rule leaves, relative to how far the outputs moved: booked as ``"unexplained"``, or left over."""
    left = why.left_over + why.channels.get("unexplained", 0.0)
    return float(np.linalg.norm(left) / np.linalg.norm(why.output - why.initial))


def draw(results: dict[str, tuple[pk.Attributions, pk.Attributions]], rows: list[dict], path: str) -> None:
    """Shares of all training samples in one prediction, exact against as-if-SGD, one panel for each optimizer."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3.1 * len(results), 3.3), layout="constrained")
    for ax, row, (name, (exact, wrong)) in zip(axes, rows, results.items(), strict=True):
        a, b = exact.shares[0], wrong.shares[0]
        ax.axhline(0, color="0.85", lw=0.8)
        ax.axvline(0, color="0.85", lw=0.8)
        ax.scatter(a / np.abs(a).max(), b / np.abs(b).max(), s=6, alpha=0.5, lw=0, color="#0072B2")
        ax.set(title=f"{name}\nrank correlation {row['rank_correlation']:.2f}", xlabel="exact share (scaled)")
        ax.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    axes[0].set_ylabel("share as if SGD (scaled)")
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 epochs and 10 queries instead of 15 and 60")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a list of flat objects")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of split, weights and batches")
    parser.add_argument("--figure", metavar="FILE", help="draw the shares of one prediction")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    epochs, queries = (2, 10) if arguments.quick else (15, 60)
    print(f"torch {torch.__version__}, {platform.machine()}, {time.strftime('%F')}; {epochs} epochs, {queries} queries")
    line = "{:<10} {:>17} {:>17} {:>16} {:>17}"
    print(line.format("optimizer", "rank correlation", "common of top 10", "residual exact", "residual as SGD"))
    results, rows = {}, []
    for name in OPTIMIZERS:
        results[name] = shares(name, epochs, queries, arguments.seed)
        rows.append(compare(name, *results[name]))
        numbers = list(rows[-1].values())[1:]
        print(line.format(name, f"{numbers[0]:.3f}", f"{numbers[1]:.1f}", f"{numbers[2]:.1e}", f"{numbers[3]:.2g}"))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    if arguments.figure:
        draw(results, rows, arguments.figure)


if __name__ == "__main__":
    main()
