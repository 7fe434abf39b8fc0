"""Selection of the outputs and samples that are explained: queries as asked for, made into functions of θ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.gradient_source import GradientSource
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import OutputFunctional
from pathkernel.gradients.pytrees import count, take
from pathkernel.gradients.sample_wise import check_sample_wise
from pathkernel.kernel_machine.classification import is_classifier
from pathkernel.kernel_machine.forward_plan import AT_ONCE, outputs_at_once
from pathkernel.kernel_machine.queries import Queries, one_hot_context
from pathkernel.tangent_kernel.outputs import select_outputs
from pathkernel.tangent_kernel.tangent_kernel import learn_structure, no_samples, split_samples
from pathkernel.trajectory.trajectory import Trajectory

OF_TARGETS = ("loss", "margin")
"""Functions of outputs and target, for which samples are pairs."""


class QuerySelection:
    """Makes queries of samples and of what is asked of them.

    Parameters
    ----------
    trajectory, function
        The record, and the network in the floating type of the arithmetic.
    average
        Name of the average that is explained; None for the network itself.
    engine, memory
        How gradients are taken, and the budget for what is held.

    Attributes
    ----------
    sources
        Where the gradients of queries came from so far, for each submodule that was asked about.
    """

    def __init__(
        self, trajectory: Trajectory, function: ModelFunction, average: str | None, engine: str, memory: int
    ) -> None:
        self.trajectory = trajectory
        self.function = function
        self.average = average
        self.engine = engine
        self.memory = memory
        self.sources: dict[str | None, GradientSource] = {}
        self._at_once: dict[Any, int] = {}

    def select(self, X: PyTree, outputs: Any) -> tuple[Queries, np.ndarray, np.ndarray]:
        """The query functions, and which sample and output each of them is."""
        if isinstance(outputs, str) and outputs in OF_TARGETS:
            objective = self.trajectory.objective
            loss = objective.function('`outputs="loss"`') if outputs == "loss" else None
            selection = select_outputs(outputs, loss, objective.reduction)
            inputs, targets = split_samples(X, selection, self.trajectory.data.dtype, "KernelMachine")
            inputs = self._samples(inputs, self.function)
            learn_structure(selection, self.function, self.trajectory.initial, inputs, targets)
            queries = self._query(self.function, inputs, selection.function, targets, None)
            return queries, np.arange(len(queries)), np.full(len(queries), -1)
        function, outputs = self._tapped(outputs)
        inputs = self._samples(X, function)
        n = count(inputs)
        if callable(outputs):
            queries = self._query(function, inputs, lambda z, _: outputs(z).reshape(()), torch.zeros(n, 0), None)
            return queries, np.arange(n), np.full(n, -1)
        if (isinstance(outputs, str) and outputs == "all") or (outputs is None and not is_classifier(self.trajectory)):
            everything = self._all_outputs(inputs, function)
            c = everything.components
            return everything, np.repeat(np.arange(n), c), np.tile(np.arange(c), n)
        chosen, c = self._chosen(function, inputs, outputs)
        context = one_hot_context(chosen, c)
        queries = self._query(function, inputs, lambda z, weight: z @ weight.to(z), context, None)
        return queries, np.arange(n), chosen.numpy()

    def _chosen(self, function: ModelFunction, inputs: PyTree, outputs: Any) -> tuple[Tensor, int]:
        """Index of the output to explain for each sample, and C."""
        if outputs is None:
            found = self._outputs(inputs, function)
            return found.argmax(dim=1).cpu(), found.shape[1]
        n, c = count(inputs), self._number_of_outputs(inputs, function)
        try:
            chosen = torch.as_tensor(outputs).cpu()
        except (TypeError, ValueError, RuntimeError):
            chosen = torch.zeros(())
        fits = not chosen.is_floating_point() and chosen.dtype != torch.bool and chosen.shape in ((), (n,))
        if not (fits and ((chosen >= -c) & (chosen < c)).all()):
            raise InputError(
                f"`outputs={outputs!r}` was given for {n} samples of a network with {c} outputs",
                'It must be None, an output index, one index for each sample, "all", "loss", "margin", or a callable '
                "of the outputs",
                "Write for example `machine.explain(X, outputs=0)`",
            )
        return chosen.expand(n).remainder(c), c

    def _tapped(self, outputs: Any) -> tuple[ModelFunction, Any]:
        """The network, or one of its modules in place of it, and what is asked of its output."""
        if isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[0], str):
            name, outputs = outputs
        elif isinstance(outputs, str) and outputs != "all":
            name, outputs = outputs, "all"
        else:
            return self.function, outputs
        modules = [module for module, _ in self.trajectory.model.named_modules() if module]
        if name not in modules:
            raise InputError(
                f"`outputs` names the module {name!r}",
                f"The network's modules are {', '.join(map(repr, modules[:20]))}{' …' if len(modules) > 20 else ''}",
                'Write for example `machine.explain(X, outputs=("0", 3))` for unit 3 of module "0"',
            )
        return self.function.with_(submodule=name), outputs

    def every_output(self, X: PyTree) -> Queries:
        """Queries for all outputs of all samples."""
        return self._all_outputs(self._samples(X, self.function), self.function)

    def _all_outputs(self, inputs: PyTree, function: ModelFunction) -> Queries:
        c = self._number_of_outputs(inputs, function)
        return self._query(function, inputs, lambda z, _: z, torch.zeros(count(inputs), 0), c)

    def _number_of_outputs(self, inputs: PyTree, function: ModelFunction) -> int:
        return self._outputs(take(inputs, slice(0, 1)), function, at_once=1).shape[1]

    def _query(
        self, function: ModelFunction, inputs: PyTree, functional: OutputFunctional, context: PyTree, k: int | None
    ) -> Queries:
        queries = Queries(self._source(function), inputs, functional, context, k)
        at_once = self._outputs_at_once(function, inputs)
        queries.forward = at_once if at_once < AT_ONCE else None
        return queries

    def _source(self, function: ModelFunction) -> GradientSource:
        """Source of gradients of the network or of one of its modules; proofs are kept."""
        if function.submodule not in self.sources:
            self.sources[function.submodule] = GradientSource(function, self.engine, self.memory // 4)
        return self.sources[function.submodule]

    def _outputs_at_once(self, function: ModelFunction, inputs: PyTree) -> int:
        """Samples that go through the network at once, which takes passes to measure; asked for once."""
        key = (function.submodule, *shapes_of(inputs))
        if key not in self._at_once:
            self._at_once[key] = outputs_at_once(function, self.trajectory.final, inputs, self.memory)
        return self._at_once[key]

    def _outputs(self, inputs: PyTree, function: ModelFunction, at_once: int | None = None) -> Tensor:
        """The explained network's own outputs, (n, C)."""
        trajectory = self.trajectory
        at_once = at_once or self._outputs_at_once(function, inputs)
        if self.average is None:
            function, theta = function.with_(constants=trajectory.final_buffers), trajectory.final
        else:
            record = trajectory.averages[self.average]
            function = function.with_(constants=record.constants(trajectory.constants))
            theta = trajectory.layout.flatten(record.last)
        return function.outputs(theta, inputs, at_once)

    def _samples(self, X: PyTree, function: ModelFunction) -> PyTree:
        inputs = self.trajectory.queries(X, "KernelMachine")
        if not count(inputs):
            raise no_samples("KernelMachine")
        check_sample_wise(function, self.trajectory.initial, inputs)
        return inputs


def shapes_of(inputs: PyTree) -> tuple[Any, ...]:
    """Shapes and types on which the memory of a pass depends."""
    return tuple((leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
