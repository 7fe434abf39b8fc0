"""Sums of a sweep through a trajectory, for its queries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.kernel_machine.forms import Form, join_forms
from pathkernel.quadrature import StepAverage


@dataclass
class Accumulator:
    """Sums of a sweep, for Q queries.

    Attributes
    ----------
    channels
        (Q,) by name; a forward sweep puts samples and named channels under ``"together"``.
    quadrature_error
        Change of the queries that the quadrature missed, in absolute value and summed over the pieces, (Q,).
    short
        The part of it that a quadrature with a tolerance accepted above its tolerance, (Q,).
    evaluations
        Query gradients taken per query, over all pieces.
    shares
        (Q, N), backward only.
    modules, steps
        (Q, N) by module name and (Q, S), where asked.
    form
        The sum in another form, where asked.
    shares_error
        Σ_i of the sizes of the errors of the shares, (Q,), where asked.
    split_error
        Of the batches that the shares are of, by `pathkernel.trajectory.split_certificate.SplitCertificate`, (Q,); NaN
        where it was not measured.
    samples_checked
        Part of the gradients in which a wrong sample would have been seen, (Q,); see the same.
    """

    channels: dict[str, Tensor]
    quadrature_error: Tensor
    short: Tensor
    evaluations: float = 0.0
    shares: Tensor | None = None
    modules: dict[str, Tensor] = field(default_factory=dict)
    steps: Tensor | None = None
    form: Form | None = None
    shares_error: Tensor | None = None
    split_error: Tensor | None = None
    samples_checked: Tensor | None = None

    @classmethod
    def start(cls, initial: Tensor) -> Accumulator:
        """An accumulator that holds the untrained network's outputs alone."""
        channels: dict[str, Tensor] = defaultdict(lambda: torch.zeros_like(initial))
        channels["initial"] = initial
        return cls(channels, quadrature_error=torch.zeros_like(initial), short=torch.zeros_like(initial))

    def on_cpu(self) -> Accumulator:
        """The same, finished: where results are."""
        for held in (self.channels, self.modules):
            held |= {name: value.cpu() for name, value in held.items()}
        for name in ("quadrature_error", "short", "shares", "steps", "shares_error", "split_error", "samples_checked"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.cpu())
        return self

    def add(self, average: StepAverage) -> Any:
        """Note error and cost of a quadrature; returns its gradient."""
        self.quadrature_error += average.error
        if average.short is not None:
            self.short += average.short
        self.evaluations += average.evaluations
        return average.gradient


def concatenate(accumulators: Iterable[Accumulator], queries: int) -> Accumulator:
    """Accounts of blocks of queries as one; what has a number for each training sample is never there twice.

    Parameters
    ----------
    accumulators
        Of the blocks, made one after the other.
    queries
        Q of all.
    """
    wide: dict[str, Tensor] = {}
    found: list[Accumulator] = []
    begin = 0
    for accumulator in accumulators:
        end = begin + len(accumulator.quadrature_error)
        if end == queries and not found:
            return accumulator
        assert accumulator.shares is not None
        for name, rows in {"": accumulator.shares, **accumulator.modules}.items():
            if name not in wide:
                wide[name] = rows.new_empty(queries, rows.shape[1])
            wide[name][begin:end] = rows
        accumulator.shares, accumulator.modules, begin = None, {}, end
        del rows
        found.append(accumulator)
        del accumulator
    shares = wide.pop("")
    names = list(dict.fromkeys(name for accumulator in found for name in accumulator.channels))
    return Accumulator(
        channels={
            name: torch.cat([a.channels.get(name, torch.zeros_like(a.quadrature_error)) for a in found])
            for name in names
        },
        quadrature_error=torch.cat([a.quadrature_error for a in found]),
        short=torch.cat([a.short for a in found]),
        evaluations=sum(a.evaluations * len(a.quadrature_error) for a in found) / queries,
        shares=shares,
        modules=wide,
        steps=_concatenated([a.steps for a in found]),
        form=None if found[0].form is None else join_forms([a.form for a in found if a.form is not None]),
        shares_error=_concatenated([a.shares_error for a in found]),
        split_error=_concatenated([a.split_error for a in found]),
        samples_checked=_concatenated([a.samples_checked for a in found]),
    )


def _concatenated(parts: list[Tensor | None]) -> Tensor | None:
    """Rows of blocks of queries, or None where they were not asked for."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def arrays_of(accumulator: Accumulator) -> dict[str, np.ndarray]:
    """An accumulator as arrays with one row for each query, by name."""
    assert accumulator.shares is not None
    arrays = {
        "shares": accumulator.shares,
        "missed": accumulator.quadrature_error,
        "short": accumulator.short,
        "evaluations": torch.full_like(accumulator.quadrature_error, accumulator.evaluations),
        **{f"channel {name}": value for name, value in accumulator.channels.items()},
        **{f"module {name}": value for name, value in accumulator.modules.items()},
    }
    optional = {
        "steps": accumulator.steps,
        "shares error": accumulator.shares_error,
        "split error": accumulator.split_error,
        "samples checked": accumulator.samples_checked,
    }
    arrays |= {name: value for name, value in optional.items() if value is not None}
    return {name: value.numpy() for name, value in arrays.items()}


def accumulator_of(arrays: Mapping[str, np.ndarray]) -> Accumulator:
    """The accumulator that `arrays_of` took apart."""
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    under = lambda kind: {  # noqa: E731
        name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)
    }
    return Accumulator(
        channels=under("channel "),
        quadrature_error=tensors["missed"],
        short=tensors["short"],
        evaluations=tensors["evaluations"].mean().item(),
        shares=tensors["shares"],
        modules=under("module "),
        steps=tensors.get("steps"),
        shares_error=tensors.get("shares error"),
        split_error=tensors.get("split error"),
        samples_checked=tensors.get("samples checked"),
    )


def attributions_of(
    accumulator: Accumulator,
    output: Tensor,
    queries: tuple[np.ndarray, np.ndarray],
    steps: int,
    engines: Iterable[str],
    sources: Mapping[str, slice],
) -> Attributions:
    """The result of an explanation.

    Parameters
    ----------
    accumulator
        The finished sum.
    output
        The explained network's own outputs, (Q,).
    queries
        Which sample and which output each query is, (Q,) both.
    steps
        Number of steps of the trajectory.
    engines
        How the gradients of the training samples were formed.
    sources
        Columns of samples that are not of the training data.
    """
    moved = (output - accumulator.channels["initial"]).abs().clamp_min(torch.finfo(torch.float64).tiny)
    assert accumulator.shares is not None
    return Attributions(
        shares=accumulator.shares.numpy(),
        channels={name: value.numpy() for name, value in accumulator.channels.items()},
        output=output.numpy(),
        query_index=queries[0],
        output_index=queries[1],
        quadrature_error=(accumulator.quadrature_error / moved).numpy(),
        shares_error=None if accumulator.shares_error is None else (accumulator.shares_error / moved).numpy(),
        gradients_per_step=accumulator.evaluations / steps,
        modules={name: value.numpy() for name, value in accumulator.modules.items()},
        steps=None if accumulator.steps is None else accumulator.steps.numpy(),
        form=accumulator.form,
        split_error=_largest(accumulator.split_error),
        samples_checked=_least(accumulator.samples_checked),
        engine=", ".join(sorted(engines)),
        sources=dict(sources),
    )


def _least(parts: Tensor | None) -> float:
    """Least of the known values; NaN where there is none."""
    return float("nan") if parts is None else -_largest(-parts)


def _largest(errors: Tensor | None) -> float:
    """Largest of the measured values; NaN where there is none."""
    known = torch.zeros(0) if errors is None else errors[~errors.isnan()]
    return known.max().item() if len(known) else float("nan")
