"""`ReferenceOutputs`: what a recorded network made of a few training samples, by which it is known again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from pathkernel._typing import PyTree
from pathkernel.errors import ModelMismatchError
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.runtime.checksum import DTYPES, condensed
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.trajectory.samples import Samples

T = TypeVar("T")
Point = tuple[ModelFunction, Tensor]
"""A network and a θ."""
SAMPLES = 3
NUMBERS = 32
"""Outputs of a sample that are kept; of more outputs, as many weighted sums."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Difference between two evaluations of one network, relative to its largest output, that is still rounding: on another
machine, with another number of threads, in another version of torch."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of a few training samples at θ_0 and θ_S, in evaluation mode.

    Parameters, buffers and types of submodules do not say what ``forward`` makes of them; these numbers do.

    Attributes
    ----------
    samples
        Ids of the samples.
    inputs
        What the network was given for them.
    initial
        (n, K) float64, at θ_0.
    final
        (n, K) float64, at θ_S; None while recording, and where it was cut off.
    varying
        Whether the data give other inputs at every look (random augmentation), so that a store has to keep them.
    """

    samples: tuple[int, ...]
    inputs: PyTree
    initial: Tensor
    final: Tensor | None = None
    varying: bool = False

    @classmethod
    def of(cls, data: Samples, function: ModelFunction, initial: Tensor) -> ReferenceOutputs | None:
        """The outputs of a network at θ_0, where a recording begins.

        None for a network that cannot be run on the samples as they stand in the data (the loop transforms them), or
        that gives other outputs every time: its outputs say nothing.
        """
        samples = tuple(sorted({0, len(data) // 2, len(data) - 1}))[:SAMPLES]
        inputs = _unless_it_fails(lambda: [data[torch.tensor(samples)][0] for _ in range(2)])
        if inputs is None:
            return None
        looks = _unless_it_fails(lambda: [_outputs(function, initial, inputs[0]) for _ in range(2)])
        varying = isinstance(data.dataset, Dataset) and not _same(*inputs)
        if looks is None or not torch.equal(*looks) or (varying and not _storable(inputs[0])):
            return None
        return cls(samples, inputs[0], looks[0], None, varying)

    def at(self, function: ModelFunction, theta: Tensor) -> Tensor | None:
        """Outputs (n, K) of the same samples at another θ, such as θ_S; None where the network fails there."""
        return _unless_it_fails(lambda: _outputs(function, theta, self.inputs))

    def check(self, asker: str, initial: Point | None, final: Point | None) -> None:
        """Compare with what the network makes of the samples now.

        Parameters
        ----------
        asker
            Who wants to know.
        initial, final
            The network with its buffers, and θ, at either end; None for an end that is not looked at.

        Raises
        ------
        ModelMismatchError
            With the sample and the output that differ most.
        """
        problems = []
        if initial is not None:
            problems += self._differences("the start", self.initial, *initial)
        if final is not None and self.final is not None:
            problems += self._differences("the end", self.final, *final)
        if problems:
            raise ModelMismatchError(
                f"`{asker}` found a network that has the recorded parameters and other outputs: {'; '.join(problems)}",
                "What `forward` depends on besides parameters and buffers must be what it was while recording, so that "
                "nobody explains one network with another one's history",
                "Put back what was changed since: attributes that `forward` reads, layers without parameters, its code",
            )

    def _differences(self, where: str, recorded: Tensor, function: ModelFunction, theta: Tensor) -> list[str]:
        tolerance = ROUNDING.get(function.dtype, max(ROUNDING.values()))
        with generators_untouched():
            found = result_or_error(lambda: _outputs(function, theta, self.inputs), (Exception,))
            if isinstance(found, Exception):
                return [f"at {where} of the recording it fails on training sample {self.samples[0]} ({found})"]
            if found.shape != recorded.shape:
                return [f"at {where} of the recording it has {found.shape[1]} outputs, not {recorded.shape[1]}"]
            excess = (found - recorded).abs() - tolerance * self._scale
            if excess.max() > 0:
                # Outputs that all but cancel (two equal branches, one subtracted from the other) move by more than
                # their own rounding: as much as they do when every parameter is rounded.
                signs = torch.cos(torch.arange(theta.numel(), dtype=torch.float64, device=theta.device))
                nearby = (theta * (1 + tolerance * signs)).to(theta.dtype)
                excess -= (_outputs(function, nearby, self.inputs) - found).abs().amax(dim=0)
        if excess.max() <= 0:
            return []
        sample, output = divmod(int(excess.argmax()), excess.shape[1])
        which = f"output {output}" if excess.shape[1] < NUMBERS else f"a sum of outputs (number {output})"
        return [
            f"at {where} of the recording {which} of training sample {self.samples[sample]} is "
            f"{found[sample, output].item():.6g}, not {recorded[sample, output].item():.6g}"
        ]

    @property
    def _scale(self) -> Tensor:
        """The largest value of each output, (K,)."""
        return torch.cat([self.initial] if self.final is None else [self.initial, self.final]).abs().amax(dim=0)


def _unless_it_fails(look: Callable[[], T]) -> T | None:
    """The result of a look at data or network; None where these fail, which is no fault of the recording's."""
    with generators_untouched():
        try:
            found = result_or_error(look, (Exception,))
        except (MemoryError, RuntimeError):  # samples that the loop would have cut smaller may fill the memory
            return None
    return None if isinstance(found, Exception) else found


def _outputs(function: ModelFunction, theta: Tensor, inputs: PyTree) -> Tensor:
    """Outputs (n, K) at θ; a network that writes on its buffers in evaluation mode writes on copies."""
    buffers = {name for name, _ in function.module.named_buffers()}
    copies = {name: value.clone() for name, value in function.constants.items() if name in buffers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the network has to say, it says in the loop
        outputs = function.with_(constants=copies).outputs(theta, inputs)
    rows = (torch.nan_to_num(row[None].double(), 0.0, 0.0, 0.0).cpu() for row in outputs)  # in turn: they may be large
    return torch.cat([condensed(row, NUMBERS) for row in rows])


def _same(one: PyTree, other: PyTree) -> bool:
    leaves: Sequence[list[Tensor]] = [pytree.tree_leaves(tree) for tree in (one, other)]
    return len(leaves[0]) == len(leaves[1]) and all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))


def _storable(inputs: PyTree) -> bool:
    return all(
        leaf.layout == torch.strided and str(leaf.dtype).removeprefix("torch.") in DTYPES
        for leaf in pytree.tree_leaves(inputs)
    )
