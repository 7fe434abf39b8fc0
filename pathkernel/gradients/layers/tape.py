"""A forward pass that notes where parameters are used, and the gradients that follow from its signals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.forward_derivatives import REFUSALS
from pathkernel.gradients.forward_state import QUIET_FALLBACKS
from pathkernel.gradients.layers.batch_axis import NO_ROLES, Arrangement, Roles
from pathkernel.gradients.layers.factor import Factor
from pathkernel.gradients.layers.factors import Dense, Outer, Piece, joined
from pathkernel.gradients.layers.modules import module_rules
from pathkernel.gradients.layers.parameter_views import Handle, View
from pathkernel.gradients.layers.rules import NoRule, SumOfSignals
from pathkernel.gradients.layers.tracing import LayerCall, ParameterTracer
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import ROW_LIMIT
from pathkernel.gradients.pytrees import count
from pathkernel.gradients.returned import batch_outputs, output_leaves
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.runtime.transfers import sent
from pathkernel.runtime.workspace import Workspace, give_back_freed_memory

FAILURES = (NoRule, ArithmeticError, *REFUSALS)
"""Exceptions that a rule raises in a call that it does not cover."""


class NotElementwise(Exception):
    """Error: the form proved of the layer before the output layer does not hold of the samples at hand."""


class OutputLayer(NamedTuple):
    """The layer whose outputs are the network's.

    Attributes
    ----------
    number
        Of its call.
    read
        What it reads, (n, p), with the graph behind it.
    weight
        w, (C, p).
    """

    number: int
    read: Tensor
    weight: Tensor


class Tape:
    """One forward pass of n samples at θ.

    Attributes
    ----------
    outputs
        (n, C), with the graph of the pass behind it.
    returned
        The same as the network returned it.
    parameters
        θ by name, the very tensors that the network was given.
    rearranges
        Whether a function was called that may put samples in another order.
    unsupported
        Parameters that went into something that no rule covers, and into what.

    Parameters
    ----------
    function, theta, inputs
        The network, θ, and n samples.
    arrangements
        Place of the samples in the result of each call; in front by default.
    plain
        Parameters to leave out, and why; None while this is being found out.
    workspace
        Memory for signals; by default none is kept.
    roles
        Results that are of samples or of none otherwise than their arguments tell.
    """

    def __init__(
        self,
        function: ModelFunction,
        theta: Float[Tensor, " P"],
        inputs: PyTree,
        arrangements: Sequence[Arrangement] = (),
        plain: Mapping[str, str] | None = None,
        workspace: Workspace | None = None,
        roles: Roles = NO_ROLES,
    ) -> None:
        give_back_freed_memory()  # of the pass before
        self.function, self.n, self.workspace = function, count(inputs), workspace or Workspace(0)
        self.arrangements, self.roles = tuple(arrangements), roles
        arrangement = lambda i: arrangements[i] if i < len(arrangements) else Arrangement()  # noqa: E731
        parameters = {name: value.detach() for name, value in function.parameters(theta).items()}
        tracer = ParameterTracer(parameters, self.n, arrangement, function.constants.values(), roles)
        self.parameters = parameters
        inputs = function.cast(inputs)
        covered = plain is None or not plain.keys() >= set(function.layout.names)
        watching = (module_rules(function, tracer), tracer) if covered else ()
        with function.evaluating(gradients=True, fused_attention=True), ExitStack() as stack:
            for watch in watching:
                stack.enter_context(watch)
            returned = function.call(parameters, inputs)
        self.returned, self.rearranges = returned, tracer.rearranges
        self.outputs = batch_outputs(returned, self.n)
        leaves = [leaf for leaf in output_leaves(returned) if isinstance(leaf, Tensor)]
        alone = len(leaves) == 1 and leaves[0].shape == self.outputs.shape
        number, version = tracer.outputs.get(id(leaves[0]), (None, 0)) if alone else (None, 0)
        # What was written on in place since then is not what the layer returned.
        self._head = number if number is None or leaves[0]._version == version else None
        self.calls, self.unsupported, self.composed = tracer.calls, tracer.unsupported, tracer.composed
        tracer.calls = []  # rules know the tracer: a cycle would keep every pass until the garbage collector runs
        for leaf, version, number in tracer.read:
            if leaf._version != version:  # activations are gone
                names = self.calls[number].names()
                self.unsupported |= dict.fromkeys(names, "an input of a layer is overwritten in place")
        self._read = [(leaf, leaf._version) for leaf, _, _ in tracer.read]
        self._read_by_head = [leaf for leaf, _, number in tracer.read if number == self._head]
        self.proving = plain is None
        self.plain: dict[str, str] = dict(plain or {})
        if self.proving:
            self.plain |= self.unsupported

    @classmethod
    def of_calls(cls, function: ModelFunction, n: int, calls: Sequence[LayerCall]) -> Tape:
        """A tape of calls that were noted elsewhere, whose pass was proved: to be met with signals, without outputs."""
        tape = cls.__new__(cls)
        tape.function, tape.n, tape.calls = function, n, list(calls)
        tape.plain, tape.proving, tape._read = {}, False, []
        return tape

    @property
    def signature(self) -> tuple[Any, ...]:
        """Calls in their order, what has no rule, and where parameters alone were at work."""
        return (*(call.signature for call in self.calls), tuple(sorted(self.unsupported)), tuple(self.composed))

    @property
    def lengths(self) -> set[int]:
        """Lengths of the axes of all results, and of all arguments of functions without a rule."""
        arguments = (shape for call in self.calls for shape in call.arguments if shape is not None)
        composed = (shape for shapes in self.composed.values() for shape in shapes)
        return {length for shape in (*self.shapes, *arguments, *composed) for length in shape}

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the results of all calls."""
        return [call.output.shape for call in self.calls]

    def pieces(
        self, components: Float[Tensor, "n K"], identity: slice | None = None, before_head: int | None = None
    ) -> list[Piece]:
        """Gradients of K scalars of each sample, one piece for each part of θ that has any.

        Parameters
        ----------
        components
            Functions of ``outputs`` with their graph; the graph is kept.
        identity
            Where ``components`` are ``outputs[:, identity]``: the last layer's signals are then known.
        before_head
            `elementwise_before_head` as it was proved, where sums over components are wanted (`Outer.joint`).

        Raises
        ------
        NotElementwise
            Where that does not hold of these samples.
        """
        signals = self._signals(components, identity)
        with self.function.without_graph(), QUIET_FALLBACKS:
            pieces = self.pieces_of_signals(signals, identity)
        # A sum over one component is no sum, and rounding to few digits on the way looks like another form of signals.
        alone = components.shape[1] == 1 or self.function.state.autocast is not None
        if before_head is None or identity is None or alone or not pieces:
            return pieces
        return self._with_joint(pieces, before_head, identity)

    def elementwise_before_head(self, limit: float) -> int | None:
        r"""Number of the layer's call whose outputs the output layer reads entry by entry, as after a ReLU.

        Its signals are :math:`\delta_{ik} = w_k \circ v_i`, of the output layer's weight w (C, p) and slopes v (n, p);
        compared within ``limit``. None where there is no such layer.
        """
        layer = self._output_layer
        if layer is None:
            return None
        alike = [
            i
            for i, call in enumerate(self.calls[: layer.number])
            if call.output.shape == layer.read.shape and call.arrangement == Arrangement()
        ]
        # Of a layer further back the output layer reads what this one made of it.
        return alike[-1] if alike and self._slopes(layer, self.calls[alike[-1]], limit) is not None else None

    @property
    def _output_layer(self) -> OutputLayer | None:
        """The last call, where that is a linear layer of vectors whose weight is a parameter."""
        if self._head is None:
            return None
        call, read = self.calls[self._head], self._read_by_head
        weight = call.handles.get("weight")
        if call.function != resolve_name(F.linear) or not isinstance(weight, View) or not weight.whole:
            return None
        if len(read) != 1 or read[0].dim() != 2 or not read[0].requires_grad:
            return None
        return OutputLayer(self._head, read[0], self.parameters[weight.name])

    def _slopes(self, layer: OutputLayer, call: LayerCall, limit: float) -> Float[Tensor, "n p"] | None:
        r"""v with :math:`\delta_{ik} = w_k \circ v_i` for the signals of a call, or None where these have another form.

        v are the signals of :math:`\sum_p a_{ip}`, a being what the output layer reads. Compared are the signals of a
        random combination of the outputs, another one for each sample, which are of that form if and only if all are
        (with probability one), up to ``limit`` times the largest.
        """
        generator = torch.Generator().manual_seed(self.n)
        drawn = torch.randn(self.outputs.shape, generator=generator, dtype=torch.float64).to(self.outputs.dtype)
        drawn = sent(drawn, self.outputs.device)
        slopes, signals = (
            torch.autograd.grad(of, call.output, cotangent, retain_graph=True, allow_unused=True)[0]
            for of, cotangent in ((layer.read, torch.ones_like(layer.read)), (self.outputs, drawn))
        )
        if slopes is None or signals is None:
            return None
        difference = (drawn @ layer.weight).mul_(slopes).sub_(signals).abs_().max()
        # Of signals that are no numbers the maximum is none: it says nothing of the other samples.
        return slopes if difference <= limit * signals.abs().max() else None

    def _with_joint(self, pieces: list[Piece], before_head: int, identity: slice) -> list[Piece]:
        """Tell the gradients of the layer's weight, unless other calls add to them, what `Outer.joint` is."""
        layer, call = self._output_layer, self.calls[before_head]
        limit = ROW_LIMIT.get(self.function.dtype, 0.0)
        slopes = None if layer is None else self._slopes(layer, call, limit)
        if layer is None or slopes is None:
            raise NotElementwise
        joint = slopes * layer.weight[identity].square().sum(dim=0).sqrt()
        slices = self.function.layout.slices
        places = [slices[handle.name] for handle in call.handles.values() if isinstance(handle, View) and handle.whole]

        def told(factor: Factor) -> Factor:
            return factor.with_joint(joint) if isinstance(factor, Outer) and factor.positions == 1 else factor

        return [replace(own, factor=told(own.factor)) if own.where in places else own for own in pieces]

    def pieces_of_signals(self, signals: Sequence[Tensor | None], identity: slice | None = None) -> list[Piece]:
        """The same from δ of every call, (n, K, *output with the samples first); None where it has none."""
        contributions: dict[str, list[tuple[slice, Factor]]] = defaultdict(list)
        partners: dict[str, set[str]] = defaultdict(set)
        biases: dict[str, list[tuple[LayerCall, str, Tensor]]] = defaultdict(list)
        for call, signal in zip(self.calls, signals, strict=True):
            for key, handle in call.handles.items():
                if signal is None or handle.names() <= self.plain.keys():
                    continue
                partner = _partner(call, key)
                for name in handle.names():
                    partners[name].add(partner)
                if partner.startswith("of "):
                    biases[next(iter(handle.names()))].append((call, key, signal))
                    continue
                self._pull(call, key, signal, identity, contributions)
        own = {name: self._pieces_of(name, parts) for name, parts in contributions.items()}
        for name, bias in self._with_weights(own, partners).items():
            own[name] = [replace(own[name][0], bias=self.function.layout.slices[bias])]
            biases.pop(bias)
        alone: dict[str, list[tuple[slice, Factor]]] = {name: contributions[name] for name in biases}
        for name, uses in biases.items():
            for call, key, signal in uses:
                self._pull(call, key, signal, identity, alone)
            own[name] = self._pieces_of(name, alone[name])
        if not self.proving:  # once for all rules: which it was is no matter then
            self._check_read("a rule")
        return [piece for pieces in own.values() for piece in pieces]

    def _check_read(self, who: str) -> None:
        """Refuse rules that write on activations: every later use would be wrong, by the same layer or another."""
        if any(leaf._version != version for leaf, version in self._read):
            raise NoRule(f"{who} writes on what its layer read")

    def _pull(
        self,
        call: LayerCall,
        key: str,
        signal: Tensor,
        identity: slice | None,
        contributions: dict[str, list[tuple[slice, Factor]]],
    ) -> None:
        """Add the gradients of one argument of a call."""
        handle = call.handles[key]

        def pull() -> None:
            factor = call.gradients[key](signal)
            if self.proving:
                self._check_read(f"the rule of {call.function}")
            if (factor.samples, factor.components) != signal.shape[:2] or factor.samples != self.n:
                raise NoRule(f"the rule of {call.function} gives gradients of another number of samples")
            if self._is_head(call, identity):
                factor = factor.as_head()
            for name, where, own in list(handle.pull(factor)):
                # Others of the same handle are wanted; an expert that nothing was sent to has no positions.
                if name not in self.plain and own.positions:
                    contributions[name].append((where, own))

        error = result_or_error(pull, FAILURES if self.proving else ())
        if error is not None:
            reason = f"{call.function} could not be taken apart ({type(error).__name__})"
            self.plain |= dict.fromkeys(handle.names(), reason)

    def _pieces_of(self, name: str, parts: list[tuple[slice, Factor]]) -> list[Piece]:
        where = self.function.layout.slices[name]
        return [
            Piece(slice(where.start + part.start, where.start + part.stop), factor)
            for part, factor in _disjoint(parts, where.stop - where.start)
        ]

    def _with_weights(self, pieces: Mapping[str, list[Piece]], partners: Mapping[str, set[str]]) -> dict[str, str]:
        """Weight → bias where each is used with the other and with nothing else: a bias need not be formed then."""
        found = {}
        for name, own in pieces.items():
            (bias,) = partners[name] if len(partners[name]) == 1 else ("",)
            whole = len(own) == 1 and own[0].factor.takes_bias
            if bias and whole and partners[bias] == {f"of {name}"}:
                found[name] = bias
        return found

    def _is_head(self, call: LayerCall, identity: slice | None) -> bool:
        return identity is not None and self._head is not None and call is self.calls[self._head]

    def _signals(self, components: Tensor, identity: slice | None) -> list[Tensor | None]:
        """δ of every call, (n, K, *output with the samples first)."""
        outputs, k = [call.output for call in self.calls], components.shape[1]
        signals: list[Tensor | None] = [None] * len(outputs)
        covered = [not call.names() <= self.plain.keys() for call in self.calls]
        wanted = [i for i, call in enumerate(self.calls) if covered[i] and not self._is_head(call, identity)]
        for c in range(k if wanted and components.requires_grad else 0):
            cotangent = torch.zeros_like(components)
            cotangent[:, c] = 1
            column = torch.autograd.grad(
                components, [outputs[i] for i in wanted], cotangent, retain_graph=True, allow_unused=True
            )
            for i, part in zip(wanted, column, strict=True):
                call = self.calls[i]
                if part is not None and not call.arrangement.holds(part, self.n):
                    self._refuse(call)
                    continue
                signals[i] = _with_column(signals[i], part, call.arrangement, (self.n, k, c), self.workspace)
        if identity is not None and self._head is not None:
            width = self.outputs.shape[1]
            unit = torch.eye(width, dtype=components.dtype, device=components.device)[identity]
            signals[self._head] = unit.expand(self.n, *unit.shape)
        return signals

    def _refuse(self, call: LayerCall) -> None:
        """Leave out the parameters of a call whose result cannot be cut into samples."""
        reason = f"the result of {call.function} holds no part for each sample"
        if not self.proving:
            raise NoRule(reason)
        self.plain |= dict.fromkeys(call.names(), reason)


def _with_column(
    signal: Tensor | None,
    part: Tensor | None,
    arrangement: Arrangement,
    place: tuple[int, int, int],
    workspace: Workspace,
) -> Tensor | None:
    """δ (n, K, …) with that of component c filled in; None while no component has any."""
    n, k, c = place
    if part is None:
        if signal is not None:
            signal[:, c] = 0
        return signal
    part = arrangement.front(part, n)
    if k == 1:
        return part.unsqueeze(1)
    if signal is None:
        signal = workspace.empty((part.shape[0], k, *part.shape[1:]), part.dtype, part.device)
        signal[:, :c] = 0
    signal[:, c] = part
    return signal


def _partner(call: LayerCall, key: str) -> str:
    """The bias whose gradient is the sum of this weight's signals; for the bias, of which weight it is."""
    weight, bias = call.handles.get("weight"), call.handles.get("bias")
    if not isinstance(call.gradients.get("bias"), SumOfSignals) or not (_is_whole(weight) and _is_whole(bias)):
        return ""
    assert isinstance(weight, View) and isinstance(bias, View)
    return {"weight": bias.name, "bias": f"of {weight.name}"}.get(key, "")


def _is_whole(handle: Handle | None) -> bool:
    return isinstance(handle, View) and handle.whole


def _disjoint(parts: list[tuple[slice, Factor]], size: int) -> list[tuple[slice, Factor]]:
    """Contributions to one parameter as gradients of disjoint parts of it."""
    by_part: dict[tuple[int, int], list[Factor]] = defaultdict(list)
    for where, factor in parts:
        by_part[where.start, where.stop].append(factor)
    ranges = sorted(by_part)
    if all(first[1] <= second[0] for first, second in pairwise(ranges)):
        return [(slice(*key), joined(by_part[key])) for key in ranges]
    first = parts[0][1].rows()
    whole = first.new_zeros(*first.shape[:2], size)
    for where, factor in parts:
        whole[:, :, where] += factor.rows()
    return [(slice(0, size), Dense(whole))]
