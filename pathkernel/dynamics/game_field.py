"""Vector field of a game: gradients of all players' losses at a point, on copies of their networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pathkernel.errors import InputError, brief, is_number
from pathkernel.gradients.forward_state import generator_states, set_generators
from pathkernel.gradients.parameters import ParameterLayout, constants_of, named_trainable
from pathkernel.gradients.structural_copy import StructuralCopy

GameLoss = Callable[..., Tensor]
"""Loss of one player as a function of all players' networks, in their order."""


class Game:
    """Gradients of all players' losses at a point, on copies of their networks.

    Attributes
    ----------
    point
        w where the players stand, (P,).
    parts
        Which entries of w are of which player.
    drawn
        States of torch's random generators, on the CPU and where w lies, which every loss begins with.
    """

    def __init__(
        self, players: Mapping[str, nn.Module], losses: Mapping[str, GameLoss], rates: float | Mapping[str, float]
    ) -> None:
        given = dict(rates) if isinstance(rates, Mapping) else dict.fromkeys(players, rates)
        for name, by_player in (("losses", losses), ("rates", given)):
            if by_player.keys() != players.keys():
                raise InputError(
                    f"`{name}` are of {', '.join(map(repr, by_player)) or 'nobody'}",
                    f"Players are {', '.join(map(repr, players)) or 'nobody'}, and each has one",
                    f"Write `{name}={{{', '.join(f'{player!r}: ...' for player in players)}}}`",
                )
        for name, rate in given.items():
            if not (is_number(rate) and rate >= 0):
                raise InputError(
                    f"The rate of {name!r} is {rate!r}",
                    "Rates are step sizes against the gradient: finite numbers, 0 or more",
                    f"Write `rates={{{name!r}: 0.1, ...}}`",
                )
        self.names = tuple(players)
        self._losses, self._rates = losses, given
        self._copies = {name: StructuralCopy(module) for name, module in players.items()}
        trained = {name: named_trainable(module) for name, module in players.items()}
        self._outside = [parameter for own in trained.values() for parameter in own.values()]
        self._layouts = {name: ParameterLayout.of(own) for name, own in trained.items()}
        self._constants = {name: constants_of(module, self._layouts[name]) for name, module in players.items()}
        self.point = torch.cat([self._layouts[name].flatten(own).detach() for name, own in trained.items()])
        self.drawn = generator_states(self.point.device)
        self.parts: dict[str, slice] = {}
        begin = 0
        for name in self.names:
            self.parts[name] = slice(begin, begin + self._layouts[name].size)
            begin += self._layouts[name].size

    def gradients(self, stepping: Sequence[str], scaled: bool = False) -> Callable[[Tensor], Tensor]:
        """Function of w: minus the gradients of those who step, (P,), zero for the others; times their rates."""

        def of(w: Tensor) -> Tensor:
            value = 0 * w  # with a graph, also where gradients are constants
            for name in stepping:
                set_generators(self.drawn)
                pieces = {player: w[part] for player, part in self.parts.items()}
                loss = self._losses[name](*self._at(pieces))
                gradient = _gradient(name, loss, pieces[name], self._outside)
                if not bool(gradient.isfinite().all()):
                    raise InputError(
                        f"The gradient of the loss of {name!r} is not finite where the players stand",
                        "Eigenvalues are those of finite derivatives; a player that diverged has none",
                        "Ask for the players as they were before, such as "
                        "`game.trajectory(player).parameters(step)` loaded into the networks",
                    )
                own = self.parts[name]
                rate = self._rates[name] if scaled else 1.0
                value = value + torch.nn.functional.pad(-rate * gradient, (own.start, len(w) - own.stop))
            return value

        return of

    def steps(self, stages: Sequence[Sequence[str]]) -> Iterator[Stage]:
        """The steps of the map, each where the one before has led."""
        point = self.point
        for stepping in stages:
            stage = Stage(point, self.gradients(stepping, scaled=True))
            point = (point + stage.value).detach()
            yield stage

    def _at(self, pieces: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Copies of the networks with the players' pieces of w, and with buffers that they may write on."""
        for name, copy in self._copies.items():
            values = self._layouts[name].unflatten(pieces[name])
            constants = {key: value.clone() for key, value in self._constants[name].items()}
            copy.fill({**constants, **values})
            yield copy.module


def _gradient(name: str, loss: object, own: Tensor, outside: Sequence[nn.Parameter]) -> Tensor:
    """Gradient of a player's loss with respect to its own parameters, with its graph.

    Raises
    ------
    InputError
        For a loss that is no number with a graph, one that does not depend on these parameters, and one that depends on
        the networks outside, of which those passed to it are copies.
    """
    expected = "A loss is a function of the networks passed to it, and a tensor of one number with its graph"
    write = f"Write `{{{name!r}: lambda {name}, ...: loss}}`, in which the loss calls its arguments"
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise InputError(f"The loss of {name!r} is {found}", expected, f"{write}, and ends in `.mean()`, not `.item()`")
    gradient: Tensor | None = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss.sum(), own, create_graph=True, allow_unused=True)
    if gradient is None:
        raise InputError(
            f"The loss of {name!r} does not depend on the parameters of the network {name!r} that was passed to it",
            expected,
            f"{write}, not the networks outside, and detaches nothing",
        )
    if any(one is not None for one in torch.autograd.grad(loss.sum(), outside, retain_graph=True, allow_unused=True)):
        raise InputError(
            f"The loss of {name!r} depends on the network of a player that was not passed to it", expected, write
        )
    return gradient


class Stage:
    """A step w + f(w) at a point, with the graph of f.

    Attributes
    ----------
    value
        f(w), (P,).
    """

    def __init__(self, point: Tensor, of: Callable[[Tensor], Tensor]) -> None:
        self._w = point.detach().clone().requires_grad_(True)
        self.value = of(self._w)

    def pulled_back(self, u: Tensor) -> Tensor:
        """Product of the transposed Jacobian of f with a vector, (P,)."""
        (found,) = torch.autograd.grad(self.value, self._w, u, retain_graph=True)
        return found


def check_players(players: Mapping[str, nn.Module], losses: Mapping[str, GameLoss]) -> None:
    """Refuse what is no game of networks with parameters of their own.

    Raises
    ------
    InputError
        With the first player that is none.
    """
    if not isinstance(players, Mapping) or not isinstance(losses, Mapping) or not players:
        raise InputError(
            f"`players` is {brief(players)}"
            if not players
            else f"`players` is a {type(players).__name__}, `losses` a {type(losses).__name__}",
            "Both are mappings from the names of players, of whom there is one at least",
            'Write `stability({"D": D, "G": G}, {"D": loss_d, "G": loss_g})`',
        )
    owners: dict[int, str] = {}
    kinds: dict[tuple[torch.dtype, torch.device], str] = {}
    for name, loss in losses.items():
        if not callable(loss):
            raise InputError(
                f"The loss of {name!r} is a {type(loss).__name__}",
                "A loss is a function of the networks of all players, in their order",
                f"Write `{{{name!r}: lambda {', '.join(players)}: ...}}`",
            )
    for name, module in players.items():
        trained = named_trainable(module) if isinstance(module, nn.Module) else {}
        if not trained:
            raise InputError(
                f"The player {name!r} is a {type(module).__name__} without parameters that require gradients",
                "A player is a network that moves",
                f"Leave {name!r} out, and use it within the losses of the others",
            )
        for path, parameter in trained.items():
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise InputError(
                    f"The players {other!r} and {name!r} share the parameter `{path}`",
                    "Parameters of a game are each of one player, who moves them by the gradient of one loss",
                    "Write the part that they share as a player of its own, with the loss that moves it, or give one "
                    f"of them a copy, `copy.deepcopy(network)`, where {name!r} alone should move it",
                )
            kinds.setdefault((parameter.dtype, parameter.device), name)
    if len(kinds) > 1:
        raise InputError(
            "Parameters are " + ", ".join(f"{dtype} on {device} ({name!r})" for (dtype, device), name in kinds.items()),
            "Eigenvalues are those of one matrix, whose numbers are of one type and on one device",
            "Convert the networks, `network.double()`, and the samples in the losses",
        )
