"""Functions that are decomposed rather than given a rule: the layers inside them are met one by one."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pathkernel.gradients.layers.rules import NoRule

DISPATCH = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def decomposed(function: Any) -> Callable[..., Any] | None:
    """The function in pieces that are themselves torch functions, or None where it is one operation."""
    if function in RECURRENT:
        return RECURRENT[function]
    if not isinstance(function, types.FunctionType) or not set(DISPATCH) & set(function.__code__.co_names):
        return None
    # torch's own Python functions begin by offering themselves to whoever listens: here that has just happened.
    scope = {**function.__globals__, **dict.fromkeys(DISPATCH, lambda *_: False)}
    body = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _unrolled(cell: Callable[..., tuple[Tensor, ...]], states: int) -> Callable[..., tuple[Tensor, ...]]:
    """A recurrent network of layers and directions, step by step.

    ``alive``, (T, n), tells which samples have a step: the state of the others stays as it is.
    """

    def run(
        input: Tensor,
        hidden: Any,
        weights: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        alive: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        directions, usual = 2 if bidirectional else 1, 4 if has_biases else 2
        if not isinstance(has_biases, bool):
            raise NoRule  # packed sequences
        per_layer = len(weights) // (num_layers * directions)
        initial = hidden if states > 1 else (hidden,)
        sequence = input.transpose(0, 1) if batch_first else input
        last: list[list[Tensor]] = [[] for _ in range(states)]
        for layer in range(num_layers):
            both = []
            for direction in range(directions):
                index = layer * directions + direction
                own = list(weights[index * per_layer : (index + 1) * per_layer])
                projection = own.pop() if per_layer > usual else None
                own += [None] * (4 - usual)
                state = tuple(h[index] for h in initial)
                projected = F.linear(sequence, own[0], own[2])
                outputs: list[Tensor] = []
                times = range(len(sequence))
                for t in reversed(times) if direction else times:
                    new = cell(projected[t], state, own[1], own[3])
                    if projection is not None:
                        new = (F.linear(new[0], projection), *new[1:])
                    state = new if alive is None else _where(alive[t], new, state)
                    outputs.append(state[0])
                both.append(torch.stack(outputs[::-1] if direction else outputs))
                for slot, value in zip(last, state, strict=True):
                    slot.append(value)
            sequence = torch.cat(both, dim=-1)
            if dropout and train and layer < num_layers - 1:
                raise NoRule  # the fused kernel draws its mask differently
        ends = tuple(torch.stack(slot) for slot in last)
        return (sequence.transpose(0, 1) if batch_first else sequence, *ends)

    return run


def _where(alive: Tensor, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.where(alive.unsqueeze(-1), *pair) for pair in zip(new, old, strict=True))


def _lstm(projected: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    i, f, g, o = (projected + F.linear(state[0], weight, bias)).chunk(4, dim=-1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(projected: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    (h,) = state
    reset, update, new = projected.chunk(3, dim=-1)
    h_reset, h_update, h_new = F.linear(h, weight, bias).chunk(3, dim=-1)
    z = torch.sigmoid(update + h_update)
    return ((1 - z) * torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new) + z * h,)


def _plain(activation: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def cell(projected: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return (activation(projected + F.linear(state[0], weight, bias)),)

    return cell


def _cell(cell: Callable[..., tuple[Tensor, ...]], states: int) -> Callable[..., Any]:
    """One step of a recurrent network, as `torch.nn.LSTMCell` and its like take it."""

    def run(
        input: Tensor, hidden: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        state = cell(F.linear(input, w_ih, b_ih), tuple(hidden) if states > 1 else (hidden,), w_hh, b_hh)
        return state if states > 1 else state[0]

    return run


RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.lstm: _unrolled(_lstm, 2),
    torch.gru: _unrolled(_gru, 1),
    torch.rnn_tanh: _unrolled(_plain(torch.tanh), 1),
    torch.rnn_relu: _unrolled(_plain(torch.relu), 1),
    torch.lstm_cell: _cell(_lstm, 2),
    torch.gru_cell: _cell(_gru, 1),
    torch.rnn_tanh_cell: _cell(_plain(torch.tanh), 1),
    torch.rnn_relu_cell: _cell(_plain(torch.relu), 1),
}
