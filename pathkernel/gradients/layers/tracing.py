"""Calls of a forward pass that have parameters among their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from pathkernel.gradients.layers.batch_axis import NO_ROLES, Arrangement, Place, Roles, SamplesFirst
from pathkernel.gradients.layers.einsum import einsum as einsum
from pathkernel.gradients.layers.factors import Dense, Factor
from pathkernel.gradients.layers.functions import (
    GETITEM,
    IN_PLACE,
    REARRANGING,
    SETITEM,
    draws,
    filled,
    mask_of,
    picks,
    tensors_of,
)
from pathkernel.gradients.layers.local import local_gradients
from pathkernel.gradients.layers.packed import Packs
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
    place
        Which call of the pass.
    """

    function: str
    output: Tensor
    handles: dict[str, Handle]
    gradients: Mapping[str, Gradient]
    arrangement: Arrangement = field(default_factory=Arrangement)
    arguments: tuple[torch.Size | None, ...] = ()
    place: Place = ()

    def names(self) -> set[str]:
        """The parameters."""
        return set().union(*(handle.names() for handle in self.handles.values()))

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
    roles
        Results that are of samples or of none otherwise than their arguments tell.

    Attributes
    ----------
    calls
        In the order of the pass.
    outputs
        Number of each call by the identity of the tensor that the network went on with, and that tensor's version.
    unsupported
        Parameters that went into something that no rule covers, and into what.
    rearranges
        Whether a function was called that may put samples in another order, as those of the batch at hand have it.
    composed
        Shapes of the results that were taken for functions of parameters alone.
    read
        What each call read, how often it had been written on, and the call's number.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        n: int,
        arrangement: Callable[[int], Arrangement],
        fixed: Iterable[Tensor] = (),
        roles: Roles = NO_ROLES,
    ) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, Handle]] = {}
        self.fixed = {id(value) for value in fixed}
        self.n, self.arrangement, self.roles = n, arrangement, roles
        self.calls: list[LayerCall] = []
        self.outputs: dict[int, tuple[int, int]] = {}
        self.unsupported: dict[str, str] = {}
        self.rearranges = False
        self.composed: dict[Place, tuple[torch.Size, ...]] = {}
        self.read: list[tuple[Tensor, int, int]] = []
        self._place = [0]
        self._begun = False
        self._open: list[Any] = []
        self.packs = Packs()
        self._kept: list[Tensor] = []  # an identity is only good for as long as its tensor lives
        for name, value in parameters.items():
            self.known[id(value)] = (value, View(name, value.shape))

    def begin(self) -> None:
        """Count calls from here on, where the network begins: what comes before depends on what is known of it."""
        if not self._begun:
            self._place, self._begun = [0], True

    def handle(self, value: Any) -> Handle | None:
        """Handle of a tensor made of parameters alone; None of others."""
        known = self.known.get(id(value)) if isinstance(value, Tensor) else None
        return known[1] if known is not None else None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._place[-1] += 1
        tensors = [*tensors_of(args), *tensors_of(kwargs)] if kwargs else tensors_of(args)
        leaves = [leaf for leaf in tensors if id(leaf) in self.known]
        # What an index picks from a parameter are rows of a table, as an embedding's are.
        picked = function is GETITEM and picks(args) and self.handle(args[0]) is None
        self.rearranges |= function in REARRANGING or picked
        if not leaves or not torch.is_grad_enabled():
            result = REPLACEMENTS.get(function, function)(*args, **kwargs)
            self.packs.note(function, args, result)
            return result
        others = [leaf for leaf in tensors if id(leaf) not in self.known]
        if function in VIEWS and not others and len(leaves) == 1 and isinstance(self.handle(args[0]), View):
            result = function(*args, **kwargs)
            self._register_view(result, function, args, kwargs)
            return result
        closed = function in RULES or function in self._open
        body = None if closed else self.packs.unrolled(function, args) or decomposed(function)
        if body is not None:
            # A function that cannot be decomposed in this call (packed sequences) is one operation after all.
            self._place.append(0)
            self._open.append(function)  # some methods of tensors call themselves by another name
            try:
                with self:
                    return body(*args, **kwargs)
            except NoRule:
                self._leave_out((args, kwargs), f"{resolve_name(function)} has no rule for this call")
                return function(*args, **kwargs)
            finally:
                self._place.pop()
                self._open.pop()
        return self._used(function, args, kwargs, others)

    @property
    def place(self) -> Place:
        """Number of the call at hand."""
        return tuple(self._place)

    def _register_view(self, result: Any, function: Any, args: Any, kwargs: Any) -> None:
        view, others = self.handle(args[0]), (args[1:], kwargs)
        assert isinstance(view, View)
        # Indices that pick entries lie where the parameter does.
        others = pytree.tree_map(lambda own: own.cpu() if isinstance(own, Tensor) else own, others)
        self._register(result, view.viewed(function, *others[0], **others[1]), view)

    def _register(self, result: Any, places: Any, view: View) -> None:
        if isinstance(result, Tensor):
            self.known[id(result)] = (result, view.at(places))
        else:
            for part, own in zip(result, places, strict=True):
                self._register(part, own, view)

    def _used(self, function: Any, args: Any, kwargs: Any, others: list[Tensor]) -> Any:
        if function in IN_PLACE and self.handle(args[0]) is None and not kwargs:
            return self._written(function, args)
        before = [(leaf, leaf._version) for leaf in others]
        result = function(*args, **kwargs)
        if not any(leaf.is_floating_point() or leaf.is_complex() for leaf in tensors_of(result)):
            return result  # a shape, a type
        place, of_samples = self.place, any(id(leaf) not in self.fixed for leaf in others)
        if place in self.roles.shared or (not of_samples and place not in self.roles.spread):
            return self._composed(function, args, kwargs, result)
        if not isinstance(result, Tensor) or any(leaf is result or leaf._version != v for leaf, v in before):
            self._leave_out((args, kwargs), f"changed or returned together with others by {_name(function)}")
            return result
        handles, gradients, arguments = self._gradients(function, args, kwargs, result)
        self.read += [(leaf, version, len(self.calls)) for leaf, version in before]
        return self.note(_name(function), result, handles, gradients, arguments)

    def _written(self, function: Any, args: Any) -> Any:
        """A parameter's part in a function that writes on its first argument, and the writing, one after the other."""
        if function is SETITEM:
            target, index, value = args
            picked = mask_of(index, target, value)
            if picked is None:
                before = target[index].clone()
                target[index] = self._used(filled, (before, value), {}, [before])
            else:
                before = target.clone()
                target.copy_(self._used(torch.where, (picked, value, before), {}, [picked, before]))
            return None
        # What a layer read before is a copy.
        before = args[0].clone()
        found = self._used(IN_PLACE[function], (before, *args[1:]), {}, [before])
        written = args[0].copy_(found)
        handle = self.handle(found)
        if handle is not None:  # of parameters alone
            self.known[id(written)] = (written, handle)
        return written

    def _gradients(
        self, function: Any, args: Any, kwargs: Any, result: Tensor
    ) -> tuple[dict[str, Handle], dict[str, Gradient], tuple[torch.Size | None, ...]]:
        """Arguments that are made of parameters, and their gradients.

        By a rule, by what is the same for all samples, or by the function's own derivative.
        """
        bound, gradients = self._by_rule(function, args, kwargs)
        handles = {key: handle for key, value in bound.items() if (handle := self.handle(value)) is not None}
        own = {key: gradients[key] for key in handles if key in gradients}
        if own.keys() == handles.keys() and own:
            return handles, own, ()
        if not own and self.place in self.roles.spread:
            return self._one_for_all(function, args, kwargs, result)
        more, local = self._local(function, args, kwargs, {id(bound[key]) for key in own})
        return {**{key: handles[key] for key in own}, **more}, {**own, **local}, _shapes(args, kwargs)

    def _by_rule(self, function: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], Mapping[str, Gradient]]:
        """Arguments by the names that a rule gives them, and its gradients; nothing where it covers no such call."""
        if function not in RULES:
            return {}, {}
        try:
            bound = {**dict(zip(_arguments(RULES[function]), args, strict=False)), **kwargs}
            return bound, RULES[function](self._samples(), **self._detached(bound))
        except (NoRule, TypeError):
            return {}, {}

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
        arrangement = self.arrangement(len(self.calls))
        self.calls.append(LayerCall(name, result, handles, gradients, arrangement, arguments, self.place))
        copy = result.clone()
        self.outputs[id(copy)] = len(self.calls) - 1, copy._version
        self._kept.append(copy)
        return copy

    def _detached(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments as a rule reads them: the graph stays out of it."""
        return {
            key: value.detach() if isinstance(value, Tensor) and self.handle(value) is None else value
            for key, value in arguments.items()
        }

    def module_call(self, module: nn.Module, rule: Rule, inputs: tuple[Any, ...]) -> Any:
        """Run a module whose class has a rule of its own as one call."""
        self._place[-1] += 1
        own = {name: self.handle(value) for name, value in module._parameters.items() if value is not None}
        handles = {name: handle for name, handle in own.items() if handle is not None}
        with torch._C.DisableTorchFunction():
            result = type(module).forward(module, *inputs)
        gradients = rule(self._samples(), module, *(i.detach() if isinstance(i, Tensor) else i for i in inputs))
        if not isinstance(result, Tensor) or not handles.keys() <= gradients.keys():
            for handle in handles.values():
                self.unsupported |= dict.fromkeys(handle.names(), f"the rule of {type(module).__name__} leaves it out")
            return result
        self.read += [(leaf, leaf._version, len(self.calls)) for leaf in tensors_of(inputs)]
        within = {key: _at(module, dict(module._parameters), gradient) for key, gradient in gradients.items()}
        return self.note(type(module).__name__, result, handles, within)

    def _samples(self) -> SamplesFirst:
        return SamplesFirst(self.arrangement(len(self.calls)), self.n)

    def _local(
        self, function: Any, args: Any, kwargs: Any, covered: Container[int]
    ) -> tuple[dict[str, Handle], dict[str, Gradient]]:
        """The rule of a function that has none: its own derivative, sample by sample."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        arrangement = self.arrangement(len(self.calls))
        handles: dict[str, Handle] = {}
        gradients: dict[str, Gradient] = {}
        own: set[int] = set()
        for i in arrangement.batched:
            handle = self.handle(leaves[i])
            # A parameter that was repeated for every sample is that sample's own, and one of its parts stands for all.
            if handle is None or (isinstance(handle, View) and handle.repeated(arrangement.axis)):
                own.add(i)
        for i, leaf in enumerate(leaves):
            handle = self.handle(leaf)
            if handle is None or id(leaf) in covered:
                continue
            if i in own:
                assert isinstance(handle, View)
                handle = handle.at(handle.places.narrow(arrangement.axis, 0, 1))
            handles[str(i)] = handle
            gradients[str(i)] = partial(local_gradients, function, leaves, tree, i, own, arrangement, self.n)
        return handles, gradients

    def _one_for_all(
        self, function: Any, args: Any, kwargs: Any, result: Tensor
    ) -> tuple[dict[str, Handle], dict[str, Gradient], tuple[torch.Size | None, ...]]:
        """A function of parameters alone that has the same result for every sample: that of one is theirs."""
        arrangement = self.arrangement(len(self.calls))
        axis = min(arrangement.axis, result.dim() - 1)
        whole = self._composition(function, args, kwargs, result.shape)
        one = replace(
            whole,
            function=lambda *values: whole.function(*values).narrow(axis, 0, 1),
            shape=torch.Size((*result.shape[:axis], 1, *result.shape[axis + 1 :])),
        )
        same = bool((result == result.narrow(axis, 0, 1)).all())

        def gradient(signal: Tensor) -> Dense:
            if arrangement.merged or not same:
                raise NoRule
            return Dense(signal.flatten(2))

        return {"result": one}, {"result": gradient}, ()

    def _composed(self, function: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Register a result that depends on parameters and on what is the same for all samples."""
        if draws(function, args):
            self._leave_out((args, kwargs), f"{_name(function)} draws random numbers for parameters")
            return result
        parts = tensors_of(result)
        self.composed[self.place] = tuple(part.shape for part in parts)
        alone = not any(id(leaf) in self.known for leaf in tensors_of((args[1:], kwargs)))
        if function in VIEWS and isinstance(self.handle(args[0]), View) and alone:
            self._register_view(result, function, args, kwargs)
            return result
        if isinstance(result, Tensor):
            bound, gradients = self._by_shared_rule(function, args, kwargs)
            composed = self._composition(function, args, kwargs, result.shape)
            rules = {
                i: gradients[key]
                for i, own in enumerate(composed.arguments)
                for key, value in bound.items()
                if value is own and key in gradients
            }
            self.known[id(result)] = (result, replace(composed, rules=rules))
            return result
        if not isinstance(result, (tuple, list)) or len(parts) != len(result):
            self._leave_out((args, kwargs), f"{resolve_name(function)} of parameters alone")
            return result
        for i, part in enumerate(result):
            pick = lambda *a, i=i, **k: function(*a, **k)[i]  # noqa: E731
            self.known[id(part)] = (part, self._composition(pick, args, kwargs, part.shape))
        return result

    def _by_shared_rule(self, function: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], Mapping[str, Gradient]]:
        """The answer of a rule where all samples have the same arguments."""
        if function not in FOR_SHARED:
            return {}, {}
        bound, n = {**dict(zip(_arguments(RULES[function]), args, strict=False)), **kwargs}, self.n
        try:  # a rule that knew the tracer would keep the whole pass until the garbage collector runs
            repeat = lambda tensor: tensor.expand(n, *tensor.shape)  # noqa: E731
            return bound, RULES[function](repeat, **self._detached(bound))
        except (NoRule, TypeError):
            return {}, {}

    def _composition(self, function: Any, args: Any, kwargs: Any, shape: torch.Size) -> Composed:
        """A result as a function of those of its arguments that are made of parameters."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        own = [i for i, leaf in enumerate(leaves) if self.handle(leaf) is not None]
        values = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def of_parameters(*given: Tensor) -> Tensor:
            filled = list(values)
            for place, value in zip(own, given, strict=True):
                filled[place] = value
            new_args, new_kwargs = pytree.tree_unflatten(filled, tree)
            found: Tensor = function(*new_args, **new_kwargs)
            return found

        sources = tuple(handle for i in own if (handle := self.handle(leaves[i])) is not None)
        return Composed(of_parameters, tuple(leaves[i] for i in own), sources, shape)

    def _leave_out(self, arguments: Any, reason: str) -> None:
        for leaf in tensors_of(arguments):
            handle = self.handle(leaf)
            for name in handle.names() if handle is not None else ():
                self.unsupported[name] = reason


FOR_SHARED = frozenset({F.linear, F.embedding, torch.matmul, Tensor.matmul, Tensor.__matmul__})
"""Functions whose rules bring all that they read to the front by ``samples``, so that it may be the same for all."""


def _shapes(args: Any, kwargs: Any) -> tuple[torch.Size | None, ...]:
    return tuple(leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves((args, kwargs)))


@cache
def _arguments(rule: Rule) -> tuple[str, ...]:
    """Names of the arguments that a rule takes from the call."""
    return tuple(inspect.signature(rule).parameters)[1:]


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
