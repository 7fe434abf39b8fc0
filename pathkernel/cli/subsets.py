"""Commands that choose samples: which training samples to keep, and which candidates to label next."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch.utils import _pytree as pytree

from pathkernel.cli.labels import written
from pathkernel.cli.objects import opened, samples
from pathkernel.cli.stores import Result, _npz_file
from pathkernel.errors import InputError
from pathkernel.influence.active_learning import label_next as choose_candidates
from pathkernel.influence.pruning import prune as choose_kept
from pathkernel.trajectory.trajectory import Trajectory

SHOWN = 20
"""Ids in a line of text; all of them are in the files that were asked for."""


def prune(arguments: argparse.Namespace) -> Result:
    """Choose the training samples that are kept; their ids go to ``--output`` and ``--json``."""
    keep = _keep(arguments.keep)
    trajectory = opened(arguments)
    coreset = choose_kept(
        trajectory,
        keep,
        criterion=arguments.criterion,
        nodes=arguments.nodes,
        store=arguments.store,
        memory=arguments.memory,
        progress=not arguments.quiet,
    )
    if arguments.output is not None:
        _npz_file(arguments.output, {"ids": coreset.ids, "left_out": coreset.left_out, "weights": coreset.weights})
    numbers = {
        "samples": len(coreset.weights),
        "kept": len(coreset),
        "criterion": coreset.criterion,
        "ids": coreset.ids.tolist(),
        "left_out": coreset.left_out.tolist(),
        "classes": _classes(trajectory, coreset.ids),
        "output": None if arguments.output is None else str(arguments.output),
    }
    lines = [
        f"{len(coreset)} of {len(coreset.weights)} training samples are kept, by {coreset.criterion!r}",
        f"kept, the most needed first: {_ids(coreset.ids)}",
        f"left out, the least missed first: {_ids(coreset.left_out)}",
        *(f"label {row['label']}: {row['kept']} of {row['samples']}" for row in numbers["classes"]),
    ]
    return 0, numbers, "\n".join(lines)


def label_next(arguments: argparse.Namespace) -> Result:
    """Choose the candidates that are labelled next; their rows go to ``--output`` and ``--json``."""
    trajectory = opened(arguments)
    (X,) = samples(arguments.candidates, ("X",))
    found = choose_candidates(
        trajectory,
        X,
        arguments.count,
        criterion=arguments.criterion,
        nodes=arguments.nodes,
        store=arguments.store,
        memory=arguments.memory,
        progress=not arguments.quiet,
    )
    if arguments.output is not None:
        _npz_file(arguments.output, {"ids": found.ids, "score": found.score, "predictions": found.predictions})
    rows = [
        {"candidate": int(i), "prediction": written(found.predictions[i]), "score": float(found.score[i])}
        for i in found.ids
    ]
    numbers = {
        "candidates": len(found.score),
        "criterion": found.criterion,
        "label_next": rows,
        "output": None if arguments.output is None else str(arguments.output),
    }
    lines = [f"{len(rows)} of {len(found.score)} candidates, the first to label first, by {found.criterion!r}"]
    for place, row in enumerate(rows, start=1):
        lines.append(
            f"{place:4}. candidate {row['candidate']}: the network says {row['prediction']}; score {row['score']:.3g}"
        )
    return 0, numbers, "\n".join(lines)


def _keep(text: str) -> float | int:
    """A part or a number of samples, as it was written."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise InputError(
        f"`--keep {text}` was given",
        "It is the part of the training samples that is kept, between 0 and 1, or how many, a whole number",
        "Write `--keep 0.5`",
    )


def _classes(trajectory: Trajectory, ids: np.ndarray) -> list[dict[str, int]]:
    """How many samples of each label there are and are kept; none where targets are no labels."""
    targets = pytree.tree_leaves(trajectory.data.targets(torch.arange(len(trajectory.data))))
    if len(targets) != 1 or targets[0].is_floating_point() or targets[0].dim() != 1:
        return []
    labels = targets[0].cpu().numpy()
    kept = labels[ids]
    return [
        {"label": int(label), "samples": int((labels == label).sum()), "kept": int((kept == label).sum())}
        for label in np.unique(labels)
    ]


def _ids(ids: np.ndarray) -> str:
    return ", ".join(map(str, ids[:SHOWN])) + (" …" if len(ids) > SHOWN else "")
