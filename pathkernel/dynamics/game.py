"""`GameRecorder`: several networks that are trained against each other, a recorder each and a clock."""

from __future__ import annotations

import difflib
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel.dynamics.clock import Clock, unknown_player
from pathkernel.dynamics.origins import MadeSamples, Origins, PlayerObserver, rows_of
from pathkernel.errors import CertificateWarning, InputError, PathKernelError
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.trajectory.trajectory import Trajectory

Player = tuple[nn.Module, Optimizer | Sequence[Optimizer]]

OPTIONS = tuple(
    name
    for name in inspect.signature(KernelRecorder).parameters
    if name not in ("model", "optimizer", "store")  # these are the players', and the game's
)
"""Options of a recorder, which a game takes as mappings from players."""


class GameRecorder:
    r"""Record the training of networks that play against each other: a recorder each, and a clock.

    Each player's output is an exact sum over all that the player was trained on, at the time at which it was,

    .. math:: D(x; \varphi_S) = D(x; \varphi_0) + \sum_{i\,\text{real}} \mathrm{share}_i(x)
              + \sum_{j\,\text{generated}} \mathrm{share}_j(x) + \sum_{\text{channels}} \mathrm{channel}(x) ,

    where each generated sample j has the latent, and the step of the generator, that it came from (`origins`); and
    :math:`G(z; \theta_S)` likewise, as a sum over latents. The loop is as it was: updates may be simultaneous,
    alternating, or several of one player for each of another's, by whatever losses.

    Parameters
    ----------
    players
        ``(network, optimizer)`` of each player by its name; a list where several optimizers train one network.
    store
        None for memory, or a folder, in which each player has its own by its name.
    **options
        Every other option of `pathkernel.KernelRecorder`, as a mapping from players to what they are given:
        ``data={"D": dataset}``, ``averages={"G": {"ema": ema}}``, ``rule={"G": "elementwise"}``.

    Attributes
    ----------
    clock
        In which order the players took their steps.

    Raises
    ------
    UnsupportedOptimizerError, RecordingError, InputError
        At construction, with the player's name.

    Notes
    -----
    Time and memory are those of two recorders; besides, of each sample that a player makes its latent and some 200
    bytes are kept, by which it is known again. Clock and origins are of this object, and no part of a store. They
    observe every step, for which `pathkernel.Keyframes` makes each of them whole while it is taken, though no more is
    kept.

    An error within the block, such as the `pathkernel.errors.NonFiniteStepError` of a player that diverges, ends the
    recording and leaves what was recorded before it: `trajectory` and `machine` are those of the steps so far. Where
    the last of them already led to outputs that are not finite, `machine` refuses, names the step, and ``at=step`` is
    the player before it.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> real = torch.randn(16, 2) + 2
    >>> D, G = torch.nn.Linear(2, 1), torch.nn.Linear(3, 2)
    >>> opt_d, opt_g = (torch.optim.SGD(network.parameters(), lr=0.1) for network in (D, G))
    >>> loss, one = torch.nn.BCEWithLogitsLoss(), torch.ones(8, 1)
    >>> with pk.GameRecorder({"D": (D, opt_d), "G": (G, opt_g)}, data={"D": (real, torch.ones(16, 1))}) as game:
    ...     for x, _ in game["D"].batches(8):
    ...         opt_d.zero_grad()
    ...         loss(D(x), one).backward()
    ...         with game.sources(D="generated", G="noise"):
    ...             fake = G(torch.randn(8, 3))
    ...             loss(D(fake.detach()), 0 * one).backward()
    ...             opt_d.step()
    ...             opt_g.zero_grad()
    ...             loss(D(fake), one).backward()
    ...             opt_g.step()
    >>> game.clock
    Clock(D: 2 steps, G: 2 steps)
    >>> why = game.machine("D").explain(real[:1])
    >>> why.sources
    {'generated': slice(16, 32, None)}
    >>> game.origins("D")["generated"].made_at
    array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1])

    References
    ----------
    Goodfellow et al. 2014 (1406.2661); Mescheder et al. 2018 (1801.04406) for the dynamics of such games.
    """

    def __init__(
        self,
        players: Mapping[str, Player],
        *,
        store: str | os.PathLike[str] | None = None,
        **options: Mapping[str, Any],
    ) -> None:
        _check_players(players)
        for option, by_player in options.items():
            _check_option(option, by_player, players)
        self.clock = Clock(tuple(players))
        self._made = MadeSamples(self.clock)
        self._observers = {player: PlayerObserver(self._made, player) for player in players}
        self._entered = ExitStack()
        self._called = {player: network for player, (network, _) in players.items()}
        folders: Mapping[str, Any] = {} if store is None else {player: Path(store) / player for player in players}
        self._recorders = {
            player: self._recorder(
                player,
                *pair,
                store=folders.get(player),
                **{option: by_player[player] for option, by_player in options.items() if player in by_player},
            )
            for player, pair in players.items()
        }

    def _recorder(self, player: str, network: nn.Module, optimizer: Any, **options: Any) -> KernelRecorder:
        observers = [*options.pop("observers", ()), self._observers[player]]
        try:
            return KernelRecorder(network, optimizer, observers=observers, **options)
        except PathKernelError as error:
            by_player = f"Of a game, options are mappings by player, `GameRecorder(..., rule={{{player!r}: ...}})`"
            found, write = f"Player {player!r}: {error.found}", f"{error.write}. {by_player}"
            raise type(error)(found, error.expected, write) from error

    def __getitem__(self, player: str) -> KernelRecorder:
        """Recorder of a player, by which its samples are announced."""
        if player not in self._recorders:
            raise unknown_player(player, self.players)
        return self._recorders[player]

    @property
    def players(self) -> tuple[str, ...]:
        """Names of the players."""
        return tuple(self._recorders)

    def __repr__(self) -> str:
        return f"GameRecorder({', '.join(f'{player}: {self.clock.taken(player)} steps' for player in self.players)})"

    # -- the life of a recording ------------------------------------------------------------------------------

    def __enter__(self) -> GameRecorder:
        with ExitStack() as entered:  # where one player is refused, the others are let go of
            for recorder in self._recorders.values():
                entered.enter_context(recorder)
            self._watch()
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, PathKernelError):
            steps = ", ".join(f"{player} {self.clock.taken(player)}" for player in self.players)
            error.add_note(
                f"On record are the steps that were taken before it: {steps}. `game.machine(player)` is of these, and "
                "`game.machine(player, at=step)` of the first of them."
            )
        self._made.stop()
        self._entered.__exit__(kind, error, traceback)

    def start(self) -> None:
        """Begin to record; for loops around which no ``with`` block can be put."""
        with ExitStack() as started:  # where one player is refused, the others are let go of
            for recorder in self._recorders.values():
                recorder.start()
                started.callback(recorder.close)
            self._watch()
            started.pop_all()

    def close(self) -> None:
        """Let go of all players; recording may be started again."""
        self._made.stop()
        with ExitStack() as closing:
            for recorder in self._recorders.values():
                closing.callback(recorder.close)

    def _watch(self) -> None:
        """Take note of what the players make, in the module that the loop calls."""
        self._made.stop()
        for player, recorder in self._recorders.items():
            watched = [recorder.model.get_submodule(name) for name in recorder.trajectory.run.watch]
            called = watched or [self._called[player]]
            self._made.watch(player, called[0], called[-1])

    # -- while training runs ----------------------------------------------------------------------------------

    @contextmanager
    def sources(self, names: Mapping[str, str] | None = None, /, **by_player: str) -> Iterator[None]:
        """Take the passes inside for passes of samples that are not of the training data, of several players at once.

        Parameters
        ----------
        names, **by_player
            The source of each player, as `pathkernel.KernelRecorder.source` takes it: ``D="generated", G="noise"``.
        """
        with ExitStack() as entered:
            for player, name in {**(names or {}), **by_player}.items():
                entered.enter_context(self[player].source(name))
            yield

    # -- what was recorded ------------------------------------------------------------------------------------

    def trajectory(self, player: str) -> Trajectory:
        """The path of a player so far."""
        return self[player].trajectory

    def machine(self, player: str, **options: Any) -> KernelMachine:
        """A player as an exact kernel machine over all that it was trained on.

        Parameters
        ----------
        player
            Its name.
        **options
            As of `pathkernel.KernelMachine`: ``average="ema"``, ``at=step``, …
        """
        return KernelMachine(self.trajectory(player), **options)

    def samples(self, player: str, source: str) -> Tensor:
        """Samples of a source as a player was given them, in the order of their columns of the shares.

        Parameters
        ----------
        player, source
            Their names.

        Returns
        -------
        (n, …); the first tensor, where the player takes several.

        Raises
        ------
        InputError
            For a source that is not on record, and a record that keeps no inputs of it.
        """
        batches = [batch for step in self.trajectory(player).steps() for batch in step.batches]
        own = [batch for batch in batches if batch.source == source]
        if not own:
            known = sorted({batch.source for batch in batches if batch.source is not None})
            raise InputError(
                f"Samples of the source {source!r} of {player} were asked for",
                f"Sources on record are {', '.join(map(repr, known)) or 'none'}",
                f"Put the passes of {player} into `with game.sources({{{player!r}: {source!r}}}):`",
            )
        found = [next(rows_of(batch.inputs), None) for batch in own]
        if any(rows is None for rows in found):
            raise InputError(
                f"Samples of the source {source!r} of {player!r} were asked for",
                "This record was thinned, and keeps no inputs of the steps between",
                f"Record with `schedule={{{player!r}: pathkernel.Every()}}`",
            )
        return torch.cat([rows for rows in found if rows is not None])

    def origins(self, player: str) -> dict[str, Origins]:
        """Where the samples of each source of a player come from, in the order of its columns of the shares.

        Parameters
        ----------
        player
            Its name.

        Returns
        -------
        Name of the source → `Origins`: entry j is of the column ``why.sources[name].start + j``.

        Warns
        -----
        CertificateWarning
            Where samples are ambiguous, and have no maker: their bits were made of several latents or at several times.
        """
        if player not in self._observers:
            raise unknown_player(player, self.players)
        found = self._observers[player].origins
        for source, origins in found.items():
            if origins.ambiguous.any():
                warnings.warn(
                    CertificateWarning(
                        f"{origins.ambiguous.sum()} of the {len(origins)} samples of the source {source!r} of "
                        f"{player!r} may be of several latents, or of several steps",
                        "A sample is known again by its bits, which a generator that collapses or saturates makes more "
                        "than once; such samples have no maker, and `made_at` is -1",
                        f"Look at `game.origins({player!r})[{source!r}].ambiguous`",
                    ),
                    stacklevel=2,
                )
        return found


def _check_players(players: Mapping[str, Player]) -> None:
    """Refuse what is no mapping of names to networks and their optimizers.

    Raises
    ------
    InputError
        With the first entry that is none.
    """
    if not isinstance(players, Mapping) or not players:
        raise InputError(
            f"`players` is {players!r}" if not players else f"`players` is a {type(players).__name__}",
            "Players are a mapping from names to pairs of a network and its optimizer",
            'Write `GameRecorder(players={"D": (D, opt_d), "G": (G, opt_g)})`',
        )
    for name, pair in players.items():
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], nn.Module)):
            raise InputError(
                f"The player {name!r} is a {type(pair).__name__}",
                "A player is a tuple of a network and its optimizer, or a list of several",
                f"Write `players={{{name!r}: (network, optimizer)}}`, and options by their names, "
                f"`data={{{name!r}: dataset}}`",
            )
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise InputError(
                f"A player is called {name!r}",
                "A player has a name, which is that of its folder in a store",
                'Write `players={"D": (D, opt_d), "G": (G, opt_g)}`',
            )


def _check_option(option: str, by_player: Any, players: Mapping[str, Any]) -> None:
    """Refuse an option that no recorder has, and one that is no mapping from players.

    Raises
    ------
    InputError
        For such an option, for a value that stands for all players, and for a name that is none of theirs.
    """
    if option not in OPTIONS:
        near = difflib.get_close_matches(option, OPTIONS, n=1) or ["data"]
        raise InputError(
            f"`GameRecorder` was given `{option}=`",
            f"Its options are those of `KernelRecorder`: {', '.join(OPTIONS)}",
            f"Write `{near[0]}={{{next(iter(players))!r}: ...}}`",
        )
    if not isinstance(by_player, Mapping) or not by_player.keys() <= players.keys():
        found = list(by_player) if isinstance(by_player, Mapping) else f"a {type(by_player).__name__}"
        raise InputError(
            f"`{option}=` of a game is {found}",
            f"Options are mappings from players, here {', '.join(map(repr, players))}",
            f"Write `{option}={{{next(iter(players))!r}: ...}}`",
        )
