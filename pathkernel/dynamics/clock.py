"""`Clock`: in which order the players of a game took their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pathkernel.errors import InputError, TrajectoryError


class Clock:
    r"""Steps of all players, in the order in which they were taken.

    With :math:`n_p(t)` steps of player p among the first t of all players,

    .. math:: \sum_p n_p(t) = t ,

    so that a step of one player has a time in the steps of every other.

    Parameters
    ----------
    players
        Their names.

    Attributes
    ----------
    order
        The player of each step, (T,) names.
    """

    def __init__(self, players: Sequence[str]) -> None:
        self.players = tuple(players)
        self.order: list[str] = []
        self._begun_at = dict.fromkeys(self.players, 0)
        self._counts = dict.fromkeys(self.players, 0)
        self._before: dict[str, list[dict[str, int]]] = {player: [] for player in self.players}

    def __len__(self) -> int:
        return len(self.order)

    def __repr__(self) -> str:
        return f"Clock({', '.join(f'{player}: {self.taken(player)} steps' for player in self.players)})"

    def begin(self, player: str, steps: int) -> None:
        """Begin after so many steps of a player, those of a record that is gone on with; later calls change nothing."""
        if not self._before[player]:
            self._begun_at[player] = steps

    def advance(self, player: str) -> None:
        """Count a step of a player."""
        self._before[player].append({other: self.taken(other) for other in self.players})
        self._counts[player] += 1
        self.order.append(player)

    def taken(self, player: str) -> int:
        """How many steps a player has taken so far."""
        return self._begun_at[player] + self._counts[player]

    def at(self, player: str, step: int) -> Mapping[str, int]:
        """How many steps every player had taken when one of them took a step.

        Parameters
        ----------
        player, step
            Whose step, counted from 0 as `pathkernel.Trajectory` counts.

        Returns
        -------
        Name → number of steps; of ``player`` itself ``step``.

        Raises
        ------
        InputError
            For a player who is not of the game, and a step that the clock has not seen.
        """
        if player not in self._before:
            raise InputError(
                f"`clock.at({player!r}, {step})` was asked for",
                f"Players are {', '.join(map(repr, self.players))}",
                f"Write `clock.at({self.players[0]!r}, {step})`",
            )
        first = self._begun_at[player]
        last = self.taken(player) - 1
        if not first <= step <= last:
            raise InputError(
                f"`clock.at({player!r}, {step})` was asked for",
                f"The clock has seen steps {first} to {last} of {player}" if last >= first else "It has seen no step",
                f"Write `clock.at({player!r}, {max(first, last)})` after training",
            )
        return dict(self._before[player][step - first])

    @property
    def counts(self) -> np.ndarray:
        """Steps of each player before every step of the game and after the last: (T + 1, players) int64."""
        stepped = np.array([[player == other for other in self.players] for player in self.order], dtype=np.int64)
        begun = np.array([[self._begun_at[player] for player in self.players]], dtype=np.int64)
        return np.concatenate([begun, begun + stepped.reshape(-1, len(self.players)).cumsum(axis=0)])


def unknown_player(name: object, players: Sequence[str]) -> TrajectoryError:
    """Error for a name that is none of the players'."""
    return TrajectoryError(
        f"The player {name!r} was asked for",
        f"Players of this game are {', '.join(map(repr, players))}",
        f"Write one of these names, such as `game[{next(iter(players), 'D')!r}]`",
    )
