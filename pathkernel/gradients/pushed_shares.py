r"""Inner products of the gradients of a batch's samples with directions, by forward differentiation of the whole batch.

.. math:: \langle J_i^\top \lambda_i, u\rangle = \lambda_i \cdot (J u)_i :

one pass of the batch along u gives the products of *all* its samples, where rows take one reverse sweep for each of
them. It holds for every batch, samples that are coupled (BatchNorm in train mode) among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.losses import check_slopes
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import output_products


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
