"""Rows of `recording/test_refusals.py` for margins, self-shares, and what `pathkernel.influence` is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import make_inputs, make_model, record
from torch import nn

import pathkernel as pk
from pathkernel import errors

Row = tuple[Callable[[], Any], type[Exception], tuple[str, str, str]]

X, LABELS = make_inputs(3), torch.tensor([0, 1, 2])

INFLUENCE: dict[str, Row] = {
    "a margin of a label that there is none of": (
        lambda: pk.TangentKernel(make_model(), outputs="margin")((X, LABELS + 1)),
        errors.InputError,
        ("int64 and shape (3,) from 1 to 3", "integers from 0 to 2", 'outputs="loss"'),
    ),
    "a margin among several rows of outputs": (
        lambda: pk.TangentKernel(nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))).double(), outputs="margin")(
            (X, LABELS)
        ),
        errors.InputError,
        ("returns (1, 2, 2) for one sample", "C outputs in one row", "`outputs=lambda z: ...`"),
    ),
    "a self-share of an output": (
        lambda: pk.KernelMachine(record().trajectory).self_shares("trace"),
        errors.InputError,
        ("`outputs='trace'` was given", "'loss' or 'margin'", "`machine.self_shares()`"),
    ),
}
