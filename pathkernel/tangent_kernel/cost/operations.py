"""Work of a computation, operation by operation: floating-point operations, bytes and calls, as functions of n."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pathkernel.tangent_kernel.cost.hardware import Machine

BATCHED = ("bmm", "baddbmm")
"""Matrix products of which there is one for each sample, head, or group."""


@dataclass(frozen=True)
class Operation:
    """Cost of one operation.

    Attributes
    ----------
    name
        As the dispatcher calls it.
    flops, bytes
        Floating-point operations; bytes read and written.
    result
        Bytes of what it returns.
    """

    name: str
    flops: float
    bytes: float
    result: float

    def seconds(self, machine: Machine, batched: bool = False) -> float:
        """The slower of arithmetic and memory, and the call itself; ``batched`` for one product for each sample."""
        rate = machine.batched if batched or self.name in BATCHED else machine.products
        return max(self.flops / rate, self.bytes / machine.bandwidth) + machine.call


class Count(TorchDispatchMode):
    """Writes down every operation inside; views cost nothing and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled, and what torch would do about it is import its compiler: more than a second.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and func.namespace == "aten":
            packet = func._overloadpacket
            flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0.0
            read, written = _bytes((args, kwargs)), _bytes(result)
            self.operations.append(Operation(packet.__name__, float(flops), read + written, written))
        return result


class Totals(NamedTuple):
    """Sums over the operations of a computation.

    Attributes
    ----------
    seconds, flops, bytes, result
        As of `Operation`.
    calls
        How many there are.
    """

    seconds: float
    flops: float
    bytes: float
    result: float
    calls: float

    @classmethod
    def of(cls, operations: Sequence[Operation], machine: Machine, batched: bool = False) -> Totals:
        """Sums over some."""
        seconds = sum(o.seconds(machine, batched) for o in operations)
        flops, moved, result = (sum(getattr(o, key) for o in operations) for key in ("flops", "bytes", "result"))
        return cls(seconds, flops, moved, result, len(operations))

    def towards(self, other: Totals, steps: float) -> Totals:
        """So many times as far as another: of what grows by the same amount with each component."""
        return Totals(*(max(0.0, a + steps * (b - a)) for a, b in zip(self, other, strict=True)))


def counted(computation: Callable[[int], Any], few: tuple[int, int] = (2, 4)) -> list[list[Operation]]:
    """The operations of a computation over a few samples, and over a few more."""
    counts = []
    for samples in few:
        with Count() as count:
            computation(samples)
        counts.append(count.operations)
    return counts


def operations_at(n: int, counts: list[list[Operation]], few: tuple[int, int] = (2, 4)) -> list[Operation]:
    """The operations of a computation over n samples, from those `counted`.

    Each is taken to be affine in n: what belongs to the samples grows, what belongs to the parameters does not.
    """
    one, two = counts
    if [o.name for o in one] != [o.name for o in two]:  # the sequence itself depends on n: take all as the samples'
        return [Operation(o.name, o.flops * n / few[1], o.bytes * n / few[1], o.result * n / few[1]) for o in two]
    return [
        Operation(a.name, *(_at(n, few, getattr(a, key), getattr(b, key)) for key in ("flops", "bytes", "result")))
        for a, b in zip(one, two, strict=True)
    ]


def _at(n: int, few: tuple[int, int], first: float, second: float) -> float:
    return max(0.0, first + (second - first) * (n - few[0]) / (few[1] - few[0]))


def _bytes(tree: Any) -> float:
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
