"""Gradient of a step, met with the weights of the queries, on its way to the shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pathkernel._typing import Float
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.matmul import product
from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.block_memory import BlockMemory
from pathkernel.kernel_machine.forms import FormBuilder
from pathkernel.runtime.workspace import Workspace
from pathkernel.trajectory.columns import Owners
from pathkernel.trajectory.coupled_samples import CoupledSamples
from pathkernel.trajectory.stage_gradients import StageGradients


class StepGradients:
    """Gradient of a step, as samples and named channels put it together.

    Attributes
    ----------
    names, vectors
        The channels, and what came from each, (P,).
    owners
        The columns of the shares that the samples belong to.
    coupled
        Samples whose gradients are not formed, with the place of the first of them among all: they are met with the
        weights of the whole step, which are gathered meanwhile.
    weights
        u of the whole step with the factor of the gradient, (Q, P), where there are such samples, or a form is wanted;
        None before anything was gathered.

    Parameters
    ----------
    stage
        The gradient.
    channels
        What was added to it, by name.
    dtype
        Floating type of the weights.
    form
        Whether the weights are wanted in any case.
    memory
        Where blocks of columns are formed; None for memory of their own.
    """

    def __init__(
        self,
        stage: StageGradients,
        channels: list[tuple[str, Tensor]],
        dtype: torch.dtype,
        form: bool,
        memory: BlockMemory | None = None,
    ) -> None:
        self.stage = stage
        self.dtype = dtype
        self.memory = memory
        self.names = [name for name, _ in channels]
        self.vectors = [vector for _, vector in channels]
        self.owners = stage.owners.to(stage.total.device)
        held = isinstance(stage.parts, tuple)  # streamed ones are rows
        parts = list(_placed(stage)) if held else []
        self.coupled = [(place, part) for place, part in parts if isinstance(part, CoupledSamples)]
        self._formed = [(place, part) for place, part in parts if isinstance(part, FactoredGradients)]
        self._columns: dict[int, Tensor] = {}
        self.weights: Tensor | None = None
        self._gathers = form or bool(self.coupled)

    def products(self, where: slice, u: Tensor, push: bool) -> Tensor:
        """g · u of every sample, then of every channel, over a block of columns: (B + channels, Q).

        Zero for samples that are met with all columns at once.
        """
        if self._columns:
            return product(self._columns[where.start], u)
        if self.coupled:
            return self._products_beside_coupled(where, u, push)
        if self.memory is not None and not push:
            found = self.memory.empty(len(self.owners) + len(self.vectors), where.stop - where.start, u)
            return product(self._fill_columns(where, found), u)
        rest = self._rest(where, u)
        if push and not isinstance(self.stage.factor, Tensor):
            pushed = [part.directional_products(where, u).T * self.stage.factor for _, part in self._formed]
            return torch.cat([*pushed, *(row @ u.T for row in rest)])
        return product(torch.cat([self.stage.columns(where, u.dtype), *rest]), u)

    def form(self, columns: Sequence[slice], dtype: torch.dtype, workspace: Workspace) -> None:
        """Form the blocks of columns that will be asked for, and let the gradients go that they are made of.

        Samples that are run together stay as they are.
        """
        if self.coupled or not isinstance(self.stage.parts, tuple):
            return
        rows = len(self.owners) + len(self.vectors)
        sizes = [rows * (where.stop - where.start) for where in columns]
        memory = workspace.empty((sum(sizes),), dtype, self.owners.columns.device)
        for where, block in zip(columns, memory.split(sizes), strict=True):
            self._columns[where.start] = self._fill_columns(where, block.view(rows, -1))
        self.stage, self._formed = replace(self.stage, parts=()), []

    def _fill_columns(self, where: slice, found: Float[Tensor, "n size"]) -> Tensor:
        """Gradients of all samples, then channels, over a block of columns."""
        samples = len(self.owners)
        self.stage.fill_columns(where, found[:samples])
        for row, vector in zip(found[samples:], self.vectors, strict=True):
            row.copy_(vector[where])
        return found

    def _products_beside_coupled(self, where: slice, u: Tensor, push: bool) -> Tensor:
        found = u.new_zeros(len(self.owners) + len(self.vectors), len(u))
        found[len(self.owners) :] = self.channel_products(where, u)
        for place, part in self._formed:
            found[place : place + len(part)] = self.part_products(part, where, u, push)
        return found

    def part_products(self, part: FactoredGradients, where: slice, u: Tensor, push: bool) -> Tensor:
        """g · u of the samples of one pass, (B, Q)."""
        if push and not isinstance(self.stage.factor, Tensor):
            return part.directional_products(where, u).T * self.stage.factor
        return product(self.stage.scaled(part.columns(where, u.dtype), where), u)

    def channel_products(self, where: slice, u: Tensor) -> Tensor:
        """g · u of every channel, (channels, Q)."""
        return torch.cat([u.new_zeros(0, len(u)), *(row @ u.T for row in self._rest(where, u))])

    def _rest(self, where: slice, u: Tensor) -> list[Tensor]:
        return [vector[where].to(u.dtype).unsqueeze(0) for vector in self.vectors]

    # -- samples whose gradients are not formed ---------------------------------------------------------------

    def keep(self, where: slice, u: Tensor, scale: float) -> None:
        """Gather the weights of a block of columns, where they are wanted."""
        if not self._gathers:
            return
        if self.weights is None:
            like = self.stage.total
            self.weights = torch.zeros(len(u), len(like), dtype=self.dtype, device=like.device)
        torch.mul(self.stage.scaled(u, where), scale, out=self.weights[:, where])

    def coupled_products(self, outputs: bool) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """g · u of these samples, (B, Q) of each batch, with the place of its first sample.

        And what u does to each of their outputs, (Q, B, C), where asked and where forward sweeps are right.
        """
        if self.weights is None:
            return
        for place, part in self.coupled:
            pushed = part.outputs(self.weights) if outputs else None
            yield place, part.products(self.weights) if pushed is None else part.weighted(pushed), pushed


def _placed(stage: StageGradients) -> Iterator[tuple[int, FactoredGradients | CoupledSamples]]:
    """Parts of a gradient with the place of their first sample."""
    place = 0
    for part in stage.parts:
        yield place, part
        place += len(part)


class Contributions:
    """Inner products of a step's gradients with their weights, (B + channels, Q), on their way to the accumulator.

    Parameters
    ----------
    accumulator
        Where channels go, and the sums of steps.
    shares, modules
        Shares of all samples, (N, Q), and by module, where asked.
    step
        Index of the step.
    received
        Its gradient.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        shares: Tensor,
        modules: Mapping[str, Tensor],
        step: int,
        received: StepGradients,
    ) -> None:
        self.accumulator = accumulator
        self.shares = shares
        self.modules = modules
        self.step = step
        self.received = received
        width = len(received.owners) + len(received.names)
        self.sum = torch.zeros(width, shares.shape[1], dtype=torch.float64, device=shares.device)

    def add(self, name: str, products: Tensor, scale: float = 1.0) -> None:
        """Products over some columns of a parameter, of samples and channels."""
        self.sum.add_(products, alpha=scale)
        self._add_to_module(name, self.received.owners, products, scale)

    def add_samples(self, name: str, begin: int, products: Tensor, scale: float) -> None:
        """Products over some columns of a parameter, of some of the samples."""
        self.add_rows(begin, products, scale)
        self._add_to_module(name, self.received.owners.part(slice(begin, begin + len(products))), products, scale)

    def _add_to_module(self, name: str, owners: Owners, products: Tensor, scale: float) -> None:
        if self.modules:
            owners.add(self.modules[module_of(name)], products[: len(owners)].double(), scale)

    def add_rows(self, begin: int, products: Tensor, scale: float = 1.0) -> None:
        """Products with some of what was received."""
        self.sum[begin : begin + len(products)].add_(products, alpha=scale)

    def add_coupled(self, builder: FormBuilder | None) -> set[int]:
        """Products of the samples that were met with all columns at once; returns the places of those built in a form.

        The kernel of a form is −∇z · u, of which the shares are made as well.
        """
        built = set()
        for place, products, pushed in self.received.coupled_products(builder is not None):
            self.add_rows(place, products)
            if builder is None or pushed is None:
                continue
            part = dict(self.received.coupled)[place]
            owners = self.received.stage.owners.part(slice(place, place + len(part)))
            builder.add(self.step, *owners.spread(part.cotangents.double().cpu(), -pushed.cpu()))
            built.add(place)
        return built

    def add_to_accumulator(self) -> None:
        """Put everything where it belongs."""
        accumulator = self.accumulator
        count = len(self.received.owners)
        samples = self.sum[:count]
        self.received.owners.add(self.shares, samples)
        for row, name in enumerate(self.received.names, start=count):
            accumulator.channels[name] += self.sum[row]
        if accumulator.steps is not None:
            accumulator.steps[:, self.step] += samples.sum(dim=0)


def module_of(name: str) -> str:
    """Name of the module that a parameter belongs to."""
    return name.rpartition(".")[0]
