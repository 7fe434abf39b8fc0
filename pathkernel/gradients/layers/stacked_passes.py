r"""Passes of one network at several θ as one: small steps take the time of their calls, not of their products.

:math:`z_{si} = f(\theta_s, x_{si})` for k points θ_s by `torch.func.vmap` over s. The signals of every layer follow
from zeros that are added to its result, :math:`\delta = \partial h / \partial \epsilon` at ε = 0, and the gradients
from readings and signals by the rules of a tape.

Nothing of it is believed before it is compared with the passes one by one (`ProvedStacks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, Parameters, PyTree
from pathkernel.gradients.forward_state import QUIET_FALLBACKS
from pathkernel.gradients.layers.batch_axis import Arrangement, Roles, SamplesFirst
from pathkernel.gradients.layers.factors import Piece
from pathkernel.gradients.layers.parameter_views import Handle, View
from pathkernel.gradients.layers.recorded_passes import Program
from pathkernel.gradients.layers.rules import RULES, Gradient, NoRule, Rule
from pathkernel.gradients.layers.stacked_pieces import StackedPieces
from pathkernel.gradients.layers.tape import Tape
from pathkernel.gradients.layers.tracing import LayerCall, ParameterTracer
from pathkernel.gradients.model_function import ModelFunction


@dataclass(frozen=True)
class Pattern:
    """Knowledge of one proved pass that passes of its kind share.

    Attributes
    ----------
    n
        Samples.
    results
        Shape and type of the result of each call.
    signature, arrangements, roles
        As of a tape.
    program
        The operations of a pass, by which the others are made; None where `vmap` makes them.
    """

    n: int
    results: tuple[tuple[torch.Size, torch.dtype], ...]
    signature: Any
    arrangements: tuple[Arrangement, ...]
    roles: Roles
    program: Program | None = None

    @classmethod
    def of(cls, tape: Tape) -> Pattern | None:
        """Pattern of a tape; None where it leaves parameters out, or looks at the values of the samples."""
        if tape.plain or tape.rearranges or not tape.calls:
            return None
        results = tuple((call.output.shape, call.output.dtype) for call in tape.calls)
        return cls(tape.n, results, tape.signature, tape.arrangements, tape.roles)


class StackedTracer(ParameterTracer):
    """Tracer of one pass under ``vmap``, where no tensor can be made a leaf: zeros are added to each result instead.

    Parameters
    ----------
    parameters, pattern
        θ by name, and what is known of the pass.
    zeros
        ε, in the shape of each result.
    fixed
        As of `ParameterTracer`.

    Attributes
    ----------
    rules
        Rule of each call, and the arguments that it is called with.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], pattern: Pattern, zeros: Sequence[Tensor], fixed: Sequence[Tensor]
    ) -> None:
        known = pattern.arrangements
        place = lambda i: known[i] if i < len(known) else Arrangement()  # noqa: E731
        super().__init__(parameters, pattern.n, place, fixed, pattern.roles)
        self.zeros = zeros
        self.rules: list[tuple[Rule, dict[str, Any]]] = []

    def _gradients(
        self, function: Any, args: Any, kwargs: Any, result: Tensor
    ) -> tuple[dict[str, Handle], dict[str, Gradient], tuple[torch.Size | None, ...]]:
        """Handles of the arguments; their gradients are had from the rule, once the pass is over."""
        bound, gradients = self._by_rule(function, args, kwargs)
        handles = {key: handle for key, value in bound.items() if (handle := self.handle(value)) is not None}
        if not handles or not handles.keys() <= gradients.keys():
            raise NoRule("a call without a rule of its own")
        if not all(isinstance(handle, View) for handle in handles.values()):
            raise NoRule("a tensor that is computed from parameters")
        self.rules.append((RULES[function], self._detached(bound)))
        return handles, {}, ()

    def module_call(self, module: nn.Module, rule: Rule, inputs: tuple[Any, ...]) -> Any:
        """Refuse modules that are one call: their rules read parameters from the module, which are gone by then."""
        raise NoRule("a module with a rule of its own")

    def note(
        self,
        name: str,
        result: Tensor,
        handles: dict[str, Handle],
        gradients: Mapping[str, Gradient],
        arguments: tuple[torch.Size | None, ...] = (),
    ) -> Tensor:
        """Note a call; the network goes on with its result plus zeros."""
        number = len(self.calls)
        if number >= len(self.zeros) or result.shape != self.zeros[number].shape:
            raise NoRule("a pass of another kind")
        found = result + self.zeros[number]
        arrangement = self.arrangement(number)
        self.calls.append(LayerCall(name, found, handles, gradients, arrangement, arguments, self.place))
        self._kept.append(found)
        return found


class StackedPasses:
    """Passes of n samples each at k points.

    Attributes
    ----------
    outputs
        (k, n, C), with the graph of the passes behind them.

    Parameters
    ----------
    function, pattern
        The network, and what is known of one pass.
    thetas
        (k, P).
    inputs
        (k, n, ...) leaves, or (n, ...) where the samples are the same at all points.
    shared
        Whether they are.

    Raises
    ------
    NoRule
        Where a call has no rule, or the pass is of another kind than the pattern; and whatever ``vmap`` raises.
    """

    def __init__(
        self, function: ModelFunction, pattern: Pattern, thetas: Float[Tensor, "k P"], inputs: PyTree, shared: bool
    ) -> None:
        self.function, self.pattern = function, pattern
        self._calls: list[LayerCall] = []
        self._rules: list[Rule] = []
        # What the rules are called with: tensors, which `vmap` hands on, by their places among the rest.
        self._tree: Any = None
        self._leaves: list[Any] = []
        self._places: list[int] = []
        parameters, inputs = stacked_parameters(function, thetas), function.cast(inputs)
        # Plain attention: the fused one has no rule for several at once.
        with function.evaluating(gradients=True), QUIET_FALLBACKS:
            # Not as many zeros in memory: one that is repeated.
            own = [torch.zeros((), dtype=d, device=thetas.device, requires_grad=True) for _, d in pattern.results]
            self._zeros = [
                zero.expand(len(thetas), *shape) for zero, (shape, _) in zip(own, pattern.results, strict=True)
            ]
            over = vmap(self._one, in_dims=(0, None if shared else 0, 0))
            self.outputs, self._read = over(parameters, inputs, self._zeros)
        self._read = [own.detach() for own in self._read]

    def _one(self, parameters: Parameters, inputs: PyTree, zeros: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Outputs of one pass, and all tensors that the rules read."""
        function, pattern = self.function, self.pattern
        tracer = StackedTracer(parameters, pattern, zeros, list(function.constants.values()))
        with tracer:
            outputs = function.batch(parameters, inputs)
        calls, tracer.calls = tracer.calls, []
        signature = (*(call.signature for call in calls), tuple(sorted(tracer.unsupported)), tuple(tracer.composed))
        if signature != pattern.signature or len(calls) != len(pattern.results):
            raise NoRule("a pass of another kind")
        self._calls = [replace(call, output=call.output.new_empty(0)) for call in calls]
        self._rules = [rule for rule, _ in tracer.rules]
        leaves, self._tree = pytree.tree_flatten([bound for _, bound in tracer.rules])
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return outputs, [leaves[place] for place in self._places]

    def pieces(self, components: Float[Tensor, "k n K"]) -> StackedPieces:
        """Gradients of K scalars of each sample, functions of ``outputs`` with their graph, at each point."""
        signals, used = self._signals(components)
        found: list[Piece] = []

        def taken_apart(read: list[Tensor], own: list[list[Tensor]]) -> list[list[Tensor]]:
            found[:] = self._pieces(read, dict(zip(used, own, strict=True)))
            return [list(piece.factor.tensors) for piece in found]

        with self.function.without_graph(), QUIET_FALLBACKS:
            stacked = vmap(taken_apart)(self._read, signals)
        return StackedPieces.of(found, [[tensor.unbind() for tensor in own] for own in stacked])

    def _signals(self, components: Tensor) -> tuple[list[list[Tensor]], list[int]]:
        """δ of each call in each component, (k, *output), of calls that have any; and which these are."""
        columns = []
        for c in range(components.shape[2]):
            cotangent = torch.zeros_like(components)
            cotangent[..., c] = 1
            last = c + 1 == components.shape[2]
            with QUIET_FALLBACKS:
                columns.append(
                    torch.autograd.grad(components, self._zeros, cotangent, retain_graph=not last, allow_unused=True)
                )
        signals, used = [], []
        for call, zeros in enumerate(self._zeros):
            own = [column[call] for column in columns]
            if any(part is not None for part in own):
                signals.append([torch.zeros_like(zeros) if part is None else part for part in own])
                used.append(call)
        return signals, used

    def _pieces(self, read: list[Tensor], signals: Mapping[int, list[Tensor]]) -> list[Piece]:
        """Pieces of one point, from what its rules read and the signals of its calls."""
        leaves = list(self._leaves)
        for place, own in zip(self._places, read, strict=True):
            leaves[place] = own
        bounds = pytree.tree_unflatten(leaves, self._tree)
        n = self.pattern.n
        calls = [
            replace(call, gradients=rule(SamplesFirst(call.arrangement, n), **bound))
            for call, rule, bound in zip(self._calls, self._rules, bounds, strict=True)
        ]
        fronted: list[Tensor | None] = [None] * len(calls)
        for i, columns in signals.items():
            parts = [calls[i].arrangement.front(part, n) for part in columns]
            fronted[i] = torch.stack(parts, dim=1) if len(parts) > 1 else parts[0].unsqueeze(1)
        return Tape.of_calls(self.function, n, calls).pieces_of_signals(fronted)


def stacked_parameters(function: ModelFunction, thetas: Float[Tensor, "k P"]) -> Parameters:
    """θ at k points by name, (k, *shape), in the working floating type."""
    return function.layout.unflatten(function.cast(thetas))


def stacked_outputs(function: ModelFunction, thetas: Float[Tensor, "k P"], inputs: PyTree) -> Float[Tensor, "k n C"]:
    """Outputs of the same n samples at k points, without a graph."""
    parameters, inputs = stacked_parameters(function, thetas), function.cast(inputs)
    with function.evaluating(gradients=False), QUIET_FALLBACKS:
        return vmap(function.batch, in_dims=(0, None))(parameters, inputs)
