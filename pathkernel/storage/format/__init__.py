"""Arrays on disk that survive crashes and distrust what they read: in the format of zarr v3.

A store is a zarr v3 group on a local file system, which any reader of zarr opens. Metadata and chunks
are written and read here, in that format (bytes, Blosc, CRC32C), for four reasons: zarr's own path costs about a
millisecond of interpreter time for each chunk, as much as a training step; it runs in an event loop, which is gone when
the interpreter exits and in forked workers; importing it takes a second; and nothing is allocated here before the
declared sizes were checked.

Every file is written beside its place and then moved there, so that a reader sees the old file or the new one.
"""

# ruff: noqa: E402 - what is imported below fails less plainly
from pathkernel.runtime.extras import require_extra

require_extra("store", "A store on disk", "numcodecs", "filelock")

from pathkernel.storage.format.arrays import MAX_CHUNK_BYTES, PLAIN, ChunkedArray, Compression
from pathkernel.storage.format.files import damaged, drop_page_cache, replaced, synchronise, write_atomically
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
    "drop_page_cache",
    "replaced",
    "synchronise",
    "write_atomically",
]
