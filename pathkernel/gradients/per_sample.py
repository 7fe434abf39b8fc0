"""Per-sample gradients of a network by `torch.func` or a loop of autograd, and derivatives along directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, Parameters, PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.dual_pass import dual_outputs
from pathkernel.gradients.forward_derivatives import (
    REFUSALS,
    gradients_stopped,
    load_transformations,
    push_by_reversing,
    push_dual,
    push_forward,
)
from pathkernel.gradients.forward_state import QUIET_FALLBACKS, hashable
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import cast_floating, count, moved, take
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.runtime.workspace import MEASURED

OutputFunctional = Callable[[Tensor, Any], Tensor]
"""h(z, context) of one sample's outputs z (C,): a scalar, or a vector (K,)."""


def values_of(functional: OutputFunctional, outputs: Tensor, context: PyTree) -> Tensor:
    """h of n samples, (n, K), from their outputs (n, C).

    Raises
    ------
    InputError
        When the outputs require gradients and h has none.
    """
    context = moved(context, outputs.device)
    found = result_or_error(lambda: vmap(functional)(outputs, context), REFUSALS)
    if isinstance(found, Exception):  # it asks for a number, as `z[z.argmax().item()]` does
        found = torch.stack([functional(outputs[i], take(context, i)) for i in range(len(outputs))])
    if outputs.requires_grad and not found.requires_grad:
        raise InputError(
            "`outputs=` is a function without a gradient in the network's outputs",
            "Kernels and shares are made of its gradients: `argmax`, comparisons and `detach()` have none",
            "Write a differentiable function of one sample's outputs, such as `lambda z: z[0] - z[1]`",
        )
    return found.reshape(len(outputs), -1)


def slopes_of(functional: OutputFunctional, outputs: Tensor, context: PyTree) -> Float[Tensor, "n K C"]:
    """∂h/∂z of n samples at their outputs (n, C)."""
    with torch.enable_grad():
        z = outputs.detach().requires_grad_(True)
        h = values_of(functional, z, context)
        rows = [torch.autograd.grad(h[:, k].sum(), z, retain_graph=True)[0] for k in range(h.shape[1])]
    return torch.stack(rows, dim=1)


def sample_gradients(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    functional: OutputFunctional,
    context: PyTree,
    *,
    scalar: bool,
    route: str | None = None,
) -> dict[str, Tensor]:
    r"""Gradients of h(f(θ, x_i), context_i) in θ, sample by sample.

    Parameters
    ----------
    function
        The network.
    vector
        θ, (P,).
    inputs, context
        Samples and what h needs of each of them, (n, ...) leaves.
    functional
        h, see `OutputFunctional`.
    scalar
        Whether h is a scalar (one reverse sweep a sample) or a vector (K sweeps a sample).
    route
        ``"vmap"``: all samples at once by `torch.func`; ``"autograd"``: a loop of plain autograd over samples, slow,
        which covers whatever torch.func refuses; None: the first, where its rows are seen to be right.

    Returns
    -------
    dict of str to Tensor
        By parameter name, (n, *shape) for a scalar h, (n, K, *shape) otherwise, in the function's floating type.
        Memory is n·K·P numbers, and the caller chooses n.

    Notes
    -----
    With None, rows are compared with the network run forward once for each new number and shape of samples,
    :math:`\langle row_{ik}, v\rangle = \partial h_{ik}/\partial z_i \cdot (J v)_i` for a random v: `vmap` has been
    seen to be wrong (of PReLU, for as many samples as outputs).
    """
    inputs, context = function.cast(inputs), moved(context, function.device)
    arguments = vector, inputs, functional, context, scalar
    key = _route_key(function, inputs, functional, context, scalar)
    if route is None and function.row_routes.get(key) != "autograd":
        rows = result_or_error(lambda: _gradients_at_once(function, *arguments), REFUSALS)
        if not isinstance(rows, Exception):
            # Whether `vmap` is right may depend on the number of components, which is known only now.
            proved = (*key, 1 if scalar else next(iter(rows.values())).shape[1])
            if proved in function.row_routes or _are_own_rows(function, rows, *arguments):
                function.row_routes[proved] = "vmap"
                return rows
    elif route == "vmap":
        return _gradients_at_once(function, *arguments)
    function.row_routes[key] = "autograd"
    return _gradients_in_turn(function, *arguments)


def _route_key(
    function: ModelFunction, inputs: PyTree, functional: OutputFunctional, context: PyTree, scalar: bool
) -> tuple[Any, ...]:
    leaves = [leaf for leaf in pytree.tree_leaves((inputs, context)) if isinstance(leaf, Tensor)]
    shapes = ((leaf.shape, leaf.dtype) for leaf in leaves)
    return (function.layout.names, function.submodule, scalar, _known_again(functional), *shapes)


def _known_again(functional: Any) -> Any:
    """Identity of a function as far as its code and the functions that it closes over say; equal for equal ones."""
    code = getattr(functional, "__code__", None)
    if code is None:
        return functional if isinstance(functional, Hashable) else object()
    cells = (cell.cell_contents for cell in functional.__closure__ or ())
    return (code, *(_known_again(held) for held in cells if callable(held)))


def _gradients_at_once(
    function: ModelFunction, vector: Tensor, inputs: PyTree, functional: OutputFunctional, context: PyTree, scalar: bool
) -> dict[str, Tensor]:
    def h(parameters: Parameters, sample: PyTree, sample_context: PyTree) -> Tensor:
        return functional(function.single(parameters, sample), sample_context)

    differentiate = grad(h) if scalar else jacrev(h)
    parameters = function.parameters(vector)
    if function.recurrent:  # its cells add to the hidden state in place, which vmap allows only with θ batched as well
        n = count(inputs)
        parameters = {name: value.expand(n, *value.shape) for name, value in parameters.items()}
    with function.evaluating(), QUIET_FALLBACKS:
        rows = vmap(differentiate, in_dims=(0 if function.recurrent else None, 0, 0))(parameters, inputs, context)
    return {name: gradient.detach() for name, gradient in rows.items()}


def _gradients_in_turn(
    function: ModelFunction, vector: Tensor, inputs: PyTree, functional: OutputFunctional, context: PyTree, scalar: bool
) -> dict[str, Tensor]:
    rows = []
    with function.evaluating(gradients=True), function.kept():
        for i in range(count(inputs)):
            leaves = leaf_parameters(function, vector)
            z = function.batch(leaves, take(inputs, slice(i, i + 1)))
            h = values_of(functional, z, take(context, slice(i, i + 1)))[0]
            units = torch.eye(len(h), dtype=h.dtype, device=h.device)
            rows.append([pulled_back(leaves, h, unit, retain=k + 1 < len(h)) for k, unit in enumerate(units)])
    stacked = {name: torch.stack([torch.stack([g[name] for g in own]) for own in rows]) for name in leaves}
    return {name: value[:, 0] for name, value in stacked.items()} if scalar else stacked


def leaf_parameters(function: ModelFunction, vector: Float[Tensor, " P"]) -> dict[str, Tensor]:
    """θ as leaves of autograd's graph, by name."""
    return {name: value.detach().requires_grad_(True) for name, value in function.parameters(vector).items()}


def pulled_back(leaves: Parameters, outputs: Tensor, cotangent: Tensor, *, retain: bool) -> dict[str, Tensor]:
    """Jᵀ λ of a pass from the given leaves, by name; zeros for parameters that it does not use.

    By ``backward``, which checkpoints allow where they refuse `torch.autograd.grad`.
    """
    for leaf in leaves.values():
        leaf.grad = None
    if outputs.requires_grad:
        outputs.backward(cotangent, retain_graph=retain)
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


ROW_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Difference between ⟨row_i, v⟩ and λ_i · (J v)_i, relative to the largest, up to which a row belongs to its sample."""


def random_directions(size: int, count: int, seed: int = 0) -> Float[Tensor, "count P"]:
    """Directions in the space of θ, float64."""
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_signs(size: int, seed: int) -> Float[Tensor, "1 P"]:
    """A direction of entries 1 and -1, float64: normal numbers of a large network take longer than its passes."""
    drawn = np.frombuffer(np.random.default_rng(seed).bytes(-(-size // 8)), dtype=np.uint8)
    return torch.from_numpy(1.0 - 2.0 * np.unpackbits(drawn, count=size)).unsqueeze(0)


def _are_own_rows(
    function: ModelFunction,
    rows: Mapping[str, Tensor],
    vector: Tensor,
    inputs: PyTree,
    functional: OutputFunctional,
    context: PyTree,
    scalar: bool,
) -> bool:
    """Test that rows are their samples' own, by one pass forward; in float64 where rounding might have a say."""
    v = random_directions(function.layout.size, 1)
    error = _error_of_gradients(function, rows, v, vector, inputs, functional, context, scalar)
    if error <= ROW_LIMIT.get(function.dtype, 0.0) and not function.state.autocast:
        return True
    if error == math.inf:
        return False
    exact = function.converted(torch.float64).with_(state=dataclasses.replace(function.state, autocast=None))
    arguments = vector.double(), cast_floating(inputs, torch.float64), functional, cast_floating(context, torch.float64)
    again = result_or_error(lambda: _gradients_at_once(exact, *arguments, scalar), REFUSALS)
    if isinstance(again, Exception):
        return False
    return _error_of_gradients(exact, again, v, *arguments, scalar) <= ROW_LIMIT[torch.float64]


def _error_of_gradients(
    function: ModelFunction,
    rows: Mapping[str, Tensor],
    v: Tensor,
    vector: Tensor,
    inputs: PyTree,
    functional: OutputFunctional,
    context: PyTree,
    scalar: bool,
) -> float:
    with function.evaluating(gradients=False):
        weights = slopes_of(functional, function.batch(function.parameters(vector), inputs), context)
    flat = function.layout.flatten(rows)
    found = flat.reshape(len(flat), -1, flat.shape[-1]) @ v.T.to(flat)
    return error_of_rows(function, vector, inputs, v, found, weights)


SMALL_BATCH = 2**15
"""Numbers in the inputs of a batch, times directions, up to which derivatives along all directions are taken at once:
the time of small networks is that of calls, and large ones would take as many times the memory. Chosen, not
measured."""


def output_products(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    directions: Float[Tensor, "D P"],
    push: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor] | None = None,
    width: int = 0,
) -> Float[Tensor, "D n C"] | None:
    """∇z·v for all outputs of a batch, run as it is, and a few directions, float64; None where torch has no way.

    ``push`` is `push_forward` by default. ``width`` directions take one pass of the network; by default all of them in
    small batches, and one in others. Passes that draw random numbers take one: each is to draw the same.

    Who gives a width proves the result: it may be of a `pathkernel.gradients.dual_pass`, until `without_dual_passes`.
    """
    inputs, point, layout = function.cast(inputs), function.cast(vector), function.layout

    def outputs(theta: Tensor) -> Tensor:
        return function.batch(layout.unflatten(theta), inputs)

    along = directions.to(point)
    pushed = push or push_forward
    if pushed is push_forward and function.state.generators:
        pushed = push_dual
    load_transformations()

    def at_once(some: Tensor) -> Tensor:
        if width and (pushed := _by_dual_pass(function, point, inputs, some)) is not None:
            return pushed
        # Parameter by parameter, each with its own storage: tangents that are parts of another are copied twice.
        own = {name: value.clone() for name, value in layout.unflatten(point).items()}
        tangents = {name: value.contiguous() for name, value in layout.unflatten(some).items()}

        def one(tangent: Parameters) -> Tensor:
            return jvp(lambda parameters: function.batch(parameters, inputs), (own,), (tangent,))[1]

        with function.evaluating(gradients=False), function.kept(), QUIET_FALLBACKS, gradients_stopped():
            if len(some) == 1:
                return one({name: value[0] for name, value in tangents.items()}).unsqueeze(0).double()
            return vmap(one)(tangents).double()

    def one_by_one() -> Tensor:
        found = []
        # Random layers draw the same numbers every time; without any, all directions share one setting up.
        for some in along.split(1 if function.state.generators else len(along)):
            with function.evaluating(gradients=False), function.kept():
                for direction in some:
                    found.append(pushed(outputs, point, direction).double())
        return torch.stack(found)

    together = ("directions", function.submodule, function.layout.names)
    small = sum(leaf.numel() for leaf in pytree.tree_leaves(inputs)) * len(along) <= SMALL_BATCH
    several = len(along) > 1 and small and push in (None, push_forward) and together not in function.row_routes
    found: Tensor | Exception
    if (width or several) and not function.state.generators:
        pieces = along.split(width or len(along))
        found = result_or_error(lambda: torch.cat([at_once(some) for some in pieces]), REFUSALS)
        if width or not isinstance(found, Exception):
            return None if isinstance(found, Exception) else found
        function.row_routes[together] = "one by one"
    found = result_or_error(one_by_one, REFUSALS)
    return None if isinstance(found, Exception) else found


def _by_dual_pass(function: ModelFunction, point: Tensor, inputs: PyTree, directions: Tensor) -> Tensor | None:
    """J u along some directions, float64, by one `pathkernel.gradients.dual_pass`; None where there is none."""
    key = _dual_key(function)
    # What it saves is room in a processor's cache. Memory is planned for the other way, which takes more.
    if function.device.type != "cpu" or MEASURED.get() or function.row_routes.get(key) == "none":
        return None
    unflatten = function.layout.unflatten

    def pushed() -> Tensor:
        run = lambda parameters: function.batch(parameters, inputs)  # noqa: E731
        return torch.stack(dual_outputs(run, unflatten(point), [unflatten(one) for one in directions])).double()

    with function.evaluating(gradients=False), function.kept():
        found = result_or_error(pushed, (Exception,))  # it need not be one of torch's
    function.row_routes[key] = "none" if isinstance(found, Exception) else "dual"
    return None if isinstance(found, Exception) else found


def without_dual_passes(function: ModelFunction) -> bool:
    """Take no dual passes of a network any more, as one was wrong; False where none was taken."""
    taken = function.row_routes.get(key := _dual_key(function)) == "dual"
    function.row_routes[key] = "none"
    return taken


def _dual_key(function: ModelFunction) -> tuple[Any, ...]:
    return ("dual pass", function.submodule, function.layout.names, hashable(function.state.modes))


def error_of_rows(
    function: ModelFunction,
    vector: Float[Tensor, " P"],
    inputs: PyTree,
    directions: Float[Tensor, "D P"],
    found: Float[Tensor, "n K D"],
    weights: Float[Tensor, "n K C"],
) -> float:
    r"""Largest difference of rows from what belongs to their samples.

    .. math:: \max_{i,k,d} \lvert \langle row_{ik}, v_d\rangle - \lambda_{ik} \cdot (J v_d)_i \rvert
              \,/\, \max_{i,k,d} \lvert \lambda_{ik} \cdot (J v_d)_i \rvert ,

    with J v of the batch as it ran; infinite where torch has no way to J v.

    Parameters
    ----------
    function, vector, inputs
        The network, θ, and n samples.
    directions
        v.
    found
        ⟨row, v⟩.
    weights
        λ: the row of component k of sample i is :math:`J_i^\top \lambda_{ik}`.

    Notes
    -----
    J v by forward differentiation. Where that says something else than the rows, by two reverse sweeps of the batch:
    autograd's gradient need not be the derivative (it leaves out the row of an embedding's ``padding_idx``).
    """
    error, limit = math.inf, ROW_LIMIT.get(function.dtype, 0.0)
    for push in (push_forward, push_by_reversing):
        pushed = output_products(function, vector, inputs, directions, push)
        if pushed is not None:
            expected = torch.einsum("nkc,dnc->nkd", weights.to(pushed), pushed)
            difference, scale = (found.to(pushed) - expected).abs().max().item(), expected.abs().max().item()
            if math.isfinite(difference) and math.isfinite(scale):
                error = min(error, difference / scale if scale > 0 else difference)
        if error <= limit:
            break
    return error


def gradients_along(
    function: ModelFunction,
    start: Float[Tensor, " P"],
    displacement: Float[Tensor, " P"],
    times: Float[Tensor, " n"],
    inputs: PyTree,
    functional: OutputFunctional,
    context: PyTree,
) -> tuple[Tensor, Tensor]:
    """Values (n,) and gradients (n, P) of a scalar h at θ + t_i Δ, every sample at a time t_i of its own."""
    inputs, context = function.cast(inputs), moved(context, function.device)
    times = times.to(function.device)
    start, displacement = function.cast(start), function.cast(displacement)

    def h(vector: Tensor, sample: PyTree, sample_context: PyTree) -> tuple[Tensor, Tensor]:
        value = functional(function.single(function.layout.unflatten(vector), sample), sample_context)
        return value, value

    def at(time: Tensor, sample: PyTree, sample_context: PyTree) -> tuple[Tensor, Tensor]:
        return grad(h, has_aux=True)(start + time * displacement, sample, sample_context)

    def together(moments: Tensor) -> tuple[Tensor, Tensor]:
        with function.evaluating(), QUIET_FALLBACKS:
            rows, values = vmap(at)(moments.to(function.dtype), inputs, context)
        return values.detach(), rows.detach()

    key = _route_key(function, inputs, functional, context, True)
    along = ("along", *key)
    if along not in function.row_routes:
        # Rows at one θ are compared with the network run forward; with a θ for each sample, with these.
        rows = function.layout.flatten(sample_gradients(function, start, inputs, functional, context, scalar=True))
        at_start = result_or_error(lambda: together(torch.zeros_like(times))[1], REFUSALS)
        apart = (at_start - rows).abs().max().item() if isinstance(at_start, Tensor) else math.inf
        right = apart <= ROW_LIMIT.get(function.dtype, 0.0) * max(rows.abs().max().item(), torch.finfo(rows.dtype).tiny)
        function.row_routes[along] = "vmap" if right else "autograd"
    if function.row_routes[along] == "vmap":
        return together(times)
    found = []
    for i, time in enumerate(times.tolist()):
        one = slice(i, i + 1)
        sample, own, theta = take(inputs, one), take(context, one), start + time * displacement
        gradient = sample_gradients(function, theta, sample, functional, own, scalar=True)
        value = values_of(functional, function.outputs(theta, sample), own)[0, 0]
        found.append((value, function.layout.flatten(gradient)[0]))
    return torch.stack([value for value, _ in found]), torch.stack([row for _, row in found])
