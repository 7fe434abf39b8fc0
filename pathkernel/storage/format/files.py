"""Files that are written whole or not at all, and read with distrust."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pathkernel.errors import CorruptBlockError

MAX_METADATA_BYTES = 2**24


def damaged(path: Path, what: str) -> CorruptBlockError:
    """The error for a file that does not hold what it should."""
    return CorruptBlockError(
        f"{path}: {what}",
        "Every file of a store carries a checksum and the sizes that its metadata declare",
        "List all damage with `pathkernel verify`, and put the file back from a copy",
    )


def write_atomically(path: Path, pieces: Sequence[Any], durable: bool = False) -> None:
    """Write a file beside its place and move it there.

    Parameters
    ----------
    path
        Its place.
    pieces
        Bytes that follow each other.
    durable
        Wait until file and name are on the disk, which protects against loss of power.
    """
    with _moved(path, ".partial") as beside, open(beside, "wb", buffering=0) as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                view = view[file.write(view) :]
        if durable:
            os.fsync(file.fileno())
    if durable:
        synchronise(path.parent)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A place beside a file, with its ending, for a library to write to inside; moved to the file's own after it."""
    with _moved(path, path.suffix) as beside:
        with open(beside, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # of any new file, as the user wants it (umask)
        yield beside
        if stat.S_IMODE(beside.stat().st_mode) != mode:  # some libraries write for the owner alone
            beside.chmod(mode)


@contextlib.contextmanager
def _moved(path: Path, suffix: str) -> Iterator[Path]:
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{suffix}")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def drop_page_cache(path: Path) -> None:
    """Have the system write a file to disk and keep nothing of it in memory.

    Asked once, writing begins; asked again later, what has been written by then is let go of. A recording is hardly
    read while training goes on, but its pages would push the training data out of memory, and fresh ones cost more
    than all the rest of writing. Where a file system knows nothing of this, nothing happens.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def synchronise(place: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(root: Path, relative: str, durable: bool = False) -> None:
    """Make folders below a root, which is there already unless it was moved away, and look behind no link."""
    folder = root
    for part in relative.split("/"):
        parent, folder = folder, folder / part
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if folder.is_symlink():
            raise damaged(folder, "is a link, behind which nothing is written")
        if durable:
            synchronise(parent)


def read_file(root: Path, relative: str, limit: int) -> bytes:
    """The content of a regular file below a root, without following links out of their place.

    Raises
    ------
    CorruptBlockError
        Where it is missing, a link, no regular file, or larger than ``limit`` bytes.
    """
    path = root / relative
    if os.path.realpath(path) != os.path.join(os.path.realpath(root), *relative.split("/")):
        raise damaged(path, "is a link or lies behind one")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise damaged(path, f"has {status.st_size} bytes, or is no regular file; at most {limit} are expected")
        pieces = []
        try:
            while piece := file.read(status.st_size + 1):
                pieces.append(piece)
        except OSError as error:
            raise damaged(path, f"cannot be read ({error.strerror})") from None
    return b"".join(pieces)


def read_json(root: Path, relative: str) -> dict[str, Any]:
    """A JSON object from a file below a root."""
    raw = read_file(root, relative, MAX_METADATA_BYTES)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise damaged(root / relative, "is not JSON") from None
    if not isinstance(content, dict):
        raise damaged(root / relative, "is not a JSON object")
    return content
