"""Calls of a forward pass that have parameters among their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from pathkernel.gradients.layers.batch_axis import Arrangement
from pathkernel.gradients.layers.factors import Dense, Factor
from pathkernel.gradients.layers.parameter_views import VIEWS, Composed, Handle, View
from pathkernel.gradients.layers.pooling import REPLACEMENTS
from pathkernel.gradients.layers.recurrent import decomposed
from pathkernel.gradients.layers.rules import RULES, Gradient, NoRule, Rule


@dataclass
class LayerCall:
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
    arrangement
        Where the samples are.
    arguments
        Shapes of the arguments of a function without a rule, None for what is no tensor.
    """

    function: str
    output: Tensor
    handles: dict[str, Handle]
    gradients: Mapping[str, Gradient]
    arrangement: Arrangement = field(default_factory=Arrangement)
    arguments: tuple[torch.Size | None, ...] = ()

    @property
    def signature(self) -> tuple[Any, ...]:
        """Function and parameters: the same where what was proved of one pass holds for another."""
        return (self.function, tuple((key, tuple(sorted(h.names()))) for key, h in self.handles.items()))


class ParameterTracer(TorchFunctionMode):
    """Sees every torch function that is called, and notes those with parameters among their arguments.

    Parameters
    ----------
    parameters
        θ by name, the very tensors that the network is given.
    n
        Samples in the pass.
    arrangement
        Arrangement of the result of each call, by its number.
    fixed
        Tensors that are the same for all samples.

    Attributes
    ----------
    calls
        In the order of the pass.
    outputs
        Number of each call by the identity of the tensor that the network went on with.
    unsupported
        Parameters that went into something that no rule covers, and into what.
    rearranges
        Whether a function was called that may put samples in another order, as those of the batch at hand have it.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        n: int,
        arrangement: Callable[[int], Arrangement],
        fixed: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Handle]] = {}
        self.fixed = {id(value) for value in fixed}
        self.n, self.arrangement = n, arrangement
        self.calls: list[LayerCall] = []
        self.outputs: dict[int, int] = {}
        self.unsupported: dict[str, str] = {}
        self.rearranges = False
        self.read: list[tuple[Tensor, int]] = []
        self._kept: list[Tensor] = []  # an identity is only good for as long as its tensor lives
        for name, value in parameters.items():
            self.known[id(value)] = (value, View(name, value.shape))

    def handle(self, value: Any) -> Handle | None:
        """Handle of a tensor made of parameters alone; None of others."""
        known = self.known.get(id(value)) if isinstance(value, Tensor) else None
        return known[1] if known is not None else None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of((args, kwargs))
        leaves = [leaf for leaf in tensors if id(leaf) in self.known]
        self.rearranges |= function in REARRANGING or (function is GETITEM and _picks(args))
        if not leaves or not torch.is_grad_enabled():
            return REPLACEMENTS.get(function, function)(*args, **kwargs)
        others = [leaf for leaf in tensors if id(leaf) not in self.known]
        if function in VIEWS and not others and len(leaves) == 1:
            return self._viewed(function, args, kwargs)
        body = None if function in RULES else decomposed(function)
        if body is not None:
            # A function that cannot be decomposed in this call (packed sequences) is one operation after all.
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
            self.known[id(result)] = (result, view.at(places))
        else:
            for part, own in zip(result, places, strict=True):
                self._register(part, own, view)

    def _used(self, function: Any, args: Any, kwargs: Any, others: list[Tensor]) -> Any:
        before = [(leaf, leaf._version) for leaf in others]
        result = function(*args, **kwargs)
        if not any(leaf.is_floating_point() for leaf in tensors_of(result)):
            return result  # a shape, a type
        batch = [leaf for leaf in others if id(leaf) not in self.fixed]
        if not batch:
            return self._composed(function, args, kwargs)
        name, arguments = _name(function), ()  # type: tuple[str, tuple[torch.Size | None, ...]]
        if not isinstance(result, Tensor) or any(leaf is result or leaf._version != v for leaf, v in before):
            self._leave_out((args, kwargs), f"changed or returned together with others by {name}")
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
            arguments = _shapes(args, kwargs)
        handles = {key: self.handle(value) for key, value in bound.items()}
        own = {key: handle for key, handle in handles.items() if handle is not None}
        self.read += before
        return self.note(name, result, own, gradients, arguments)

    def note(
        self,
        name: str,
        result: Tensor,
        handles: dict[str, Handle],
        gradients: Mapping[str, Gradient],
        arguments: tuple[torch.Size | None, ...] = (),
    ) -> Tensor:
        """Note a call; what the network goes on with is a copy, so that in-place operations leave the result alone."""
        if not result.requires_grad:
            result = result.detach().requires_grad_(True)
        self.calls.append(LayerCall(name, result, handles, gradients, self.arrangement(len(self.calls)), arguments))
        copy = result.clone()
        self.outputs[id(copy)] = len(self.calls) - 1
        self._kept.append(copy)
        return copy

    def _detached(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments as a rule reads them: the graph stays out of it."""
        return {
            key: value.detach() if isinstance(value, Tensor) and self.handle(value) is None else value
            for key, value in arguments.items()
        }

    @property
    def overwritten(self) -> bool:
        """True where something that a layer read was changed in place afterwards."""
        return overwritten(self.read)

    def module_call(self, module: nn.Module, rule: Rule, inputs: tuple[Any, ...]) -> Any:
        """Run a module whose class has a rule of its own as one call."""
        own = {name: self.handle(value) for name, value in module._parameters.items() if value is not None}
        handles = {name: handle for name, handle in own.items() if handle is not None}
        with torch._C.DisableTorchFunction():
            result = type(module).forward(module, *inputs)
        gradients = rule(self._samples(), module, *(i.detach() if isinstance(i, Tensor) else i for i in inputs))
        if not isinstance(result, Tensor) or not handles.keys() <= gradients.keys():
            for handle in handles.values():
                self.unsupported |= dict.fromkeys(handle.names(), f"the rule of {type(module).__name__} leaves it out")
            return result
        self.read += [(leaf, leaf._version) for leaf in tensors_of(inputs)]
        within = {key: _at(module, dict(module._parameters), gradient) for key, gradient in gradients.items()}
        return self.note(type(module).__name__, result, handles, within)

    def _samples(self) -> Callable[[Tensor], Tensor]:
        index = len(self.calls)
        return lambda tensor: self.arrangement(index).front(tensor, self.n)

    def _local(self, function: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], dict[str, Gradient]]:
        """The rule of a function that has none: its own derivative, sample by sample."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        index, own = len(self.calls), [i for i, leaf in enumerate(leaves) if self.handle(leaf) is not None]

        def gradient(place: int) -> Gradient:
            def pull(signal: Tensor) -> Dense:
                return local_gradients(function, leaves, tree, place, self, index, signal)

            return pull

        return {str(i): leaves[i] for i in own}, {str(i): gradient(i) for i in own}

    def _composed(self, function: Any, args: Any, kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        own = [i for i, leaf in enumerate(leaves) if self.handle(leaf) is not None]
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor):
            self._leave_out((args, kwargs), f"{resolve_name(function)} of parameters alone")
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
        self._leave_out((args, kwargs), f"{resolve_name(function)} has no rule for this call")
        return function(*args, **kwargs)

    def _leave_out(self, arguments: Any, reason: str) -> None:
        for leaf in tensors_of(arguments):
            handle = self.handle(leaf)
            for name in handle.names() if handle is not None else ():
                self.unsupported[name] = reason


def _shapes(args: Any, kwargs: Any) -> tuple[torch.Size | None, ...]:
    return tuple(leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves((args, kwargs)))


def _named(*names: str) -> set[Any]:
    """Functions of torch, and methods of tensors, of these names."""
    return {getattr(holder, name) for name in names for holder in (torch, Tensor) if hasattr(holder, name)}


REARRANGING = frozenset(
    _named("argsort", "sort", "msort", "unique", "unique_consecutive", "nonzero", "argwhere", "flip", "roll")
    | _named("randperm")
    | _named("bincount", "bucketize", "searchsorted", "masked_select", "masked_scatter", "index_select", "index_add")
    | _named("index_copy", "index_put", "index_add_", "index_copy_", "index_put_", "take", "repeat_interleave")
    | _named("gather", "take_along_dim", "topk", "scatter", "scatter_add", "scatter_reduce", "scatter_", "scatter_add_")
    | {torch.functional.unique, torch.functional.unique_consecutive}
)
"""Functions that may put samples in another order, or pick some of them, as their values have it."""

GETITEM = Tensor.__getitem__


def _picks(args: Any) -> bool:
    """Test that an index picks from the first axis by a tensor."""
    index = args[1] if len(args) > 1 else None
    first = index[0] if isinstance(index, tuple) and index else index
    return isinstance(first, Tensor) and first.dim() > 0


def tensors_of(tree: Any) -> list[Tensor]:
    """Tensors in nested tuples, lists and dicts; every call of a pass comes by here, so it is not a generator."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    found: list[Tensor] = []
    for node in tree:
        if isinstance(node, Tensor):
            found.append(node)
        elif isinstance(node, (tuple, list, dict)):
            found += tensors_of(node)
    return found


def _bound(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by the names that the function's rule gives them."""
    rule = RULES.get(function)
    return {} if rule is None else {**dict(zip(_arguments(rule), args, strict=False)), **kwargs}


@cache
def _arguments(rule: Rule) -> tuple[str, ...]:
    """Names of the arguments that a rule takes from the call."""
    return tuple(inspect.signature(rule).parameters)[1:]


def overwritten(read: Iterable[tuple[Tensor, int]]) -> bool:
    """Test that some tensor was written on since its version was noted."""
    return any(leaf._version != version for leaf, version in read)


@cache
def _name(function: Any) -> str:
    return resolve_name(function) or getattr(function, "__name__", str(function))


def _at(module: nn.Module, parameters: dict[str, Any], gradient: Gradient) -> Gradient:
    """A rule's function, with the module's parameters as they are in the pass."""

    def evaluated(signal: Tensor) -> Factor:
        live = dict(module._parameters)
        module._parameters.update(parameters)
        try:
            return gradient(signal)
        finally:
            module._parameters.update(live)

    return evaluated


@contextmanager
def module_rules(module: nn.Module, tracer: ParameterTracer) -> Iterator[None]:
    """Let the modules whose class has a rule of its own be one call each."""
    patched = [child for child in module.modules() if type(child) in RULES and "forward" not in vars(child)]
    for child in patched:
        rule = RULES[type(child)]
        child.forward = lambda *inputs, m=child, r=rule: tracer.module_call(m, r, inputs)
    try:
        yield
    finally:
        for child in patched:
            del child.forward


def local_gradients(
    function: Any,
    leaves: list[Any],
    tree: Any,
    place: int,
    tracer: ParameterTracer,
    call: int,
    signal: Tensor,
) -> Dense:
    """Gradients of one argument of a function, (n, K, size), by its derivative at each sample.

    The function is called with one sample at a time that keeps its sample axis; parameters that were expanded over
    the samples before are treated alike.
    """
    arrangement, n = tracer.arrangement(call), tracer.n
    axis = arrangement.axis
    if arrangement.merged:
        raise NoRule

    def batched(leaf: int) -> bool:
        handle = tracer.handle(leaves[leaf])
        # A parameter that was repeated for every sample is that sample's own.
        places = handle.moved if isinstance(handle, View) else None
        own = handle is None or (places is not None and places.stride(axis) == 0 and n > 1)
        return leaf in arrangement.batched and own

    tensors = [i for i in range(len(leaves)) if i != place and batched(i)]
    repeated = batched(place)

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
