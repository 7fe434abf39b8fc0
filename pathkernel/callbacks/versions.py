"""Versions of frameworks that the callbacks are written for."""

from __future__ import annotations

from importlib import metadata
from types import MappingProxyType

from pathkernel.errors import MissingExtraError

VERSIONS = MappingProxyType(
    {
        "lightning": ("2.2", "3"),
        "pytorch-lightning": ("2.2", "3"),
        "transformers": ("4.46", "6"),
        "skorch": ("1.0", "2"),
        "accelerate": ("1.0", "2"),
    }
)
"""Distribution → the oldest version, and the first that is too new."""


def check_version(distribution: str) -> None:
    """Refuse a framework whose hooks are not known to be those that a callback uses.

    Parameters
    ----------
    distribution
        Its name in `VERSIONS`.

    Raises
    ------
    MissingExtraError
        Where it is not installed, too old or too new, with the version that was found.
    """
    oldest, too_new = VERSIONS[distribution]
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        found = "not installed"
    else:
        if _numbers(oldest) <= _numbers(found) < _numbers(too_new):
            return
        found = f"of the version {found}"
    raise MissingExtraError(
        f"{distribution} is {found}",
        f"The callback is written for the hooks of {distribution} from {oldest} on, and before {too_new}",
        "Write `pip install 'pathkernel[frameworks]'`",
    )


def _numbers(version: str) -> tuple[int, ...]:
    """Release numbers of a version: (2, 6, 6) of ``"2.6.6rc1"``."""
    release = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        release.append(int(digits))
        if digits != part:
            break
    return tuple(release)
