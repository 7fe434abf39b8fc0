"""Floating types of few bits in which a network computes by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pathkernel._typing import PyTree
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.runtime.interrupts import result_or_error

LOW = frozenset({torch.bfloat16, torch.float16})


def low_types(function: ModelFunction, theta: Tensor, inputs: PyTree) -> frozenset[torch.dtype]:
    """Types of few bits among what the operations of a pass return, as where ``forward`` enters autocast.

    Parameters
    ----------
    function
        The network, in the floating type of its parameters.
    theta
        These.
    inputs
        A batch.

    Returns
    -------
    frozenset
        Empty for networks whose parameters have few bits themselves, and for passes that fail.
    """
    if function.dtype in LOW:
        return frozenset()
    seen = _SeenTypes()

    def passed() -> None:
        with function.evaluating(gradients=False), seen:
            function.batch(function.parameters(theta), function.cast(inputs))

    ran = result_or_error(passed, (Exception,))
    return frozenset() if isinstance(ran, Exception) else frozenset(seen.types & LOW)


class _SeenTypes(TorchDispatchMode):
    """Floating types of what operations return inside."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.types |= {leaf.dtype for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)}
        return found
