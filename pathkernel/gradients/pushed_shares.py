r"""Inner products of the gradients of a batch's samples with directions, by forward differentiation of the whole batch.

.. math:: \langle J_i^\top \lambda_i, u\rangle = \lambda_i \cdot (J u)_i :

one pass of the batch along u gives the products of *all* its samples, where rows take one reverse sweep for each of
them. It holds for every batch, samples that are coupled (BatchNorm in train mode) among them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jvp, vmap

from pathkernel._typing import Float, Parameters, PyTree
from pathkernel.gradients.forward_state import QUIET_FALLBACKS
from pathkernel.gradients.losses import check_slopes
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import REFUSALS, load_transformations, push_dual
from pathkernel.gradients.pytrees import blocks
from pathkernel.runtime.interrupts import result_or_error


def pushed_outputs(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    directions: Float[Tensor, "D P"],
    width: int,
) -> Float[Tensor, "D n C"] | None:
    """J u for all outputs of a batch, run as it is; None where torch cannot differentiate the network forward.

    Parameters
    ----------
    function, vector, inputs
        The network, θ, and the samples of a batch.
    directions
        u.
    width
        Directions that are pushed at once, by one pass of the network itself. Passes that draw random numbers take one
        after the other: each is to draw the same.
    """
    inputs, point, layout = function.cast(inputs), function.cast(vector), function.layout
    random = bool(function.state.generators)
    load_transformations()

    def drawn(some: Tensor) -> Tensor:
        """Along one direction, where random numbers are drawn."""
        return push_dual(lambda theta: function.batch(layout.unflatten(theta), inputs), point, some[0]).unsqueeze(0)

    def at_once(some: Tensor) -> Tensor:
        # Parameter by parameter, each with its own storage: tangents that are parts of another are copied twice.
        own = {name: value.clone() for name, value in layout.unflatten(point).items()}
        tangents = {name: value.contiguous() for name, value in layout.unflatten(some).items()}

        def along(tangent: Parameters) -> Tensor:
            return jvp(lambda parameters: function.batch(parameters, inputs), (own,), (tangent,))[1]

        if len(some) > 1:
            return vmap(along)(tangents)
        return along({name: value[0] for name, value in tangents.items()}).unsqueeze(0)

    def pushed() -> Tensor:
        found = []
        for piece in blocks(len(directions), 1 if random else width):
            some = directions[piece].to(point)
            with function.evaluating(gradients=False), function.kept(), QUIET_FALLBACKS:
                found.append(drawn(some) if random else at_once(some))
        return torch.cat(found)

    found = result_or_error(pushed, REFUSALS)
    return None if isinstance(found, Exception) else found


def pushed_shares(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    cotangents: Float[Tensor, "n C"],
    directions: Float[Tensor, "D P"],
    width: int,
) -> Float[Tensor, "n D"] | None:
    """λ_i · (J u)_i for all samples of a batch and a few directions, float64; see `pushed_outputs`.

    Raises
    ------
    SampleIdError
        Where λ is of another number of outputs.
    """
    pushed = pushed_outputs(function, vector, inputs, directions, width)
    return None if pushed is None else weighted_outputs(pushed, cotangents)


def weighted_outputs(pushed: Float[Tensor, "D n C"], cotangents: Float[Tensor, "n C"]) -> Float[Tensor, "n D"]:
    """λ_i · (J u)_i of derivatives of all outputs, float64; raises as `pushed_shares`."""
    check_slopes(pushed[0], cotangents)
    return torch.einsum("nc,dnc->nd", cotangents.double(), pushed.double())
