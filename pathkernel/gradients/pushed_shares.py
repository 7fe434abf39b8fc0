r"""Inner products of the gradients of a batch's samples with directions, by forward differentiation of the whole batch.

.. math:: \langle J_i^\top \lambda_i, u\rangle = \lambda_i \cdot (J u)_i :

one pass of the batch along u gives the products of *all* its samples, where rows take one reverse sweep for each of
them. It holds for every batch, samples that are coupled (BatchNorm in train mode) among them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, Int, PyTree
from pathkernel.gradients.forward_state import hashable
from pathkernel.gradients.losses import batch_products, check_slopes
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import ROW_LIMIT, output_products, without_dual_passes
from pathkernel.gradients.pytrees import blocks


def pushed_shares(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    cotangents: Float[Tensor, "n C"],
    directions: Float[Tensor, "D P"],
    width: int,
) -> Float[Tensor, "n D"] | None:
    """λ_i · (J u)_i for all samples of a batch and a few directions, float64; see `output_products`.

    Raises
    ------
    SampleIdError
        Where λ is of another number of outputs.
    """
    pushed = output_products(function, vector, inputs, directions, width=width)
    return None if pushed is None else weighted_outputs(pushed, cotangents)


def weighted_outputs(pushed: Float[Tensor, "D n C"], cotangents: Float[Tensor, "n C"]) -> Float[Tensor, "n D"]:
    """λ_i · (J u)_i of derivatives of all outputs, float64; raises as `pushed_shares`."""
    check_slopes(pushed[0], cotangents)
    return torch.einsum("nc,dnc->nd", cotangents.double(), pushed.double())


def products_together(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    directions: Float[Tensor, "D P"],
    width: int,
    ids: Int[Tensor, " n"],
) -> Float[Tensor, "D n C"]:
    """J u of all outputs of a batch along some directions, float64, up to ``width`` of them in one pass of the network.

    Each size of such a pass is held once against passes of one direction each, along random directions and over
    samples of which none is there twice, as their ``ids`` say. Where they differ, and until they can be compared, every
    direction has a pass of its own; so it has in a network that draws random numbers, or rounds to few bits.
    """
    if width > 1 and not function.state.generators and not function.state.autocast:
        found = []
        for piece in blocks(len(directions), width):
            some = directions[piece]
            right = len(some) == 1 or _right_together(function, vector, inputs, len(some), ids)
            pushed = output_products(function, vector, inputs, some, width=len(some)) if right else None
            if pushed is None:
                break
            found.append(pushed)
        else:
            return torch.cat(found)
    return batch_products(function, vector, inputs, directions)


def _right_together(function: ModelFunction, vector: Tensor, inputs: PyTree, directions: int, ids: Tensor) -> bool:
    """True where so many directions in one pass were seen to give what each of them does in a pass of its own."""
    shapes = ((leaf.shape, leaf.dtype) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    key = ("together", function.submodule, function.layout.names, hashable(function.state.modes), directions, *shapes)
    if key not in function.row_routes:
        if len(ids.unique()) < len(ids):
            return False
        # In the network's own type: that much memory is planned for.
        drawn = torch.Generator().manual_seed(0)
        v = torch.randn(directions, function.layout.size, dtype=function.dtype, generator=drawn).to(function.device)
        together = output_products(function, vector, inputs, v, width=directions)
        right = False
        if together is not None:
            # Handed over one by one: of a small batch, all that are handed over share a pass.
            each = torch.cat([batch_products(function, vector, inputs, one) for one in v.split(1)])
            right = bool((together - each).abs().max() <= ROW_LIMIT.get(function.dtype, 0.0) * each.abs().max())
            if not right and without_dual_passes(function):
                return _right_together(function, vector, inputs, directions, ids)
        function.row_routes[key] = "together" if right else "one by one"
    return function.row_routes[key] == "together"
