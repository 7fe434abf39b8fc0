"""Columns of the shares: whom a row of a batch belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pathkernel.runtime.transfers import sent
from pathkernel.trajectory.step import MicroBatch


@dataclass(frozen=True)
class Owners:
    r"""Columns that the rows of a batch belong to.

    .. math:: \mathrm{share}_j = \sum_{r, k : \mathrm{column}_{rk} = j} w_{rk}\, \mathrm{row}_r

    Attributes
    ----------
    columns
        (R, k) int64: up to k owners of each row.
    weights
        (R, k) float64, parts of a row that add up to 1; None where each row has one owner.
    """

    columns: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.columns)

    def to(self, device: torch.device) -> Owners:
        """The same on a device."""
        return Owners(sent(self.columns, device), None if self.weights is None else sent(self.weights, device))

    def part(self, rows: slice) -> Owners:
        """Owners of some of the rows."""
        return Owners(self.columns[rows], None if self.weights is None else self.weights[rows])

    def add(self, total: Tensor, rows: Tensor, scale: float = 1.0) -> None:
        """Add rows (R, Q) to the columns that they belong to, in a total (N, Q)."""
        for place in range(self.columns.shape[1]):
            own = rows if self.weights is None else rows * self.weights[:, place, None].to(rows.dtype)
            total.index_add_(0, self.columns[:, place], own, alpha=scale)

    def spread(self, slopes: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Columns (R k,), slopes (R k, C) and kernel values (Q, R k, C), with a row of its own for each owner."""
        if self.weights is None:
            return self.columns[:, 0], slopes, kernel
        k = self.columns.shape[1]
        weighted = kernel.repeat_interleave(k, dim=1) * self.weights.reshape(1, -1, 1).to(kernel.dtype)
        return self.columns.reshape(-1), slopes.repeat_interleave(k, dim=0), weighted


@dataclass
class Columns:
    """Columns of the shares: training samples by id, then the passes of each source, in the order of their coming.

    Attributes
    ----------
    samples
        N, the training samples.
    sources
        How many ids each source has given, by its name; see `pathkernel.KernelRecorder.source`.
    """

    samples: int
    sources: dict[str, int] = field(default_factory=dict)

    def meet(self, batch: MicroBatch) -> None:
        """Count the ids of a batch."""
        if batch.source is not None and batch.ids.numel():
            known = self.sources.get(batch.source, 0)
            self.sources[batch.source] = max(known, int(batch.ids.max()) + 1)

    def __len__(self) -> int:
        return self.samples + sum(self.sources.values())

    @property
    def slices(self) -> Mapping[str, slice]:
        """Columns of each source."""
        found, begin = {}, self.samples
        for name, count in self.sources.items():
            found[name] = slice(begin, begin + count)
            begin += count
        return found

    def owners(self, batches: Sequence[MicroBatch]) -> Owners:
        """Owners of the rows of some batches, one after another."""
        slices = self.slices
        columns = [own.ids if own.source is None else own.ids + slices[own.source].start for own in batches]
        if all(batch.parts is None for batch in batches):
            return Owners(torch.cat(columns)[:, None])
        most = max(ids.shape[1] if ids.dim() > 1 else 1 for ids in columns)
        padded, weights = [], []
        for batch, ids in zip(batches, columns, strict=True):
            own = ids.reshape(len(ids), -1)
            parts = torch.ones(own.shape, dtype=torch.float64) if batch.parts is None else batch.parts.double()
            missing = most - own.shape[1]
            padded.append(torch.cat([own, own[:, :1].expand(-1, missing)], dim=1))
            weights.append(torch.cat([parts, parts.new_zeros(len(own), missing)], dim=1))
        return Owners(torch.cat(padded), torch.cat(weights))
