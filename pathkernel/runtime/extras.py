"""Libraries that an extra of the package installs, asked for where they are needed first."""

from __future__ import annotations

from importlib.util import find_spec

from pathkernel.errors import MissingExtraError


def require_extra(extra: str, what: str, *modules: str) -> None:
    """Refuse to go on where a library is not installed.

    Parameters
    ----------
    extra
        The extra that installs all of them.
    what
        Who needs them, as the subject of a sentence.
    modules
        What is imported; nothing is, here.

    Raises
    ------
    MissingExtraError
        Naming the extra.
    """
    missing = [module for module in modules if not _is_installed(module)]
    if missing:
        raise MissingExtraError(
            f"{what} needs {', '.join(f'`{module}`' for module in missing)}, which is not installed",
            f"It comes with the extra `[{extra}]` of pathkernel",
            f"Write `pip install 'pathkernel[{extra}]'`",
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # an importer refuses it
        return False
    except ValueError:  # a module that was put there by hand, without a specification
        return True
