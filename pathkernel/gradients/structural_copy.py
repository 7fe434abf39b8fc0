"""A module's structure without its numbers, into which parameters are passed: the user's module is never run.

Passes of the library run with other weights, in another mode, with hooks of their own. Done on the module at hand
(`torch.func.functional_call` swaps its parameters for the time of a pass), two threads would see each other's
weights, a module that is registered under two names would get tensors back in place of its Parameters, and what a
network counts in its attributes would go on counting. So a pass runs on a copy that shares no mutable state with the
module: new module objects, parameters and buffers filled in for each pass, attributes copied.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pathkernel.errors import UnsupportedModelError
from pathkernel.gradients.own_autocast import without_autocast

LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event, threading.local)
"""Objects that have no copies and hold nothing that a pass depends on."""

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


class StructuralCopy:
    """A copy of a module whose parameters and buffers are filled in for each pass.

    Parameters
    ----------
    module
        Any module; it is read, never run or changed.

    Attributes
    ----------
    module
        The copy. Its `torch.nn.Embedding` layers give dense gradients.
    buffers
        Names of the buffers.
    written
        Those that the network writes to in evaluation mode, too; None until a pass has been made.
    writes_inputs
        Whether the network changes its inputs in place; None until a pass has been made.

    Raises
    ------
    UnsupportedModelError
        Naming a module or an attribute that cannot be copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self._reference = weakref.ref(module)
        self._originals = dict(_named_tensors(module))  # an identity is only good for as long as its tensor lives
        self.names = {id(value): name for name, value in self._originals.items()}
        copier = _Copier(self.names)
        self.module = copier.module(module, "")
        self.buffers = tuple(name for name, _ in module.named_buffers())
        self.written: tuple[str, ...] | None = None
        self.writes_inputs: bool | None = None
        self._slots = list(_slots(self.module, self.names, set()))
        for child in self.module.modules():
            if isinstance(child, (nn.Embedding, nn.EmbeddingBag)):
                child.sparse = False
        self.clear()

    @property
    def original(self) -> nn.Module | None:
        """The module that was copied, None where nobody holds it any more."""
        return self._reference()

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Put tensors where the parameters and buffers of these names are used, under every name they have."""
        for holder, key, name in self._slots:
            value = values.get(name)
            if value is not None:
                holder[key] = value

    def clear(self) -> None:
        """Let go of what was filled in."""
        nothing = torch.empty(0)
        for holder, key, _ in self._slots:
            holder[key] = nothing

    def read_live(self, run: Callable[[], Any]) -> list[str]:
        """Names of parameters and buffers of the original that a pass on the copy reads: a copy must not."""
        watch = _LiveReads(self.names)
        with watch:
            run()
        return watch.found


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


class _Copier:
    """Copies modules and their attributes; `copy.deepcopy`'s memo tells what stands for what."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self.memo: dict[int, Any] = {}
        self._kept: list[Any] = []  # an identity is only good for as long as its object lives
        self._place = ""

    def module(self, module: nn.Module, name: str) -> nn.Module:
        """A copy of a module and of those below it."""
        if id(module) in self.memo:
            return self.memo[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"The module {name or 'itself'!r} is scripted",
                "Kernels need the gradients of single samples, for which a module is run on copies of its structure; a "
                "scripted one has none",
                "Pass the module that was scripted, before `torch.jit.script`",
            )
        kind = type(module)
        found = kind.__new__(kind)
        self._remember(module, found)
        state = _state_of(module)
        if (inside := without_autocast(module)) is not None:  # passes enter the autocast that is on record
            state["forward"] = inside
        attributes = vars(found)
        children = state.pop("_modules")
        attributes["_modules"] = type(children)()
        for key, child in children.items():
            own = f"{name}.{key}" if name else key
            attributes["_modules"][key] = child if child is None else self.module(child, own)
        for key, value in state.items():
            self._place = f"{name}.{key}" if name else key
            hooks = {i: hook for i, hook in value.items() if not _of_training(hook)} if key in _HOOKS else None
            attributes[key] = self.value(value) if hooks is None else type(value)(self.value(hooks))
        if isinstance(module, nn.RNNBase):  # which refers to its own parameters beside them
            attributes["_flat_weight_refs"] = [
                None if weight is None else weakref.ref(weight) for weight in attributes["_flat_weights"]
            ]
        elif kind.__setstate__ is not nn.Module.__setstate__:
            found.__setstate__(attributes)
        return found

    def value(self, value: Any) -> Any:
        """A copy of an attribute."""
        self._prepare(value, set())
        try:
            return copy.deepcopy(value, self.memo)
        except Exception as error:
            raise UnsupportedModelError(
                f"The attribute `{self._place}` of the model ({type(value).__name__}) cannot be copied: {error}",
                "Passes run on a copy of the module, so that the module itself stays as it is",
                "Keep it outside of the module; or, if no forward pass changes it, give its class a method "
                "`__deepcopy__` that returns the object itself",
            ) from error

    def _remember(self, original: Any, found: Any) -> None:
        self.memo[id(original)] = found
        self._kept.append(original)

    def _prepare(self, value: Any, seen: set[int]) -> None:
        """Decide what `copy.deepcopy` does not do, or not as it is needed here."""
        if id(value) in seen or id(value) in self.memo:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            known = id(value) in self.names
            self._remember(value, value if known else value.detach().clone().requires_grad_(value.requires_grad))
        elif isinstance(value, nn.Module):  # one that is not registered
            self.module(value, self._place)
        elif isinstance(value, torch.Generator):
            self._remember(value, value.clone_state())
        elif isinstance(value, (types.ModuleType, *LOCKS)):
            self._remember(value, value)
        elif isinstance(value, types.FunctionType):
            self._function(value, seen)
        elif isinstance(value, types.MethodType):
            self._prepare(value.__self__, seen)
            self._function(value.__func__, seen)
        elif isinstance(value, functools.partial):
            self._prepare((value.func, value.args, value.keywords), seen)
        elif isinstance(value, Mapping):
            for part in value.values():
                self._prepare(part, seen)
        elif isinstance(value, (list, tuple, set, frozenset)):
            for part in value:
                self._prepare(part, seen)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            self._prepare(vars(value), seen)

    def _function(self, function: Any, seen: set[int]) -> None:
        """A function that closes over modules or parameters closes over their copies."""
        if not isinstance(function, types.FunctionType) or id(function) in self.memo:
            return
        cells, defaults = function.__closure__ or (), function.__defaults__ or ()
        named = function.__kwdefaults__ or {}
        if not any(self._concerns(value) for value in (*map(_content, cells), *defaults, *named.values())):
            return
        # Cells are filled after the function is known by its copy: it may refer to itself.
        closure = tuple(types.CellType() if self._concerns(_content(cell)) else cell for cell in cells)
        copied = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
        self._remember(function, copied)
        for cell, own in zip(cells, closure, strict=True):
            if own is not cell:
                own.cell_contents = self._again(_content(cell), seen)
        copied.__defaults__ = tuple(self._again(value, seen) for value in defaults) or None
        copied.__kwdefaults__ = {key: self._again(value, seen) for key, value in named.items()} or None
        vars(copied).update(vars(function))

    def _again(self, value: Any, seen: set[int]) -> Any:
        if not self._concerns(value):
            return value
        self._prepare(value, seen)
        return copy.deepcopy(value, self.memo)

    def _concerns(self, value: Any) -> bool:
        """Test that something is, or holds, a module or one of the parameters."""
        if isinstance(value, nn.Module) or id(value) in self.names or id(value) in self.memo:
            return True
        if isinstance(value, types.MethodType):
            return self._concerns(value.__self__)
        if isinstance(value, (list, tuple)):
            return any(self._concerns(part) for part in value)
        return isinstance(value, dict) and any(self._concerns(part) for part in value.values())


def _state_of(module: nn.Module) -> dict[str, Any]:
    """Attributes that a module's class says are copied (a Lightning module leaves its trainer out); else all."""
    try:
        state = module.__getstate__()
    except RuntimeError:  # parametrised modules refuse
        state = None
    return dict(state if isinstance(state, dict) else vars(module))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _of_training(hook: Any) -> bool:
    """Test that a hook belongs to a recorder, which watches the module and none of its copies."""
    return getattr(getattr(hook, "hook", hook), "of_training", False) is True  # torch wraps those on `load_state_dict`


Slot = tuple[Any, Any, str]
"""A dict or list, the key or place in it, and the name of the tensor that belongs there."""


def _slots(value: Any, names: Mapping[int, str], seen: set[int]) -> Iterator[Slot]:
    """Places of the tensors of these identities in modules, and in the lists and dicts that these hold."""
    if id(value) in seen:
        return
    seen.add(id(value))
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(value, nn.Module):
        yield from _slots(vars(value), names, seen)
        return
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, (list, tuple)):
        pairs = list(enumerate(value))
    else:
        return
    for key, part in pairs:
        if isinstance(part, Tensor):
            if id(part) in names and not isinstance(value, tuple):
                yield value, key, names[id(part)]
        else:
            yield from _slots(part, names, seen)


class _LiveReads(TorchFunctionMode):
    """Sees which tensors of the original module torch functions are called with."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.found = names, []  # type: tuple[Mapping[int, str], list[str]]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in _tensors((args, kwargs or {})):
            name = self.names.get(id(value))
            if name is not None and name not in self.found:
                self.found.append(name)
        return function(*args, **(kwargs or {}))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _tensors(part)
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)
