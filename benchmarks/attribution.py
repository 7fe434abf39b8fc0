"""How well do attributions foresee what training again says, and find wrong labels?

    python benchmarks/attribution.py [--quick] [--only "digits MLP tanh" ...] [--optimizers AdamW ...] [--seeds 0 1 2]
        [--methods datamodel ...] [--peers] [--tiny] [--device NAME] [--json FILE]

For each network, optimizer and seed: linear datamodelling scores on subsets without 1, 10 and 50 % of the samples in
the order of the run (`lds_1`, `lds_10`, `lds_50`) and on halves of the data afresh (`lds_fresh`, mean of 3 trainings
each), rank correlation of single removals (`loo`), means over 50 queries; and for a run on a fifth of wrong labels that
it learns by heart, how well these are found (`mislabel_auc`, `precision` at their number). All truths are networks
that were trained again, by a loop that knows nothing of pathkernel; no option of a method is chosen on them. `seconds`
is CPU time on one thread, `training_ratio` that over the time of training plainly, `peak_mb` the growth of resident
memory.

`--peers` adds captum and dattri, where the environment has them. With `--device cuda` the networks of the truth are
trained on a GPU, 60 at a time; methods stay on the processor. Exit status 1 where `Trajectory.retrain` is not what
the benchmark's own loop trains, and, for the whole table, where a target is not met.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _attribution_methods as ours
import _attribution_peers as peers
import numpy as np
import torch
from _attribution_training import NETWORKS, OPTIMIZERS, Case, Sizes, Together, Truth, case, names, truth
from _worker import watched

from pathkernel.analysis.evaluation import (
    correlation,
    leave_one_out_correlation,
    linear_datamodeling_score,
    mislabel_auc,
    mislabel_precision,
    random_subsets,
)

COLUMNS = ("lds_1", "lds_10", "lds_50", "lds_fresh", "loo", "mislabel_auc", "precision")
FULL = Sizes()
QUICK = Sizes(samples=500, queries=20, subsets=24, fresh=2, removed=24, epochs=15, memorizing=30)
TINY = Sizes(samples=100, queries=6, subsets=6, fresh=1, removed=5, epochs=3, memorizing=5)
SAME = 1e-6
"""Relative difference up to which two loops in float64 have trained the same network."""
ORACLE = "training again, one seed"
"""How far one training on each half foresees the mean of other seeds': what fresh seeds leave to be foreseen."""
FRESH, FRESH_RELU_SGD = 0.70, 0.62
AUC, BEHIND = 0.95, 0.005
Rows = list[dict[str, Any]]


def mean(values: np.ndarray) -> float:
    """Mean over the queries that have a correlation."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def judged(scores: np.ndarray, true: Truth) -> dict[str, float]:
    """All measures of scores (Q, N)."""
    found = {name: mean(linear_datamodeling_score(scores, *own)) for name, own in true.subsets.items()}
    found["lds_fresh"] = mean(linear_datamodeling_score(scores, *true.fresh))
    found["loo"] = mean(leave_one_out_correlation(scores, true.removed, true.changes))
    return found


def foreseen_by_one_seed(margins: np.ndarray) -> float:
    """Rank correlation over subsets of one training on each with the mean of the others, margins (M, R, Q)."""
    seeds = range(len(margins))
    others = [np.delete(margins, m, axis=0).mean(axis=0) for m in seeds]
    return float(np.mean([mean(correlation(margins[m], others[m])) for m in seeds]))


def trained(own: Case) -> tuple[ours.Trained, float]:
    """A recorded run, and the time of training plainly."""
    seconds, _, _ = watched(lambda: ours.run(own, recorded=False), time.process_time)
    model, trajectory = ours.run(own, recorded=True)
    assert trajectory is not None
    places = np.linspace(0, len(trajectory), ours.CHECKPOINTS + 1).round().astype(int)[1:]
    checkpoints = [trajectory.parameters(int(s)) for s in dict.fromkeys(places.tolist())]
    return ours.Trained(own, model, trajectory, checkpoints, lambda count: of_other_seeds(own, count)), seconds


def of_other_seeds(own: Case, count: int) -> list[dict[str, torch.Tensor]]:
    """Networks for an ensemble, each trained from an initialisation and in an order of its own."""
    states = []
    for k in range(count):
        other = Case(**{**vars(own), "seed": 10_000 + 100 * own.seed + k})
        states.append(ours.run(other, recorded=False)[0].state_dict())
    return states


def check_retraining(run: ours.Trained, own: Case) -> float:
    """Relative difference of `Trajectory.retrain` from the benchmark's own loop."""
    weights = random_subsets(len(own.X), 0.5, 2, np.random.default_rng(1))
    together = Together(own)
    start = together.start(own.seed).repeat(2, 1)
    theirs = together.trained(start, list(own.batches(own.seed)), torch.from_numpy(weights))
    return float((ours.trained_again(run, weights) - theirs).norm() / (theirs - start).norm())


def measured(
    label: dict[str, Any], sizes: Sizes, methods: list[str] | None, with_peers: bool, device: str = "cpu"
) -> Rows:
    """All rows of one network, optimizer and seed."""
    take = lambda table: {name: call for name, call in table.items() if methods is None or name in methods}  # noqa: E731
    scores = take({**ours.SCORES, **(peers.SCORES if with_peers else {})})
    suspicions = take({**ours.SUSPICIONS, **(peers.SUSPICIONS if with_peers else {})})
    rows: dict[str, dict[str, Any]] = {}

    def row(method: str) -> dict[str, Any]:
        empty = dict.fromkeys((*COLUMNS, "seconds", "training_ratio", "peak_mb"))
        return rows.setdefault(method, {**label, "method": method, **empty})

    def timed(method: str, call: Callable[[], Any], training: float) -> Any:
        seconds, megabytes, found = watched(call, time.process_time)
        if row(method)["seconds"] is None:
            row(method).update(seconds=seconds, training_ratio=seconds / training, peak_mb=megabytes)
        return found

    right = case(**label, sizes=sizes)
    if scores:
        run, training = trained(right)
        difference = check_retraining(run, right)
        print(f"  Trajectory.retrain is the plain loop to {difference:.1e}; training {training:.2f} s", flush=True)
        if difference > SAME:
            raise SystemExit(f"`Trajectory.retrain` trains another network: {difference:.1e}")
        true = truth(right, sizes, random_subsets, device)
        if sizes.fresh > 1:
            row(ORACLE)["lds_fresh"] = foreseen_by_one_seed(true.fresh[1])
            show(row(ORACLE))
        for method, call in scores.items():
            found = timed(method, lambda call=call, run=run: call(run), training)
            row(method).update(judged(found, true))
            if with_peers:
                theirs = peers.judged_by_dattri(found, *true.subsets["lds_10"])
                assert np.isclose(theirs, row(method)["lds_10"], rtol=0, atol=1e-9, equal_nan=True), (method, theirs)
            show(row(method))
    wrong = case(**label, sizes=sizes, wrong_labels=True)
    run, training = trained(wrong)
    flipped = wrong.flipped.numpy()

    def look_for(method: str, suspicion: np.ndarray) -> None:
        auc, precision = mislabel_auc(suspicion, flipped), mislabel_precision(suspicion, flipped)
        row(method).update(mislabel_auc=auc, precision=precision)
        show(row(method))

    for method, call in suspicions.items():
        look_for(method, timed(method, lambda call=call, run=run: call(run), training))
    if methods is None or "label_quality" in methods:
        for name, values in ours.parts_of_label_quality(run).items():
            look_for(f"label_quality: {name}", values)
    return list(rows.values())


def show(row: dict[str, Any]) -> None:
    figures = [f"{name} {row[name]:.3f}" for name in COLUMNS if row[name] is not None]
    cost = "" if row["seconds"] is None else f"; {row['seconds']:.2f} s, {row['training_ratio']:.2g} × training"
    print(f"  {row['method']:32s} {', '.join(figures)}{cost}", flush=True)


def targets(rows: Rows) -> list[tuple[str, float, float]]:
    """What was promised, what was measured, and the bound; means over seeds."""
    found = []
    for where in dict.fromkeys((row["data"], row["network"], row["optimizer"]) for row in rows):
        cell = [row for row in rows if (row["data"], row["network"], row["optimizer"]) == where]

        def average(method: str, column: str, cell: Rows = cell) -> float:
            values = [row[column] for row in cell if row["method"] == method and row[column] is not None]
            return float(np.mean(values)) if values else float("nan")

        name, fresh = ", ".join(where), average("datamodel", "lds_fresh")
        bound = FRESH_RELU_SGD if where[1:] == ("MLP ReLU", "SGD momentum") else FRESH
        found.append((f"{name}: datamodel, fresh seeds", fresh, bound))
        found.append((f"{name}: datamodel above TRAK-10", fresh, average("dattri TRAK-10", "lds_fresh")))
        combined = average("label_quality", "mislabel_auc")
        found.append((f"{name}: AUC of wrong labels", combined, AUC))
        singles = {row["method"] for row in cell if row["mislabel_auc"] is not None} - {"label_quality"}
        best = max((average(single, "mislabel_auc") for single in singles), default=float("nan"))
        found.append((f"{name}: AUC against the best single score", combined, best - BEHIND))
        found.append((f"{name}: minus label_quality over training", -average("label_quality", "training_ratio"), -1.0))
    return [claim for claim in found if np.isfinite(claim[1:]).all()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names(), help="networks")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--peers", action="store_true", help="captum and dattri too")
    parser.add_argument("--quick", action="store_true", help="fewer samples and subsets, two networks, one seed")
    parser.add_argument("--tiny", action="store_true", help="so small that figures mean nothing, to see that it runs")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where the networks of the truth are trained")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    known = {*ours.SCORES, *ours.SUSPICIONS, *peers.SCORES, *peers.SUSPICIONS}
    if strange := set(arguments.methods or ()) - known:
        parser.error(f"no methods: {', '.join(sorted(strange))}; there are {', '.join(sorted(known))}")
    if arguments.peers and (lacking := peers.missing()):
        print(f"--peers: {lacking}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    ours.run(case("digits", "MLP tanh", "AdamW", 0, TINY), recorded=True)  # what is loaded once is nobody's time
    small = arguments.quick or arguments.tiny
    sizes = TINY if arguments.tiny else QUICK if arguments.quick else FULL
    chosen = arguments.only or (["digits MLP tanh", "digits MLP ReLU"] if small else names())
    seeds = arguments.seeds or ([0] if small else [0, 1, 2])
    rows: Rows = []
    for data, network in NETWORKS:
        for optimizer in arguments.optimizers or (["AdamW"] if small else OPTIMIZERS):
            for seed in seeds if f"{data} {network}" in chosen else ():
                print(f"{data}, {network}, {optimizer}, seed {seed}", flush=True)
                label = {"data": data, "network": network, "optimizer": optimizer, "seed": seed}
                rows += measured(label, sizes, arguments.methods, arguments.peers, arguments.device)
                if arguments.json:  # after each, so that a long run that ends early leaves what it has
                    arguments.json.write_text(json.dumps(rows, indent=1))
    if small:
        return 0
    missed = 0
    for claim, value, bound in targets(rows):
        missed += not value >= bound
        print(f"{claim}: {value:.3f}, bound {bound:.3f}: {'met' if value >= bound else 'NOT met'}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
