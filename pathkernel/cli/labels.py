"""Command that finds wrong labels: a ranked list, with the reason, and a picture."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch

from pathkernel._typing import PyTree
from pathkernel.cli.objects import opened
from pathkernel.cli.places import check_picture
from pathkernel.cli.stores import Result, _npz_file
from pathkernel.errors import InputError, check_number
from pathkernel.gradients.pytrees import take
from pathkernel.influence.labels import LabelQuality, label_quality
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.runtime.extras import require_extra
from pathkernel.trajectory.trajectory import Trajectory


def labels(arguments: argparse.Namespace) -> Result:
    """List the training samples whose labels are most doubtful, and which samples pulled the other way."""
    if arguments.picture is not None:
        check_picture(arguments.picture, "--picture")
        require_extra("plot", "`labels --picture`", "matplotlib")
    check_number("--reasons", arguments.reasons, whole=True, example=3)
    trajectory = opened(arguments)
    samples = len(trajectory.data)
    if not 1 <= arguments.top <= samples:
        raise InputError(
            f"`--top {arguments.top}` was given for {samples} training samples",
            f"It lies between 1 and {samples}",
            f"Write `--top {min(20, samples)}`",
        )
    quality = label_quality(trajectory, nodes=arguments.nodes, memory=arguments.memory, progress=not arguments.quiet)
    ids = quality.top(arguments.top)
    against = _against(trajectory, quality, ids, arguments)
    rows = [_row(quality, int(i), pulled) for i, pulled in zip(ids, against, strict=True)]
    if arguments.output is not None:
        _npz_file(arguments.output, {"score": quality.score, "ids": quality.ids, **quality.doubts})
    if arguments.picture is not None:
        _draw(trajectory, quality, ids, against, arguments)
    numbers = {
        "samples": len(quality),
        "steps": list(quality.steps),
        "functional": quality.functional,
        "weights": dict(quality.weights),
        "labels": rows,
        "picture": None if arguments.picture is None else str(arguments.picture),
        "output": None if arguments.output is None else str(arguments.output),
    }
    return 0, numbers, "\n".join(_lines(quality, rows))


Pulled = list[tuple[int, float]]
"""Samples that pulled the other way, with their shares in the margin (of a regression, in the loss)."""


def _against(
    trajectory: Trajectory, quality: LabelQuality, ids: np.ndarray, arguments: argparse.Namespace
) -> list[Pulled]:
    """The samples that lowered the margin of each label most; none where shares are not on record or not asked for."""
    if not arguments.reasons or "KernelMachine" not in trajectory.schedule.serves:
        return [[] for _ in ids]
    machine = KernelMachine(trajectory, memory=arguments.memory, progress=not arguments.quiet)
    margins = quality.functional == "margin"
    X, y = trajectory.data[torch.from_numpy(np.array(ids))]
    why = machine.explain((X, y), outputs="margin" if margins else "loss", store=arguments.store)
    shares = why.shares[:, : len(quality)] * (1 if margins else -1)
    found = []
    for sample, own in zip(ids, shares, strict=True):
        others = [int(i) for i in np.argsort(own, kind="stable") if i != sample and own[i] < 0]
        found.append([(i, float(own[i])) for i in others[: arguments.reasons]])
    return found


def _row(quality: LabelQuality, sample: int, pulled: Pulled) -> dict[str, Any]:
    return {
        "sample": sample,
        "label": written(quality.targets[sample]),
        "prediction": written(quality.predictions[sample]),
        "score": float(quality.score[sample]),
        **{name: float(getattr(quality, name)[sample]) for name in quality.doubts},
        "against": [{"sample": i, "label": written(quality.targets[i]), "share": share} for i, share in pulled],
    }


def written(value: np.ndarray) -> float | int | list[float]:
    """A label or a prediction as JSON has it."""
    return value.item() if value.ndim == 0 else [float(one) for one in value.ravel()]


def _lines(quality: LabelQuality, rows: list[dict[str, Any]]) -> list[str]:
    kind = "average margin" if quality.functional == "margin" else "minus the average residual"
    lines = [
        f"{len(rows)} of {len(quality)} labels, the most doubtful first, from {len(quality.steps)} points of the path "
        f"({kind}; loss at the end)"
    ]
    for place, row in enumerate(rows, start=1):
        lines.append(
            f"{place:4}. sample {row['sample']}: label {_short(row['label'])}, the network says "
            f"{_short(row['prediction'])}; score {row['score']:.3f} ({row['area_under_margin']:+.3g}; "
            f"{row['final_loss']:.3g})"
        )
        if row["against"]:
            others = ", ".join(
                f"{one['sample']} (label {_short(one['label'])}, {one['share']:+.3g})" for one in row["against"]
            )
            lines.append(f"      pulled the other way by {others}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(
    trajectory: Trajectory, quality: LabelQuality, ids: np.ndarray, against: list[Pulled], arguments: argparse.Namespace
) -> None:
    """Write the picture: a row for each sample, with those that pulled the other way."""
    from pathkernel.plotting.appearance import write_figure
    from pathkernel.plotting.doubtful_labels import DoubtfulLabelsDisplay

    X = trajectory.data.everything()[0]
    shown = [[int(i), *(other for other, _ in pulled)] for i, pulled in zip(ids, against, strict=True)]
    images = {i: _image(take(X, i)) for row in shown for i in row}
    display = DoubtfulLabelsDisplay.from_quality(quality, images, against=[row[1:] for row in shown], k=len(ids))
    write_figure(display.plot().figure_, arguments.picture)


def _image(sample: PyTree) -> np.ndarray:
    """A sample as an image: a row of s² numbers as a square."""
    if not isinstance(sample, torch.Tensor):
        raise InputError(
            f"A picture was asked of samples that are a {type(sample).__name__}",
            "An image is one array for each sample",
            "Leave `--picture` out",
        )
    values = sample.detach().cpu().numpy()
    side = math.isqrt(values.size)
    return values.reshape(side, side) if values.ndim == 1 and side * side == values.size else values
