"""What a sweep through a trajectory adds up for its queries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel.kernel_machine.forms import Form, join_forms
from pathkernel.quadrature import StepAverage


@dataclass
class Account:
    """What a sweep adds up, for Q queries.

    Attributes
    ----------
    channels
        (Q,) by name; a forward sweep puts the sum over samples under ``"samples"``.
    missed
        What the quadrature missed, in absolute value and summed over the pieces, (Q,).
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
        Of the batches that the shares are of, by `pathkernel.trajectory.batch_gradients.SplitCertificate`, (Q,); NaN
        where it was not measured.
    samples_checked
        Part of the gradients in which a wrong sample would have been seen, (Q,); see the same.
    """

    channels: dict[str, Tensor]
    missed: Tensor
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
    def opened(cls, initial: Tensor) -> Account:
        """An account that holds the untrained network's outputs alone."""
        channels: dict[str, Tensor] = defaultdict(lambda: torch.zeros_like(initial))
        channels["initial"] = initial
        return cls(channels, missed=torch.zeros_like(initial), short=torch.zeros_like(initial))

    def on_cpu(self) -> Account:
        """The same, finished: where results are."""
        for held in (self.channels, self.modules):
            held |= {name: value.cpu() for name, value in held.items()}
        for name in ("missed", "short", "shares", "steps", "shares_error", "split_error", "samples_checked"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.cpu())
        return self

    def book(self, average: StepAverage) -> Any:
        """Note error and cost of a quadrature; returns its gradient."""
        self.missed += average.error
        if average.short is not None:
            self.short += average.short
        self.evaluations += average.evaluations
        return average.gradient


def joined(accounts: Iterable[Account], queries: int) -> Account:
    """Accounts of blocks of queries as one; what has a number for each training sample is never there twice.

    Parameters
    ----------
    accounts
        Of the blocks, made one after the other.
    queries
        Q of all.
    """
    wide: dict[str, Tensor] = {}
    found: list[Account] = []
    begin = 0
    for account in accounts:
        end = begin + len(account.missed)
        if end == queries and not found:
            return account
        assert account.shares is not None
        for name, rows in {"": account.shares, **account.modules}.items():
            if name not in wide:
                wide[name] = rows.new_empty(queries, rows.shape[1])
            wide[name][begin:end] = rows
        account.shares, account.modules, begin = None, {}, end
        del rows
        found.append(account)
        del account
    shares = wide.pop("")
    names = list(dict.fromkeys(name for account in found for name in account.channels))
    return Account(
        channels={
            name: torch.cat([a.channels.get(name, torch.zeros_like(a.missed)) for a in found]) for name in names
        },
        missed=torch.cat([a.missed for a in found]),
        short=torch.cat([a.short for a in found]),
        evaluations=sum(a.evaluations * len(a.missed) for a in found) / queries,
        shares=shares,
        modules=wide,
        steps=_joined([a.steps for a in found]),
        form=None if found[0].form is None else join_forms([a.form for a in found if a.form is not None]),
        shares_error=_joined([a.shares_error for a in found]),
        split_error=_joined([a.split_error for a in found]),
        samples_checked=_joined([a.samples_checked for a in found]),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Rows of blocks of queries, or None where they were not asked for."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def arrays_of(account: Account) -> dict[str, np.ndarray]:
    """An account as arrays with one row for each query, by name."""
    assert account.shares is not None
    arrays = {
        "shares": account.shares,
        "missed": account.missed,
        "short": account.short,
        "evaluations": torch.full_like(account.missed, account.evaluations),
        **{f"channel {name}": value for name, value in account.channels.items()},
        **{f"module {name}": value for name, value in account.modules.items()},
    }
    optional = {
        "steps": account.steps,
        "shares error": account.shares_error,
        "split error": account.split_error,
        "samples checked": account.samples_checked,
    }
    arrays |= {name: value for name, value in optional.items() if value is not None}
    return {name: value.numpy() for name, value in arrays.items()}


def account_of(arrays: Mapping[str, np.ndarray]) -> Account:
    """The account that `arrays_of` took apart."""
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    under = lambda kind: {  # noqa: E731
        name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)
    }
    return Account(
        channels=under("channel "),
        missed=tensors["missed"],
        short=tensors["short"],
        evaluations=tensors["evaluations"].mean().item(),
        shares=tensors["shares"],
        modules=under("module "),
        steps=tensors.get("steps"),
        shares_error=tensors.get("shares error"),
        split_error=tensors.get("split error"),
        samples_checked=tensors.get("samples checked"),
    )
