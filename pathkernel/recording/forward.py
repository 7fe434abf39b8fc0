"""Forward passes of training as hooks on the model see them: how they ran, and the cotangents of their outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pathkernel.errors import InputError
from pathkernel.gradients.arguments import places_of, same_arguments
from pathkernel.gradients.forward_state import ForwardState, generator_states
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.own_autocast import own_autocast
from pathkernel.gradients.returned import output_leaves, returned_loss, selected
from pathkernel.recording.calls import SeenCall
from pathkernel.recording.compiled import CompiledCall
from pathkernel.recording.forward_pass import BackwardPass, ForwardPass
from pathkernel.recording.modules import WatchedModules
from pathkernel.recording.validation import unwrapped
from pathkernel.runtime.interrupts import defer_interrupts


class Hook:
    """A recorder's hook on a network, which does nothing on copies of it: they are not being recorded.

    Parameters
    ----------
    call
        What is called.
    """

    of_training: ClassVar[bool] = True
    """Tells `pathkernel.gradients.structural_copy` to leave it out."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> None:
        """Call it."""
        if self.call is not None:
            self.call(*arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()  # the whole record would come along


class ForwardWatcher:
    r"""Sees the forward passes of the network in training, and takes the cotangents of their outputs.

    λ comes from a hook on each output, in the backward pass of the loop itself: nothing is evaluated again. Where one
    output was computed from another (logits from a hidden layer that is returned as well), what comes back to the other
    through it is taken off: it would be counted twice.

    Parameters
    ----------
    parts
        The modules that the loop calls, one after the other, each with what the one before returned.
    names
        Theirs, for messages.
    modules
        The submodules of the network.
    called
        The network as a function: what it takes and returns.
    ran
        Called with each forward pass that has a graph.
    begins
        Called when a backward pass begins that comes through outputs, before it adds anything to any gradient.
    arrived
        Called with a forward pass whose gradient has been added to that of the parameters, when the backward pass ends.
    unseen
        Called with a parameter to whose gradient a backward pass added that came through no output.

    Attributes
    ----------
    channel
        Under which name backward passes run at the moment; None for no name.
    differentiated
        Names under which a backward pass has added to gradients since they were taken last.
    copies
        Whether to copy what the network is given in the passes to come.
    checked
        Whether to keep a checksum of θ with the passes to come, and how it is found; None where not.
    enters, ended
        Called before a forward pass in training, outside of backward passes, and when all backward passes have ended;
        None for nothing.

    Notes
    -----
    The states of the random generators are kept only where the pass drew random numbers.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        names: Sequence[str],
        modules: WatchedModules,
        called: ModelFunction,
        ran: Callable[[ForwardPass], None],
        begins: Callable[[], None],
        arrived: Callable[[ForwardPass], None],
        unseen: Callable[[nn.Parameter], None],
    ) -> None:
        self.parts, self.names, self.modules, self.returns = tuple(parts), tuple(names), modules, called.returns
        self.ran, self.begins, self.arrived, self.unseen = ran, begins, arrived, unseen
        self.device, self._axes = called.device, called.axes
        self._places = places_of(called.called[0].forward)
        self.copies = False
        self.checked: Callable[[], int] | None = None
        self.enters: Callable[[], None] | None = None
        self.ended: Callable[[], None] | None = None
        self.channel: str | None = None
        self.differentiated: set[str] = set()
        self._before: tuple[Any, ...] | None = None
        self._passed_on: Any = None
        self._checksum: int | None = None
        self._elsewhere: dict[str, Any] | None = None
        self._handles: list[Any] = []
        self._last: list[Any] = []
        self._listening: dict[int, Any] = {}
        self._under_way: dict[int, BackwardPass] = {}

    # -- the life of a recording --------------------------------------------------------------------------------

    def start(self) -> None:
        """Put the hooks on."""
        first, *others = self.parts
        if not self._watch_compiled():
            # Before the hooks of others, which the copies that are run again have, too.
            self._handles = [first.register_forward_pre_hook(Hook(self._enter), prepend=True, with_kwargs=True)]
            self._hook_last()
        for former, part, names in zip(self.parts, others, itertools.pairwise(self.names), strict=False):
            self._handles += [
                former.register_forward_hook(Hook(self._pass_on)),
                part.register_forward_pre_hook(Hook(partial(self._take_over, names)), prepend=True, with_kwargs=True),
            ]

    def _watch_compiled(self) -> bool:
        """Watch a module that was compiled in place from outside; True where it was."""
        if len(self.parts) > 1 or self.parts[0]._compiled_call_impl is None:
            return False
        if not any(isinstance(handle, CompiledCall) for handle in self._handles):
            for handle in (*self._handles, *self._last):
                handle.remove()
            self._handles, self._last = [CompiledCall(self.parts[0], self._enter, self._leave)], []
        return True

    def stop(self) -> None:
        """Take the hooks off."""
        for handle in (*self._handles, *self._last, *self._listening.values()):
            handle.remove()
        self._handles, self._last, self._listening, self._before, self._passed_on = [], [], {}, None, None
        self._under_way = {}

    @property
    def started(self) -> bool:
        """True while the hooks are on."""
        return bool(self._handles)

    @property
    def in_backward(self) -> bool:
        """True within a backward pass that came through outputs."""
        return bool(self._under_way) and torch._C._current_graph_task_id() >= 0

    def listen(self, parameters: list[nn.Parameter]) -> None:
        """Be told when gradients are added to those of some parameters."""
        self._watch_compiled()
        for p in parameters:
            if p.requires_grad and id(p) not in self._listening:
                self._listening[id(p)] = p.register_post_accumulate_grad_hook(self._accumulated)

    # -- forward ------------------------------------------------------------------------------------------------

    def _hook_last(self) -> None:
        """Be the last forward hook: what others make of the outputs is what the loop gets."""
        for handle in self._last:
            handle.remove()
        self._last = [self.parts[-1].register_forward_hook(Hook(self._leave))]

    def _pass_on(self, module: nn.Module, arguments: tuple[Any, ...], returned: Any) -> None:
        """Called with what one part returned: the next is given it."""
        if self._before is not None:
            self._passed_on = (returned,)

    def _take_over(
        self, names: tuple[str, str], module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Called with what the next part is given.

        Raises
        ------
        InputError
            Where it is something else than what the part before returned.
        """
        if self._before is None:
            return
        passed_on, self._passed_on = self._passed_on, None
        if passed_on is None or named or not same_arguments({0: arguments}, {0: passed_on}):
            self._before = None
            raise InputError(
                f"The part {names[1]!r} of the network was given something else than what {names[0]!r} returned",
                "Parts that are watched are called one after the other, each with what the one before returned and "
                "nothing else",
                "Put what the loop does in between into a module, or write `KernelRecorder(..., watch=name)` with the "
                "name of a module that calls both",
            )

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or is_transformed():
            return
        if self._under_way and torch._C._current_graph_task_id() < 0:
            self._under_way = {}  # of backward passes that ended with an error, of which nobody is told
        if self.enters is not None and not self._under_way:
            self.enters()
        if self._last and next(reversed(self.parts[-1]._forward_hooks)) != self._last[0].id:
            self._hook_last()
        kind = self.device.type
        around = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        autocast = around or own_autocast(unwrapped(self.parts[0]))
        self._checksum = None if self.checked is None else self.checked()
        self._elsewhere = None if self.checked is None else self.modules.other_generators()
        self._before = (
            self.modules.modes(), generator_states(self.device), autocast, self.modules.changed_buffers(),
            SeenCall.of(self._places, arguments, named, self.copies),
        )  # fmt: skip

    def _leave(self, module: nn.Module, arguments: tuple[Any, ...], returned: Any) -> None:
        if self._before is None:
            return
        (modes, generators, autocast, buffers, call), self._before = self._before, None
        drew = any(not torch.equal(generators[name], now) for name, now in generator_states(self.device).items())
        state = ForwardState(modes, generators if drew else {}, autocast, buffers)
        loss = None
        if isinstance(returned, Tensor) and self.returns is None:
            leaves = [returned] if returned.is_floating_point() else []
        else:
            every = output_leaves(selected(returned, self.returns))
            leaves = [leaf for leaf in every if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            loss = returned_loss(returned)
            if any(loss is leaf for leaf in leaves):
                loss = None
        hooked = _distinct({k: leaf for k, leaf in enumerate(leaves) if leaf.requires_grad})
        if not hooked and (loss is None or not loss.requires_grad):
            return
        found = {} if self._elsewhere is None else self.modules.other_generators()
        drew_from = tuple(name for name in found if found[name] != (self._elsewhere or {}).get(name, found[name]))
        one = ForwardPass(state, leaves, self._checksum, drew_from, call, self._samples_first(call))
        for place, leaf in hooked.items():
            _on_gradient(leaf, partial(self._cotangent, one, place))
            if loss is not None:
                _beside_copy(leaf, partial(self._cotangent, one, place))
        # In each pass: what is computed from what may depend on the mode, or on a buffer that says how far training is.
        for place, node, edge in edges_between(hooked) if len(hooked) > 1 else ():
            node.register_hook(partial(self._through_another, one, place, edge))
        if loss is not None and loss.requires_grad:
            _on_gradient(loss, partial(self._cotangent, one, None))
        self.ran(one)

    def _samples_first(self, call: SeenCall) -> Callable[[Tensor], Tensor]:
        """Function that puts the samples first in the outputs of a pass."""
        if not self._axes.outputs:
            return self._axes.output_first
        n, steps = self._axes.steps_of(call.arguments)
        return partial(self._axes.output_first, n=n, steps=steps)

    # -- backward -----------------------------------------------------------------------------------------------

    def _cotangent(self, one: ForwardPass, place: int | None, cotangent: Tensor) -> None:
        """Called in a backward pass, with λ of one output."""
        task = torch._C._current_graph_task_id()
        if not self.started or task < 0:
            return
        if task not in self._under_way:
            with defer_interrupts():
                if not self._under_way:
                    self.begins()
                self._under_way[task] = BackwardPass()
                torch.autograd.Variable._execution_engine.queue_callback(partial(self._ended, task))
        # A copy: autograd goes on to use the memory.
        self._under_way[task].brought.append((one, place, cotangent.detach().clone()))

    def _through_another(
        self, one: ForwardPass, place: int, edge: int, passed_on: tuple[Tensor | None, ...], _: Any
    ) -> None:
        """Called with what a function between two outputs passes on to the first: it is no part of its own slope."""
        gradient = passed_on[edge]
        if gradient is not None:
            self._cotangent(one, place, -gradient)

    def _accumulated(self, parameter: nn.Parameter) -> None:
        """Called when the gradient of a parameter has been added to."""
        if self.channel is not None:
            self.differentiated.add(self.channel)
        elif not self._under_way:
            self.unseen(parameter)
        for backward in self._under_way.values():  # an inner one, of a checkpoint, belongs to the outer one as well
            backward.accumulates = True

    def _ended(self, task: int) -> None:
        with defer_interrupts():
            backward = self._under_way.pop(task, None)
            if backward is None or not backward.accumulates:
                return
            for one, place, cotangent in backward.brought:
                one.add(self.channel, place, cotangent)
            for one in dict.fromkeys(one for one, _, _ in backward.brought):
                self.arrived(one)
            if self.ended is not None and not self._under_way:
                self.ended()


def others_listen(parameter: nn.Parameter) -> bool:
    """True where somebody else than a recorder is called when gradients are added to those of a parameter."""
    hooks = (parameter._post_accumulate_grad_hooks or {}).values()
    return any(not isinstance(getattr(hook, "__self__", None), ForwardWatcher) for hook in hooks)


def _distinct(leaves: dict[int, Tensor]) -> dict[int, Tensor]:
    """Outputs by their places, one for each node of the graph: a tensor may be returned twice."""
    if len(leaves) < 2:
        return leaves
    first: dict[Any, int] = {}
    for place, leaf in leaves.items():
        first.setdefault((leaf.grad_fn, leaf.output_nr) if leaf.grad_fn is not None else id(leaf), place)
    return {place: leaves[place] for place in first.values()}


def edges_between(leaves: dict[int, Tensor]) -> list[tuple[int, Any, int]]:
    """Where some outputs go into the computation of others: place, the function that takes it, and as which input."""
    nodes = {place: (leaf.grad_fn, leaf.output_nr) for place, leaf in leaves.items() if leaf.grad_fn is not None}
    places: dict[tuple[Any, int], int] = {node: place for place, node in nodes.items()}
    oldest = min((node._sequence_nr() for node, _ in places), default=0)
    waiting = [node for node, _ in places]
    met, found = set(waiting), []
    while waiting:
        taking = waiting.pop()
        if taking._sequence_nr() <= oldest:  # what is older than every output takes none of them
            continue
        for edge, (node, number) in enumerate(taking.next_functions):
            if (node, number) in places:
                found.append((places[node, number], taking, edge))
            if node is not None and node not in met:
                met.add(node)
                waiting.append(node)
    return found


def is_transformed() -> bool:
    """True while a transformation of `torch.func` is under way, whose tensors take no hooks."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _beside_copy(tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Be given the gradient that comes to what a tensor is a copy of in another floating type, but not through it.

    Frameworks return float32 copies of what a network computed in bfloat16, loss included; a loss that the network
    computes itself comes from what was copied, whose slope is the copy's.
    """
    copy = tensor.grad_fn
    if copy is None or copy.name() != "ToCopyBackward0":
        return
    (source, number), through = copy.next_functions[0], list[Tensor]()

    def of_copy(passed_on: tuple[Tensor | None, ...], _: Any) -> None:
        through.extend(gradient for gradient in passed_on[:1] if gradient is not None)

    def of_source(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is not None:
            beside = gradient - sum(through, torch.zeros_like(gradient))
            if bool(beside.any()):
                hook(beside.to(tensor_type))
        through.clear()

    tensor_type = tensor.dtype
    if source is not None and type(source).__name__ != "AccumulateGrad":
        copy.register_hook(of_copy)
        source.register_prehook(of_source)


def _on_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Be given the gradient of a tensor as the network receives it, after all hooks that the loop puts on it."""
    node = tensor.grad_fn  # asked for once: every time makes a new Python object of it
    if node is None:  # a parameter, or an input

        def of_leaf(gradient: Tensor) -> None:
            hook(gradient)

        of_leaf.__torch_unserializable__ = True  # type: ignore[attr-defined]  # left out where the user saves it
        tensor.register_hook(of_leaf)
        return
    number = tensor.output_nr

    def of_node(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is not None:  # of a function of several outputs (split, unbind), some of which nobody used
            hook(gradient)

    node.register_prehook(of_node)
