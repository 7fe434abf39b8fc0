"""Places that a command writes to, and numbers that it is given, checked before anything is computed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pathkernel.errors import InputError, check_number

PICTURES = (".png", ".svg", ".pdf")
"""Endings of pictures."""

FILES = {"json": "--json", "output": "--output", "picture": "--picture", "file": "FILE"}
"""Arguments that are places to write to, as a user writes them."""

SEEDS = 2**32
"""Seeds are below it: those of scikit-learn are."""


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse places that cannot be written to, and seeds that are none.

    Raises
    ------
    InputError
        With the argument.
    """
    for name, flag in FILES.items():
        path = getattr(arguments, name, None)
        if path is not None:
            _check_place(path, flag, folder=arguments.command == "demo" and name == "output")
    seed = getattr(arguments, "seed", 0)
    check_number("--seed", seed, whole=True, example=0)
    if seed >= SEEDS:
        raise InputError(f"`--seed {seed}` was given", f"Seeds are below {SEEDS}", "Write `--seed 0`")


def _check_place(path: Path, flag: str, folder: bool) -> None:
    """Refuse a file in the place of a folder, or the reverse, somewhere on the way, and what may not be written to."""
    wrong = None
    if path.exists():
        there = path
        if folder != path.is_dir():
            wrong = f"`{path}` is a {'folder' if path.is_dir() else 'file'}"
    else:
        there = next(place for place in path.absolute().parents if place.exists())
        if not there.is_dir():
            wrong = f"`{there}` on the way is no folder"
    if wrong is None and not os.access(there, os.W_OK):
        wrong = f"`{there}` may not be written to"
    if wrong is not None:
        raise InputError(
            f"`{flag} {path}` was given, and {wrong}",
            f"A {'folder' if folder else 'file'} is written there; folders on the way are made where there are none",
            f"Write `{flag} results/{'' if folder else path.name or 'file'}`",
        )


def check_picture(path: Path, flag: str) -> None:
    """Refuse a picture in a format that is none.

    Raises
    ------
    InputError
        With the endings that are known.
    """
    if path.suffix not in PICTURES:
        raise InputError(
            f"`{flag} {path}` was given", f"Pictures end in {', '.join(PICTURES)}", f"Write `{flag} picture.png`"
        )
