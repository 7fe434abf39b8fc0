"""How far does the first-order answer to "what would training on these samples do?" go?

    python benchmarks/added_samples.py [--quick] [--json FILE]

Networks on digits are recorded; `KernelMachine.add_samples` says what 1, 5 and 20 further steps of their own optimizer
on 50 new samples would do to the outputs of 150 others, and the steps are really taken, on a copy. `labels` are the
true ones, or wrong ones (c → c + 1), which contradict what the network has learnt. Rank correlation is the mean over
the outputs, the error is relative to the true change; `remainder` and `gradient_error` are what `add_samples` itself
says is beyond first order. Exit status 1 where ranks of true labels fall below 0.9, or of wrong ones without a warning.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _attribution_methods import LOSS, run
from _attribution_training import OPTIMIZERS, TORCH, Case, Sizes, case
from scipy.stats import spearmanr
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.errors import CertificateWarning
from pathkernel.kernel_machine.added_samples import REMAINDER

NETWORKS = ("MLP tanh", "MLP ReLU")
STEPS = (1, 5, 20)
NEW, QUERIES = 50, 150
RANKS = 0.9


def continued(model: nn.Module, optimizer: torch.optim.Optimizer, X: Tensor, y: Tensor, steps: int) -> nn.Module:
    """The network after further steps of its optimizer, on copies of both."""
    model, optimizer = copy.deepcopy((model, optimizer))
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(X), y).backward()
        optimizer.step()
    return model


def recorded(own: Case) -> tuple[nn.Module, torch.optim.Optimizer, pk.Trajectory]:
    """A recorded run, and its optimizer as it was at the end."""
    model, trajectory = run(own, recorded=True)
    again = own.network(own.seed)  # the same run, plainly: `run` keeps its optimizer to itself
    optimizer = TORCH[own.optimizer](again.parameters(), **own.settings)
    for ids in own.batches(own.seed):
        optimizer.zero_grad()
        LOSS(again(own.X[ids]), own.y[ids]).backward()
        optimizer.step()
    assert trajectory is not None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    return again, optimizer, trajectory


def rows_of(network: str, optimizer: str, seed: int, sizes: Sizes) -> list[dict[str, Any]]:
    """Rows of one recorded run."""
    own = case("digits", network, optimizer, seed, sizes)
    model, stepping, trajectory = recorded(own)
    X, queries = own.X_query[:NEW], own.X_query[NEW:]
    machine = pk.KernelMachine(trajectory)
    before = model(queries).detach().numpy()
    rows = []
    for labels in ("true", "wrong"):
        y = own.y_query[:NEW] if labels == "true" else (own.y_query[:NEW] + 1) % 10
        for steps in STEPS:
            grown = machine.add_samples(X, y, steps=steps)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CertificateWarning)
                predicted = grown.decision_function(queries) - before
            true = continued(model, stepping, X, y, steps)(queries).detach().numpy() - before
            ranks = [spearmanr(predicted[:, c], true[:, c]).statistic for c in range(true.shape[1])]
            error = float(np.linalg.norm(predicted - true) / np.linalg.norm(true))
            row = {"network": network, "optimizer": optimizer, "seed": seed, "labels": labels, "steps": steps}
            row |= {"rank_correlation": float(np.mean(ranks)), "relative_error": error}
            row |= {"remainder": grown.remainder(queries), "gradient_error": grown.gradient_error}
            print(
                f"{network}, {optimizer}, seed {seed}, {labels} labels, {steps:2d} steps: ranks "
                f"{row['rank_correlation']:.3f}, error {error:.3f}, remainder {row['remainder']:.3f}, of the gradient "
                f"{row['gradient_error']:.3f}",
                flush=True,
            )
            rows.append(row)
    return rows


def failed(row: dict[str, Any]) -> bool:
    """True where ranks are lost, and for wrong labels nothing says so."""
    warned = max(row["remainder"], row["gradient_error"]) > REMAINDER
    return row["rank_correlation"] < RANKS and (row["labels"] == "true" or not warned)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one network, one seed, a third of the samples")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(samples=300 if arguments.quick else 1000, queries=NEW + QUERIES)
    rows = [
        row
        for network in NETWORKS[: 1 if arguments.quick else None]
        for optimizer in OPTIMIZERS
        for seed in ((0,) if arguments.quick else (0, 1, 2))
        for row in rows_of(network, optimizer, seed, sizes)
    ]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    lost = [row for row in rows if failed(row)]
    print(f"{len(rows) - len(lost)} of {len(rows)} as they should be")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
