"""The contract of an engine: a way to compute tangent kernels at one θ."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import moved, take
from pathkernel.runtime.workspace import Workspace
from pathkernel.tangent_kernel.engines.jacobian_products import JacobianProducts, PlainJacobianProducts
from pathkernel.tangent_kernel.outputs import OutputSelection

Diagonal = Tensor | None
"""d of the preconditioner diag(d), (P,), or None for the identity."""

Samples = tuple[PyTree, PyTree]
"""Inputs, and what h needs of each of them."""


@runtime_checkable
class Node(Protocol):
    """A point of a path, as far as engines differ from point to point."""

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Running statistics, as far as they have changed in training."""

    @property
    def number(self) -> int:
        """Number that differs between nodes, for what is drawn at random."""


class Engine(ABC):
    r"""Contraction of per-sample gradients at one θ; `gram` and `diagonal` are all that an engine has to write.

    .. math:: K(x, x') = \langle M \nabla h(x), \nabla h(x') \rangle,\qquad M = \mathrm{diag}(d) \succeq 0

    Passes run inside ``with self.function.evaluating(gradients=True):``, which puts the network in evaluation mode.
    What somebody else's engine returns is compared with plain autograd, a few entries for each way to a result, before
    it is used; see `pathkernel.tangent_kernel.engines.proved`.

    Parameters
    ----------
    function
        The network. In bfloat16 only the factors of matrix products between gradients are rounded to it: passes
        through the network are float32 then.
    selection
        h, and how its components are combined.
    memory
        Bytes that the engine may hold at once, beside inputs and result.
    tensor_floats
        Whether it rounds the factors of matrix products between gradients to TensorFloat-32.
    """

    name: ClassVar[str]

    exact: ClassVar[bool] = True
    """True where matrices are the kernel's to rounding; False frees an engine that approximates from the proof."""

    workspace: Workspace | None = None
    """Memory for results, if an engine keeps any."""

    def __init__(
        self, function: ModelFunction, selection: OutputSelection, memory: int, tensor_floats: bool = False
    ) -> None:
        if function.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise InputError(
                f"`dtype={function.dtype}` was given",
                "Kernels are computed in float64, in float32, or in float32 with matrix products of bfloat16 factors",
                "Write `dtype=torch.float32`",
            )
        self.products, self.selection, self.memory = function.dtype, selection, memory
        self.tensor_floats = tensor_floats
        self.choices: dict[tuple[int, int | None], str] = {}
        # Gradients rounded to 8 bits on their way back would be of no use; their inner products average errors out.
        self.function = function.converted(torch.float32) if function.dtype == torch.bfloat16 else function

    @abstractmethod
    def gram(
        self, theta: Tensor, X: PyTree, Y: PyTree | None, context_X: PyTree, context_Y: PyTree, preconditioner: Diagonal
    ) -> Tensor:
        """K(X, Y) at θ, float64, (n, m) or (n, m, K, K); exactly symmetric for Y None.

        ``preconditioner`` is d, (P,), or None for the identity; ``context`` is what h needs of each sample.
        """

    @abstractmethod
    def diagonal(self, theta: Tensor, X: PyTree, context: PyTree, preconditioner: Diagonal) -> Tensor:
        """K(x, x) for every sample, float64, (n,) or (n, K, K)."""

    def jacobian(self, theta: Tensor, samples: Samples, memory: int) -> JacobianProducts:
        """J of h at θ for some samples, as two linear maps; by default with a pass of the batch for each vector.

        ``memory`` is how many bytes may be kept from one product to the next.
        """
        return PlainJacobianProducts(self.function, self.selection, theta, *samples)

    def at(self, node: Node, selection: OutputSelection | None = None) -> Engine:
        """Engine at a node of a path: with the running statistics there, or with other outputs."""
        if not node.buffers and selection is None:
            return self
        engine = copy.copy(self)
        if node.buffers:
            engine.function = self.function.with_(constants=node.buffers)
        if selection is not None:
            engine.selection = selection
        return engine

    def describe(self) -> list[str]:
        """Lines on how the gradients of parameters were taken so far; by default there is nothing to say."""
        return []

    def fix_choices(
        self,
        theta: Tensor,
        samples: Samples,
        sizes: Iterable[tuple[int, int | None]],
        fixed: Mapping[str, str],
    ) -> dict[str, str]:
        """Fix, once and for all, what depends on the machine in how matrices of some sizes are computed.

        Choices follow the measured speed of the machine, and ways differ by rounding: a computation that goes on
        another time has to keep to them. By default there is nothing to choose.

        Parameters
        ----------
        theta, samples
            θ, and samples like those of the matrices.
        sizes
            (n, m), or (n, None) for a symmetric matrix.
        fixed
            The result of another time.

        Returns
        -------
        dict
            Choices by names that a file can hold.
        """
        return {}


def check_budget(needed: float, memory: int, of: str) -> None:
    """Refuse a budget that does not hold the least that a computation can do with, before it begins.

    Raises
    ------
    InputError
        With both sizes.
    """
    if needed > memory:
        raise InputError(
            f"One sample takes {needed / 1e6:.3g} MB ({of}), and the budget is {memory / 1e6:.3g} MB",
            "A budget has to hold at least one sample; it is kept, not exceeded in silence",
            f'Write `memory="{max(1, round(4 * needed / 1e6))}MB"` or more',
        )


def number_of_components(engine: Engine, theta: Tensor, X: PyTree, context: PyTree) -> int:
    """K, the numbers that h has of one sample."""
    z = engine.function.outputs(theta, take(X, slice(0, 1)))[0]
    return engine.selection.function(z, moved(take(context, 0), z.device)).numel()
