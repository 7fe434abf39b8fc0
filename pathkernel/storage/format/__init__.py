"""Arrays on disk that survive crashes and distrust what they read: zarr v3, and the only module that imports it.

A store is a zarr v3 group on a local file system, which any reader of zarr opens (`Group.as_zarr`). Metadata and chunks
are written and read here, in that format (bytes, Blosc, CRC32C), for four reasons: zarr's own path costs about a
millisecond of interpreter time for each chunk, as much as a training step; it runs in an event loop, which is gone when
the interpreter exits and in forked workers; importing it takes a second; and nothing is allocated here before the
declared sizes were checked.

Every file is written beside its place and then moved there, so that a reader sees the old file or the new one.
"""

from pathkernel.storage.format.arrays import MAX_CHUNK_BYTES, PLAIN, ChunkedArray, Compression
from pathkernel.storage.format.files import damaged, let_go, replaced, synchronise, write_atomically
from pathkernel.storage.format.groups import Group
from pathkernel.storage.format.lock import Lock

__all__ = [
    "ChunkedArray",
    "Compression",
    "Group",
    "Lock",
    "MAX_CHUNK_BYTES",
    "PLAIN",
    "damaged",
    "let_go",
    "replaced",
    "synchronise",
    "write_atomically",
]
