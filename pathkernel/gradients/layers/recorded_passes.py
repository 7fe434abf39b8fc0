r"""Operations of a pass and of its signals, noted once and repeated at other points.

What Python does in a pass (modules, functions that are watched, autograd's graph) is the same at every θ. Noted is what
arrives at torch's kernels: the network's operations, those of :math:`\delta = \partial h / \partial z` on its way back,
and those of the rules. Repeated on other θ and samples they round as a tape does, since they are the very same.

Nothing of it is believed before it is compared with tapes of other samples (`ProvedStacks`), nor unless no value can
have chosen the operations: neither read (`pathkernel.gradients.layers.hidden_values`) nor told by a shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.arguments import same_arguments
from pathkernel.gradients.forward_state import QUIET_FALLBACKS
from pathkernel.gradients.layers.batch_axis import Arrangement, Roles
from pathkernel.gradients.layers.factors import Piece
from pathkernel.gradients.layers.hidden_values import HiddenValues, hidden
from pathkernel.gradients.layers.rules import NoRule
from pathkernel.gradients.layers.stacked_pieces import StackedPieces
from pathkernel.gradients.layers.tape import Tape
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import count
from pathkernel.runtime.interrupts import deliver_interrupt
from pathkernel.runtime.precision import EXACT_PRODUCTS

ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
"""Operations that return what they were given: below autograd there is nothing to be done."""

CLONE = torch.ops.aten.clone.default


class _Call(NamedTuple):
    """One operation as it was called, and all that it returned."""

    operation: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    returned: tuple[Any, ...]


class _Listener(TorchDispatchMode):
    """Notes all operations; of tensors that it has seen the identities stay theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.calls.append(_Call(func, args, kwargs or {}, tuple(pytree.tree_leaves(found))))
        return found


class _PulledBack(Tape):
    """A tape that is met with cotangents of its outputs."""

    def pulled_back(self, cotangents: Sequence[Float[Tensor, "n C"]]) -> list[Piece]:
        """Gradients of Σ_c λ_c z_c of each sample, for each λ."""
        outputs = [call.output for call in self.calls]
        columns = [
            torch.autograd.grad(self.outputs, outputs, own, retain_graph=True, allow_unused=True) for own in cotangents
        ]
        signals: list[Tensor | None] = []
        for call, *parts in zip(self.calls, *columns, strict=True):
            found = [part for part in parts if part is not None]
            if not found:
                signals.append(None)
                continue
            whole = [torch.zeros_like(found[0]) if part is None else part for part in parts]
            fronted = [call.arrangement.front(part, self.n) for part in whole]
            signals.append(torch.stack(fronted, dim=1) if len(fronted) > 1 else fronted[0].unsqueeze(1))
        with self.function.without_graph(), QUIET_FALLBACKS:
            return self.pieces_of_signals(signals)


@dataclass(frozen=True)
class _Operation:
    """An operation on registers.

    Attributes
    ----------
    function
        The kernel's entry.
    arguments, named
        As it was called; None in the place of each tensor. Where tensors lie deeper, the leaves of both.
    tensors
        Places among the arguments, and the register of each.
    returned
        Register of each result.
    tree
        What the leaves are leaves of.
    last
        Registers that nobody reads afterwards.
    shapes
        Of the results, where they may depend on the numbers that the operation is given: what Python makes of another
        one is not on record.
    """

    function: Any
    arguments: list[Any]
    named: dict[str, Any]
    tensors: tuple[tuple[int, int], ...]
    returned: tuple[int, ...]
    tree: Any = None
    last: tuple[int, ...] = ()
    shapes: tuple[torch.Size, ...] | None = None

    @property
    def kept(self) -> bool:
        """Whether it does something beside what it returns: it writes, or its shape tells what was picked."""
        return self.function._schema.is_mutable or torch.Tag.dynamic_output_shape in self.function.tags

    def run(self, registers: list[Any]) -> None:
        """Do it."""
        arguments = self.arguments.copy()
        for place, register in self.tensors:
            arguments[place] = registers[register]
        if self.tree is None:
            found = self.function(*arguments, **self.named)
        else:
            own, named = pytree.tree_unflatten(arguments, self.tree)
            found = self.function(*own, **named)
        if len(self.returned) == 1 and isinstance(found, Tensor):
            registers[self.returned[0]] = found
        else:
            for register, own in zip(self.returned, pytree.tree_leaves(found), strict=True):
                registers[register] = own
        if self.shapes is not None and self.shapes != _shapes(found):
            raise NoRule("a pass whose shapes depend on its values")
        for register in self.last:
            registers[register] = None


def _shapes(tree: Any) -> tuple[torch.Size, ...]:
    return tuple(leaf.shape for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


class _Registers:
    """Numbers of tensors, by their identity."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.values: list[Tensor | None] = []
        self.fixed: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._memory: set[int] = set()
        self._held: list[Tensor] = []  # identities, and memory, are theirs while they live
        for tensor in given:
            self.of_result(tensor)
        self._given = frozenset(self._memory)

    def of_result(self, tensor: Tensor, alias: int | None = None) -> int:
        """Register of what an operation returned: its argument's where it returned that."""
        self._held.append(tensor)
        self._memory.add(tensor.untyped_storage()._cdata)
        if id(tensor) not in self._numbers:
            if alias is None:
                alias = len(self.values)
                self.values.append(None)
            self._numbers[id(tensor)] = alias
        return self._numbers[id(tensor)]

    def unused(self) -> int:
        """Register of a result that is left out."""
        self.values.append(None)
        return len(self.values) - 1

    def of_argument(self, tensor: Tensor) -> int:
        """Register of what an operation is given; what no operation has made is fixed."""
        if id(tensor) in self._numbers:
            return self._numbers[id(tensor)]
        if tensor.untyped_storage()._cdata in self._memory:
            raise NoRule("a tensor that shares memory with one of the pass, made in another way")
        self._numbers[id(tensor)] = len(self.values)
        self.values.append(tensor)
        self.fixed.append(tensor)
        return self._numbers[id(tensor)]

    def check_written(self, tensor: Any) -> None:
        """Refuse operations that write on what is not the pass's own."""
        memory = tensor.untyped_storage()._cdata if isinstance(tensor, Tensor) else None
        if memory in self._given or memory not in self._memory:
            raise NoRule("a pass that writes on what it was given")


def _noted(calls: Iterable[_Call], registers: _Registers, writes: bool) -> list[_Operation]:
    """Operations of a pass; without those that do nothing, where nothing is written on in place."""
    found = []
    for call in calls:
        schema = call.operation._schema
        if torch.Tag.nondeterministic_seeded in call.operation.tags:
            raise NoRule("a pass that draws random numbers")
        if not all(own is None or isinstance(own, Tensor) for own in call.returned):
            raise NoRule("a pass that looks at its values")
        given = [own for own in call.arguments if isinstance(own, Tensor)]
        if len(given) == len(call.arguments) == len(call.returned) == 1:
            same = call.operation in ALIASES
            copied = call.operation is CLONE and not writes and given[0].stride() == call.returned[0].stride()
            if same or copied:
                registers.of_result(call.returned[0], registers.of_argument(given[0]))
                continue
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                named = call.named.get(argument.name)
                registers.check_written(call.arguments[place] if place < len(call.arguments) else named)
        leaves, tree = pytree.tree_flatten((call.arguments, call.named))
        deep = sum(isinstance(leaf, Tensor) for leaf in leaves) > len(given)
        own = leaves if deep else list(call.arguments)
        tensors = tuple((i, registers.of_argument(leaf)) for i, leaf in enumerate(own) if isinstance(leaf, Tensor))
        template = [None if isinstance(leaf, Tensor) else leaf for leaf in own]
        returned = tuple(registers.unused() if own is None else registers.of_result(own) for own in call.returned)
        # Indices, masks, lengths: of whole numbers, not all operations whose results have other shapes are tagged.
        whole = any(isinstance(leaf, Tensor) and not leaf.is_floating_point() for leaf in leaves)
        varies = whole or torch.Tag.dynamic_output_shape in call.operation.tags
        shapes = _shapes(call.returned) if varies else None
        form = tree if deep else None
        found.append(_Operation(call.operation, template, call.named, tensors, returned, form, shapes=shapes))
    return found


def _needed(operations: Sequence[_Operation], wanted: set[int], frees: set[int]) -> tuple[_Operation, ...]:
    """Operations that lead to some registers, each of which lets go what is not needed later.

    ``wanted`` becomes what they read; ``frees`` are registers that may be let go.
    """
    found, later = [], set(wanted)
    for operation in reversed(operations):
        if not operation.kept and wanted.isdisjoint(operation.returned):
            continue
        read = {register for _, register in operation.tensors}
        last = (read | set(operation.returned)) - later
        found.append(replace(operation, last=tuple(sorted(last & frees))))
        later |= read | set(operation.returned)
        wanted |= read
    return tuple(reversed(found))


def _drawn(components: int, outputs: Tensor) -> list[Tensor]:
    """Random cotangents of a pass's outputs."""
    generator = torch.Generator().manual_seed(components)
    drawn = torch.randn(components, *outputs.shape, generator=generator, dtype=torch.float64)
    return [own.clone() for own in drawn.to(outputs.dtype)]


def _check_unseen(components: int, function: ModelFunction, theta: Tensor, inputs: PyTree, *known: Any) -> None:
    """Run a pass whose numbers cannot be read; raise what is raised where somebody tries."""
    with HiddenValues():
        tape = _PulledBack(function, hidden(theta), hidden(inputs), *known)
        tape.pulled_back(hidden(_drawn(components, tape.outputs)))


class Program:
    """Operations of one pass and of the gradients of K functions of its outputs.

    Parameters
    ----------
    function
        The network.
    theta, inputs
        θ and n samples on which the pass is noted.
    arrangements, roles
        As of a tape.
    components
        K.

    Raises
    ------
    NoRule
        Where a pass draws random numbers, looks at its values, or writes on what it was given; and what tapes raise,
        and torch where somebody reads the memory of `hidden` values.
    """

    def __init__(
        self,
        function: ModelFunction,
        theta: Float[Tensor, " P"],
        inputs: PyTree,
        arrangements: Sequence[Arrangement],
        roles: Roles,
        components: int,
    ) -> None:
        theta, inputs = function.cast(theta).clone(), pytree.tree_map(torch.clone, function.cast(inputs))
        given = [theta, *pytree.tree_leaves(inputs)]
        known: tuple[Any, ...] = arrangements, {}, None, roles
        # First, so that neither pass is there beside the other.
        _check_unseen(components, function, theta, inputs, *known)
        forward, backward = _Listener(), _Listener()
        with forward:
            tape = _PulledBack(function, theta, inputs, *known)
        cotangents = _drawn(components, tape.outputs)
        with backward:
            pieces = tape.pulled_back(cotangents)
        # Without their numbers: activations of all samples would stay for as long as the machine.
        bare = lambda own: own.new_empty(()).expand(own.shape)  # noqa: E731
        self.forms = [replace(piece, factor=piece.factor.map(bare)) for piece in pieces]
        self.n, self.samples = tape.n, len(given) - 1
        self._function = function
        registers = _Registers([*given, *cotangents])
        calls = [*forward.calls, *backward.calls]
        writes = any(call.operation._schema.is_mutable for call in calls)
        before, after = (_noted(own.calls, registers, writes) for own in (forward, backward))
        # θ is cut into its parameters for all points at once.
        self._parameters = [registers.of_argument(own) for own in tape.parameters.values()]
        before = [own for own in before if not set(own.returned) <= set(self._parameters)]
        self._outputs = registers.of_argument(tape.outputs)
        self._pieces = [[registers.of_argument(own) for own in piece.factor.tensors] for piece in pieces]
        self._registers, fixed = registers.values, registers.fixed
        self._fixed = [(own, own._version) for own in fixed]
        returned = {register for own in self._pieces for register in own}
        made = {register for operation in (*before, *after) for register in operation.returned}
        made |= set(self._parameters)
        wanted = set(returned)
        self._backward = _needed(after, wanted, made - returned)
        held = wanted | {self._outputs}
        self._forward = _needed(before, set(held), made - held)
        self._values = _needed(before, {self._outputs}, made - {self._outputs})

    def holds(self, function: ModelFunction) -> bool:
        """True where passes of a function are those that were noted: no constant is another one now."""
        ours, theirs = self._function, function
        return (
            len(ours.constants) == len(theirs.constants)
            and all(own is theirs.constants.get(name) for name, own in ours.constants.items())
            and all(own._version == version for own, version in self._fixed)
            and same_arguments(ours.state.arguments, theirs.state.arguments)
        )

    def values(self, parameters: Sequence[Tensor], samples: Sequence[Tensor]) -> Float[Tensor, "n C"]:
        """Outputs under the parameters of θ."""
        registers = self._filled(parameters, samples)
        for operation in self._values:
            operation.run(registers)
        found: Tensor = registers[self._outputs]
        return found

    def forward(
        self, parameters: Sequence[Tensor], samples: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "n C"], list[Any]]:
        """Outputs, and what the way back needs."""
        registers = self._filled(parameters, samples)
        for operation in self._forward:
            operation.run(registers)
        return registers[self._outputs], registers

    def backward(self, registers: list[Any], cotangents: Sequence[Float[Tensor, "n C"]]) -> list[list[Tensor]]:
        """Tensors of each piece's factor; what was held for it is let go."""
        begin = 1 + self.samples
        registers[begin : begin + len(cotangents)] = cotangents
        for operation in self._backward:
            operation.run(registers)
        return [[registers[register] for register in own] for own in self._pieces]

    def _filled(self, parameters: Sequence[Tensor], samples: Sequence[Tensor]) -> list[Any]:
        registers: list[Any] = self._registers.copy()
        registers[1 : 1 + self.samples] = samples
        for register, own in zip(self._parameters, parameters, strict=True):
            registers[register] = own
        return registers


class RecordedPasses:
    """Passes of n samples each at k points, by a program; as `StackedPasses`.

    Attributes
    ----------
    outputs
        (k, n, C), for functions of them.
    """

    def __init__(
        self, function: ModelFunction, program: Program, thetas: Float[Tensor, "k P"], inputs: PyTree, shared: bool
    ) -> None:
        self.function, self.program, self.shared = function, program, shared
        outputs, self._held = [], []
        with _kernels_alone():
            for own in each_point(function, thetas, inputs, shared):
                found, held = program.forward(*own)
                outputs.append(found)
                self._held.append(held)
            self.outputs = torch.stack(outputs)
        self.outputs.requires_grad_()

    def pieces(self, components: Float[Tensor, "k n K"]) -> StackedPieces:
        """Gradients of K scalars of each sample, functions of ``outputs`` with their graph, at each point; once."""
        columns = []
        for c in range(components.shape[2]):
            cotangent = torch.zeros_like(components)
            cotangent[..., c] = 1
            last = c + 1 == components.shape[2]
            (found,) = torch.autograd.grad(components, self.outputs, cotangent, retain_graph=not last)
            columns.append(found.contiguous())
        self._held.reverse()
        tensors = []
        with _kernels_alone():
            for own in zip(*(column.unbind() for column in columns), strict=True):
                tensors.append(self.program.backward(self._held.pop(), own))
        # By piece, by tensor of its factor, by point.
        stacked = [list(zip(*own, strict=True)) for own in zip(*tensors, strict=True)]
        return StackedPieces.of(self.program.forms, stacked)


@contextmanager
def _kernels_alone() -> Iterator[None]:
    """Full precision, and nothing of autograd or of mixed precision, in which nobody asks for a network's own calls."""
    with torch.no_grad(), EXACT_PRODUCTS, torch.autocast("cpu", enabled=False):
        deliver_interrupt()
        yield


def each_point(
    function: ModelFunction, thetas: Float[Tensor, "k P"], inputs: PyTree, shared: bool
) -> Iterator[tuple[tuple[Tensor, ...], list[Tensor]]]:
    """Parameters and samples of each point, as a program takes them."""
    leaves = pytree.tree_leaves(function.cast(inputs))
    parameters = function.layout.unflatten(function.cast(thetas)).values()
    for s, own in enumerate(zip(*(value.unbind() for value in parameters), strict=True)):
        yield own, leaves if shared else [leaf[s] for leaf in leaves]


def recorded_outputs(
    function: ModelFunction, program: Program, thetas: Float[Tensor, "k P"], inputs: PyTree
) -> Float[Tensor, "k n C"]:
    """Outputs of the same n samples at k points."""
    assert count(inputs) == program.n
    with _kernels_alone():
        return torch.stack([program.values(*own) for own in each_point(function, thetas, inputs, True)])
