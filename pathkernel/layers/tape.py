"""A forward pass that notes where parameters are used, and the gradients that follow from its signals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, PyTree
from pathkernel.functional import ModelFunction, batch_outputs
from pathkernel.layers.composites import opened
from pathkernel.layers.factors import Dense, Factor, Outer, Piece, joined
from pathkernel.layers.handles import VIEWS, Composed, Handle, View
from pathkernel.layers.rules import RULES, Gradient, NoRule, SumOfSignals
from pathkernel.pytrees import cast_floating, count


FAILURES = (NoRule, RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)
"""What a rule raises in a call that it does not cover."""


@dataclass(frozen=True)
class Arrangement:
    """Where the samples are in a tensor.

    Attributes
    ----------
    axis
        The axis along which they lie.
    merged
        ``""``; or, where that axis holds positions too, which of both changes slowest: ``"samples"`` or
        ``"positions"``.
    """

    axis: int = 0
    merged: str = ""

    def front(self, tensor: Tensor, n: int) -> Tensor:
        """Samples on the first axis, positions next to them."""
        if self.merged == "samples":
            split = tensor.unflatten(self.axis, (n, -1))
            return split.movedim(self.axis, 0)
        if self.merged == "positions":
            split = tensor.unflatten(self.axis, (-1, n))
            return split.movedim(self.axis + 1, 0)
        return tensor.movedim(self.axis, 0) if self.axis else tensor


@dataclass
class Use:
    """One call with parameters among its arguments.

    Attributes
    ----------
    function
        Its name.
    output
        Its result, whose gradient is the signal.
    handles
        Argument → what it is made of.
    gradients
        Argument → its gradients, from the signal.
    """

    function: str
    output: Tensor
    handles: dict[str, Handle]
    gradients: Mapping[str, Gradient]
    arrangement: Arrangement = field(default_factory=Arrangement)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same for what was proved of one pass to hold for another."""
        return (self.function, tuple((key, tuple(sorted(h.names()))) for key, h in self.handles.items()))


class _Recording(TorchFunctionMode):
    """Sees every torch function that is called."""

    def __init__(self, parameters: Mapping[str, Tensor], n: int, arrangement: Callable[[int], Arrangement]) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Handle]] = {}
        self.fixed: set[int] = set()
        self.n, self.arrangement = n, arrangement
        self.uses: list[Use] = []
        self.clones: dict[int, int] = {}
        self.without: dict[str, str] = {}
        self.inputs: list[tuple[Tensor, int]] = []
        self.kept: list[Tensor] = []
        for name, value in parameters.items():
            self.known[id(value)] = (value, View.of(name, value))

    def handle(self, value: Any) -> Handle | None:
        known = self.known.get(id(value)) if isinstance(value, Tensor) else None
        return known[1] if known is not None else None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in _leaves((args, kwargs)) if self.handle(leaf) is not None]
        if not leaves or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        others = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor) and self.handle(leaf) is None]
        if function in VIEWS and not others and len(leaves) == 1:
            return self._viewed(function, args, kwargs)
        body = None if function in RULES else opened(function)
        if body is not None:
            # A function that cannot be opened in this call (packed sequences) is one operation after all.
            try:
                with self:
                    return body(*args, **kwargs)
            except NoRule:
                return self._give_up(function, args, kwargs)
        return self._used(function, args, kwargs, others)

    def _viewed(self, function: Any, args: Any, kwargs: Any) -> Any:
        result, view = function(*args, **kwargs), self.handle(args[0])
        if isinstance(view, View):
            self._register(result, view.viewed(function, *args[1:], **kwargs), view)
            return result
        return self._composed(function, args, kwargs)

    def _register(self, result: Any, places: Any, view: View) -> None:
        if isinstance(result, Tensor):
            self.known[id(result)] = (result, View(view.name, places, view.origin))
        else:
            for part, own in zip(result, places, strict=True):
                self._register(part, own, view)

    def _used(self, function: Any, args: Any, kwargs: Any, others: list[Tensor]) -> Any:
        before = [(leaf, leaf._version) for leaf in others]
        result = function(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in _leaves(result)):
            return result  # a shape, a type
        batch = [leaf for leaf in others if id(leaf) not in self.fixed]
        if not batch:
            return self._composed(function, args, kwargs)
        name = resolve_name(function) or getattr(function, "__name__", str(function))
        if not isinstance(result, Tensor) or any(leaf is result or leaf._version != v for leaf, v in before):
            self._without((args, kwargs), f"changed or returned together with others by {name}")
            return result
        try:
            bound = _bound(function, args, kwargs)
            gradients = RULES[function](self._samples(), **self._detached(bound)) if function in RULES else None
        except (NoRule, TypeError):
            gradients = None
        if gradients is None or any(
            self.handle(value) is not None and key not in gradients for key, value in bound.items()
        ):
            bound, gradients = self._local(function, args, kwargs)
        handles = {key: self.handle(value) for key, value in bound.items()}
        own = {key: handle for key, handle in handles.items() if handle is not None}
        self.inputs += before
        return self.use(name, result, own, gradients)

    def use(self, name: str, result: Tensor, handles: dict[str, Handle], gradients: Mapping[str, Gradient]) -> Tensor:
        """Note a use; what the network goes on with is a copy, so that in-place operations leave the result alone."""
        if not result.requires_grad:
            result = result.detach().requires_grad_(True)
        self.uses.append(Use(name, result, handles, gradients, self.arrangement(len(self.uses))))
        copy = result.clone()
        self.clones[id(copy)] = len(self.uses) - 1
        self.kept.append(copy)
        return copy

    def _detached(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a rule reads: the graph stays out of it."""
        return {
            key: value.detach() if isinstance(value, Tensor) and self.handle(value) is None else value
            for key, value in arguments.items()
        }

    def _samples(self) -> Callable[[Tensor], Tensor]:
        index = len(self.uses)
        return lambda tensor: self.arrangement(index).front(tensor, self.n)

    def _local(self, function: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], dict[str, Gradient]]:
        """The rule of a function that has none: its own derivative, sample by sample."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        index, own = len(self.uses), [i for i, leaf in enumerate(leaves) if self.handle(leaf) is not None]

        def gradient(place: int) -> Gradient:
            def pull(signal: Tensor) -> Dense:
                return _local_gradients(function, leaves, tree, place, self, self.arrangement(index), signal)

            return pull

        return {str(i): leaves[i] for i in own}, {str(i): gradient(i) for i in own}

    def _composed(self, function: Any, args: Any, kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        own = [i for i, leaf in enumerate(leaves) if self.handle(leaf) is not None]
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor):
            self._without((args, kwargs), f"{resolve_name(function)} of parameters alone")
            return result

        def of_parameters(*values: Tensor) -> Tensor:
            filled = list(leaves)
            for place, value in zip(own, values, strict=True):
                filled[place] = value
            new_args, new_kwargs = pytree.tree_unflatten(filled, tree)
            return function(*new_args, **new_kwargs)

        sources = tuple(handle for i in own if (handle := self.handle(leaves[i])) is not None)
        composed = Composed(of_parameters, tuple(leaves[i] for i in own), sources, result.shape)
        self.known[id(result)] = (result, composed)
        return result

    def _give_up(self, function: Any, args: Any, kwargs: Any) -> Any:
        self._without((args, kwargs), f"{resolve_name(function)} has no rule for this call")
        return function(*args, **kwargs)

    def _without(self, arguments: Any, reason: str) -> None:
        for leaf in _leaves(arguments):
            handle = self.handle(leaf)
            for name in handle.names() if handle is not None else ():
                self.without[name] = reason


class Tape:
    """One forward pass of n samples at θ.

    Attributes
    ----------
    outputs
        (n, C), with the graph of the pass behind it.
    without
        Parameters that something was done to which no rule covers, and what.

    Parameters
    ----------
    function, theta, inputs
        The network, θ, and n samples.
    arrangements
        Where the samples are in the result of each use; in front by default.
    plain
        Parameters to leave out, and why; None while this is being found out.
    """

    def __init__(
        self,
        function: ModelFunction,
        theta: Float[Tensor, " P"],
        inputs: PyTree,
        arrangements: Sequence[Arrangement] = (),
        plain: Mapping[str, str] | None = None,
    ) -> None:
        self.function, self.n = function, count(inputs)
        arrangement = lambda i: arrangements[i] if i < len(arrangements) else Arrangement()  # noqa: E731
        parameters = {name: value.detach() for name, value in function.parameters(theta).items()}
        recording = _Recording(parameters, self.n, arrangement)
        recording.fixed = {id(value) for value in function.constants.values()}
        inputs = cast_floating(inputs, function.dtype)
        with torch.enable_grad(), function.running(), _module_rules(function.module, recording), recording:
            returned = function.call(parameters, inputs)
        self.outputs = batch_outputs(returned)
        leaves = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
        last = recording.clones.get(id(leaves[0])) if len(leaves) == 1 and leaves[0].dim() == 2 else None
        self.uses, self.without, self._head = recording.uses, recording.without, last
        self.proving = plain is None
        self.plain: dict[str, str] = dict(plain or {})
        changed = any(leaf._version != version for leaf, version in recording.inputs)
        if changed:
            # What a layer read was overwritten afterwards: its activations are gone.
            self.without |= dict.fromkeys(function.layout.names, "an input of a layer is overwritten in place")
        if self.proving:
            self.plain |= self.without

    @property
    def signature(self) -> tuple[Any, ...]:
        """The uses in their order, and what has no rule."""
        return (*(use.signature for use in self.uses), tuple(sorted(self.without)))

    @property
    def shapes(self) -> list[torch.Size]:
        """Of the results of all uses."""
        return [use.output.shape for use in self.uses]

    def pieces(self, components: Float[Tensor, "n K"], identity: slice | None = None) -> list[Piece]:
        """Gradients of K scalars of each sample, one piece for each part of θ that has any.

        Parameters
        ----------
        components
            Functions of ``outputs`` with their graph; the graph is kept.
        identity
            Where ``components`` are ``outputs[:, identity]``: the last layer's signals are then known.
        """
        contributions: dict[str, list[tuple[slice, Factor]]] = defaultdict(list)
        partners: dict[str, set[str]] = defaultdict(set)
        for use, signal in zip(self.uses, self._signals(components, identity), strict=True):
            for key, handle in use.handles.items():
                if signal is None or handle.names() <= self.plain.keys():
                    continue
                try:
                    with torch.no_grad():
                        factor = use.gradients[key](signal)
                    if isinstance(factor, Outer) and self._is_head(use, identity):
                        factor = replace(factor, head=True)
                    for name, where, own in handle.pull(factor):
                        contributions[name].append((where, own))
                        partners[name].add(_partner(use, key))
                except FAILURES as error:
                    if not self.proving:
                        raise
                    reason = f"{use.function} could not be taken apart ({type(error).__name__})"
                    self.plain |= dict.fromkeys(handle.names(), reason)
        return list(self._assembled(contributions, partners))

    def _is_head(self, use: Use, identity: slice | None) -> bool:
        return identity is not None and self._head is not None and use is self.uses[self._head]

    def _signals(self, components: Tensor, identity: slice | None) -> list[Tensor | None]:
        """δ of every use, (n, K, *output with the samples first)."""
        outputs, k = [use.output for use in self.uses], components.shape[1]
        columns: list[tuple[Tensor | None, ...]] = []
        wanted = [i for i, use in enumerate(self.uses) if not self._is_head(use, identity)]
        if wanted:
            columns = [
                torch.autograd.grad(
                    components[:, c].sum(), [outputs[i] for i in wanted], retain_graph=True, allow_unused=True
                )
                for c in range(k)
            ]
        signals: list[Tensor | None] = [None] * len(outputs)
        for place, i in enumerate(wanted):
            use = self.uses[i]
            parts = [column[place] for column in columns]
            if any(part is not None for part in parts):
                filled = [torch.zeros_like(use.output) if part is None else part for part in parts]
                signals[i] = torch.stack([use.arrangement.front(part, self.n) for part in filled], dim=1)
        if identity is not None and self._head is not None:
            width = self.outputs.shape[1]
            unit = torch.eye(width, dtype=components.dtype)[identity]
            signals[self._head] = unit.expand(self.n, *unit.shape)
        return signals

    def _assembled(
        self, contributions: Mapping[str, list[tuple[slice, Factor]]], partners: Mapping[str, set[str]]
    ) -> Iterator[Piece]:
        slices = self.function.layout.slices
        pieces: dict[str, list[Piece]] = {}
        for name, parts in contributions.items():
            start = slices[name].start
            pieces[name] = [
                Piece(slice(start + where.start, start + where.stop), factor)
                for where, factor in _disjoint(parts, slices[name].stop - start)
            ]
        for name, own in list(pieces.items()):
            (bias,) = partners[name] if len(partners[name]) == 1 else ("",)
            # A bias goes with its weight where each is used with the other and with nothing else.
            whole = len(own) == 1 and isinstance(own[0].factor, Outer) and not own[0].factor.transposed
            if bias and bias in pieces and whole and partners[bias] == {f"of {name}"}:
                pieces[name] = [replace(own[0], bias=slices[bias])]
                del pieces[bias]
        for found in pieces.values():
            yield from found


def _partner(use: Use, key: str) -> str:
    """The bias whose gradient is the sum of this weight's signals; for the bias, of which weight it is."""
    weight, bias = use.handles.get("weight"), use.handles.get("bias")
    if not isinstance(use.gradients.get("bias"), SumOfSignals) or not (_is_whole(weight) and _is_whole(bias)):
        return ""
    assert isinstance(weight, View) and isinstance(bias, View)
    return {"weight": bias.name, "bias": f"of {weight.name}"}.get(key, "")


def _is_whole(handle: Handle | None) -> bool:
    return isinstance(handle, View) and handle.places is handle.origin


def _disjoint(parts: list[tuple[slice, Factor]], size: int) -> list[tuple[slice, Factor]]:
    """Contributions to one parameter as gradients of disjoint parts of it."""
    by_part: dict[tuple[int, int], list[Factor]] = defaultdict(list)
    for where, factor in parts:
        by_part[where.start, where.stop].append(factor)
    ranges = sorted(by_part)
    if all(first[1] <= second[0] for first, second in zip(ranges, ranges[1:], strict=False)):
        return [(slice(*key), joined(by_part[key])) for key in ranges]
    first = parts[0][1].rows()
    whole = first.new_zeros(*first.shape[:2], size)
    for where, factor in parts:
        whole[:, :, where] += factor.rows()
    return [(slice(0, size), Dense(whole))]


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for node in tree:
            yield from _leaves(node)
    elif isinstance(tree, dict):
        for node in tree.values():
            yield from _leaves(node)
    else:
        yield tree


def _bound(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by the names that the function's rule gives them."""
    import inspect

    rule = RULES.get(function)
    if rule is None:
        return {}
    names = list(inspect.signature(rule).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _local_gradients(
    function: Any,
    leaves: list[Any],
    tree: Any,
    place: int,
    recording: _Recording,
    arrangement: Arrangement,
    signal: Tensor,
) -> Dense:
    """Gradients of one argument of a function, (n, K, size), by its derivative at each sample.

    The function is called with one sample at a time that keeps its sample axis; parameters that were expanded over
    the samples before are treated alike.
    """
    axis, n = arrangement.axis, recording.n
    if arrangement.merged:
        raise NoRule

    def batched(leaf: Any) -> bool:
        if not isinstance(leaf, Tensor) or id(leaf) in recording.fixed or leaf.dim() <= axis or leaf.shape[axis] != n:
            return False
        handle = recording.handle(leaf)
        # A parameter that was repeated for every sample is that sample's own.
        return handle is None or (isinstance(handle, View) and handle.places.stride(axis) == 0 and n > 1)

    tensors = [i for i, leaf in enumerate(leaves) if i != place and batched(leaf)]
    repeated = batched(leaves[place])

    def one(value: Tensor, samples: tuple[Tensor, ...]) -> Tensor:
        filled = list(leaves)
        filled[place] = value
        for i, sample in zip(tensors, samples, strict=True):
            filled[i] = sample.unsqueeze(axis)
        args, kwargs = pytree.tree_unflatten(filled, tree)
        result: Tensor = function(*args, **kwargs)
        return result.squeeze(axis)

    def pull(value: Tensor, samples: tuple[Tensor, ...], cotangents: Tensor) -> Tensor:
        pull_back = vjp(lambda v: one(v, samples), value)[1]
        return vmap(lambda cotangent: pull_back(cotangent)[0])(cotangents)

    value = leaves[place].detach()
    samples = tuple(leaves[i].detach() for i in tensors)
    if repeated:
        value = value.narrow(axis, 0, 1)
    gradients = vmap(pull, in_dims=(None, axis, 0))(value, samples, signal)  # (n, K, *value)
    if gradients.shape[2:] != value.shape:
        raise NoRule  # an operation that vmap does not treat right
    if repeated:  # one sample's copy stands for all: put the gradient where that copy lies in the whole tensor
        whole = gradients.new_zeros(*signal.shape[:2], *leaves[place].shape)
        whole.narrow(2 + axis, 0, 1).copy_(gradients)
        gradients = whole
    return Dense(gradients.reshape(*signal.shape[:2], -1))


@contextmanager
def _module_rules(module: nn.Module, recording: _Recording) -> Iterator[None]:
    """Modules whose class has a rule of its own are one use each."""
    patched = []
    for child in module.modules():
        rule = RULES.get(type(child))
        if rule is not None and "forward" not in vars(child):
            child.forward = _module_use(child, rule, recording)  # type: ignore[method-assign]
            patched.append(child)
    try:
        yield
    finally:
        for child in patched:
            del child.forward


def _module_use(module: nn.Module, rule: Any, recording: _Recording) -> Callable[..., Any]:
    inner = type(module).forward

    def forward(*inputs: Any) -> Any:
        own = {name: recording.handle(value) for name, value in module._parameters.items() if value is not None}
        handles = {name: handle for name, handle in own.items() if handle is not None}
        with torch._C.DisableTorchFunction():
            result = inner(module, *inputs)
        gradients = rule(recording._samples(), module, *inputs)
        if not isinstance(result, Tensor) or not handles.keys() <= gradients.keys():
            for handle in handles.values():
                recording.without |= dict.fromkeys(handle.names(), f"the rule of {type(module).__name__} leaves it out")
            return result
        recording.inputs += [(leaf, leaf._version) for leaf in _leaves(inputs) if isinstance(leaf, Tensor)]
        return recording.use(type(module).__name__, result, handles, gradients)

    return forward
