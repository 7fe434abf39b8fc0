"""Stores made up by a seeded mutation fuzzer: what may come out is a value, or an error that says what is wrong.

Files are changed where it hurts: with checksums put right, so that the change gets through to what is behind them.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pathkernel.errors import PathKernelError
from pathkernel.runtime.checksum import crc32c
from pathkernel.storage.blocks import FIELDS, RECORD_CHUNK
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import Group
from pathkernel.storage.format.groups import checksum
from pathkernel.storage.packing import ALIGNMENT, PackingError, unpack

NUMBERS = (0, 1, 2, 3, 15, 16, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30)
VALUES = (
    *(*NUMBERS, *(-n for n in NUMBERS), 0.5, 1e308, float("nan"), float("inf"), None, True, False),
    *("", "float32", "object", "../../x", "/etc/passwd", "\0", "a" * 1000),
    *([], {}, [[]], [None] * 100, {"": 0}, {"tensor": 0}, {"tensor": -1}, {"tensor": [0]}, {"array": 2**40}),
    *({"dict": [[1]]}, {"dict": [[[], 1]]}, {"tuple": 5}, {"float": "zz"}, {"dtype": "int8"}, {"dtype": []}),
    *({"dtype": "object"}, [2**31, 2**31], ["float64", [2**31], 0], ["float64", [1] * 70, 0]),
)


def changed_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with a few flips, cuts, insertions, repetitions, or numbers that are at the edge of a type."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        kind, place = rng.randrange(6), rng.randrange(len(data) + 1)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.choice((1, 2, 8, 64, 4096))]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.choice((1, 2, 8, 64)))
        elif kind == 3:
            data[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
        elif kind == 4:
            data[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
        else:
            start = rng.randrange(len(data) + 1)
            data[place:place] = data[start : start + rng.choice((1, 16, 256))]
        if not data:
            break
    return bytes(data)


def changed_tree(tree: Any, rng: random.Random) -> Any:
    """A JSON value in which a few nodes are replaced, left out, doubled or wrapped many times."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        parent, key = _node(tree, rng)
        if parent is None:
            continue
        kind = rng.randrange(8)
        if kind == 0 and isinstance(parent, dict):
            del parent[key]
        elif kind == 0:
            parent.pop(key)
        elif kind == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 2 and isinstance(parent[key], int):
            parent[key] += rng.choice((-1, 1, 2**20))
        elif kind == 3:
            for _ in range(rng.choice((1, 3, 150))):
                parent[key] = [parent[key]] if rng.random() < 0.5 else {"tuple": [parent[key]]}
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _node(tree: Any, rng: random.Random) -> tuple[Any, Any]:
    parent, key, value = None, None, tree
    while isinstance(value, (dict, list)) and value and (parent is None or rng.random() < 0.8):
        parent = value
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = parent[key]
    return parent, key


def text_of(packed: bytes) -> tuple[Any, bytes]:
    """The JSON part of packed bytes, and what follows."""
    (length,) = struct.unpack("<q", packed[:8])
    end = 8 + length
    return json.loads(packed[8:end]), packed[end + -end % ALIGNMENT :]


def packed_of(tree: Any, rest: bytes) -> bytes:
    text = json.dumps(tree).encode()
    return struct.pack("<q", len(text)) + text + bytes(-(8 + len(text)) % ALIGNMENT) + rest


class Fuzzer:
    """Attacks on the readers of a store.

    Parameters
    ----------
    original
        A store with several blocks.
    folder
        A place to work in.
    """

    def __init__(self, original: Path, folder: Path) -> None:
        self.path = Path(shutil.copytree(original, folder / "store"))
        self.group = Group(self.path)
        store = DiskStore.open(self.path)
        blocks, header = store._there.blocks, store.header
        assert header is not None and header.end is not None
        self.blocks = blocks.count
        self.commits = [np.array(list(vars(blocks.commit(b)).values()), np.int64) for b in range(blocks.count)]
        logs = [self.group.array("log").read([int(c[3])]).tobytes()[: int(c[4])] for c in self.commits]
        self.packed = [*logs, self.group.array("start").read([0]).tobytes()[: header.start]]
        self.trees = [text_of(raw) for raw in self.packed]
        self.header = json.loads((self.path / "zarr.json").read_bytes())
        self.arrays = self.group.arrays()
        self.metadata = {name: json.loads((self.path / name / "zarr.json").read_bytes()) for name in self.arrays}
        self.chunks = [str(p.relative_to(self.path)) for p in sorted(self.path.glob("*/c/**/*")) if p.is_file()]
        self.attacks: list[tuple[int, Callable[[random.Random], None]]] = [
            (50, self.packed_bytes),
            (250, self.packed_tree),
            (60, self.group_metadata),
            (60, self.array_metadata),
            (120, self.chunk),
            (25, self.commit),
            (35, self.record),
        ]

    def attack(self, rng: random.Random) -> str:
        """One input; what came of it.

        Anything but a value or an error of the package is raised.
        """
        (attack,) = rng.choices([a for _, a in self.attacks], [weight for weight, _ in self.attacks])
        try:
            attack(rng)
        except (PathKernelError, PackingError) as error:
            return type(error).__name__
        return "accepted"

    def packed_bytes(self, rng: random.Random) -> None:
        unpack(changed_bytes(rng.choice(self.packed), rng))

    def packed_tree(self, rng: random.Random) -> None:
        tree, rest = rng.choice(self.trees)
        unpack(packed_of(changed_tree(tree, rng), rest))

    def group_metadata(self, rng: random.Random) -> None:
        content = changed_tree(self.header, rng)
        attributes = content.get("attributes") if isinstance(content, dict) else None
        if isinstance(attributes, dict) and rng.random() < 0.9:
            attributes["checksum"] = checksum(attributes)
        raw = json.dumps(content).encode()
        with self.replaced("zarr.json", raw if rng.random() < 0.9 else changed_bytes(raw, rng)):
            self.read(rng, everything=False)

    def array_metadata(self, rng: random.Random) -> None:
        name = rng.choice(self.arrays)
        raw = json.dumps(changed_tree(self.metadata[name], rng)).encode()
        with self.replaced(f"{name}/zarr.json", raw if rng.random() < 0.9 else changed_bytes(raw, rng)):
            array = self.group.array(name)
            if array.written():
                array.read([array.written()[0]] + [0] * (len(array.chunks) - 1))

    def chunk(self, rng: random.Random) -> None:
        relative = rng.choice(self.chunks)
        packed = bytearray((self.path / relative).read_bytes()[:-4])
        if rng.random() < 0.5:  # fields of Blosc's own header, its sizes left as they are
            packed[rng.choice((0, 1, 2, 3))] = rng.randrange(256)
            packed[8:12] = struct.pack("<I", rng.choice((*NUMBERS, rng.randrange(2**32))) % 2**32)
        packed = bytearray(changed_bytes(bytes(packed), rng))
        if len(packed) >= 16 and rng.random() < 0.8:
            packed[12:16] = struct.pack("<I", len(packed))
            if rng.random() < 0.8:
                packed[4:8] = (self.path / relative).read_bytes()[4:8]
        raw = bytes(packed)
        with self.replaced(relative, raw + struct.pack("<I", crc32c(raw))):
            name, index = relative.split("/c/")
            self.group.array(name).read([int(n) for n in index.split("/")])

    def commit(self, rng: random.Random) -> None:
        block = rng.randrange(self.blocks)
        row = self.commits[block].copy()
        for _ in range(rng.choice((1, 1, 2))):
            number = rng.choice((*NUMBERS, int(rng.choice(self.commits[block])) + rng.choice((-1, 1))))
            row[rng.randrange(FIELDS)] = (number + 2**63) % 2**64 - 2**63
        relative = f"commit/c/{rng.choice((block, block, block, self.blocks, 10**15))}"
        with self.replaced(relative, None):
            self.group.array("commit").write([int(relative.split("/")[-1])], row)
            self.read(rng)

    def record(self, rng: random.Random) -> None:
        block = rng.randrange(self.blocks)
        tree, rest = self.trees[block]
        raw = packed_of(changed_tree(tree, rng), rest)[:RECORD_CHUNK]
        row, place = self.commits[block].copy(), int(self.commits[block][3])
        row[4:6] = len(raw), crc32c(raw)
        with self.replaced(f"log/c/{place}", None), self.replaced(f"commit/c/{block}", None):
            chunk = np.zeros(RECORD_CHUNK, np.uint8)
            chunk[: len(raw)] = np.frombuffer(raw, np.uint8)
            self.group.array("log").write([place], chunk)
            self.group.array("commit").write([block], row)
            self.read(rng)

    def read(self, rng: random.Random, everything: bool = True) -> None:
        """All that readers do; the first error ends it."""
        store = DiskStore.open(self.path)
        if rng.random() < 0.5:
            store.start_values()
            store.end_values()
        if everything:
            for index in rng.sample(range(len(store)), min(3, len(store))):
                what = rng.randrange(3)
                if what == 0:
                    store.read(index)
                elif what == 1:
                    store.vector(index)
                else:
                    store.columns(index, [slice(0, 3), slice(2, 9)])
            store.updates()
        elif len(store) < 100:
            store.verify()

    def replaced(self, relative: str, content: bytes | None) -> Replaced:
        return Replaced(self.path / relative, content)


class Replaced:
    """A file with other content, for a while."""

    def __init__(self, place: Path, content: bytes | None) -> None:
        self.place, self.content = place, content

    def __enter__(self) -> None:
        self.kept = self.place.read_bytes() if self.place.exists() else None
        if self.content is not None:
            self.place.write_bytes(self.content)

    def __exit__(self, *_: object) -> None:
        if self.kept is not None:
            self.place.write_bytes(self.kept)
        else:
            self.place.unlink(missing_ok=True)


def limited(extra: int) -> None:
    """No more address space than now and so many bytes: what wants more fails with MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzzed(original: Path, folder: Path, seed: int, inputs: int, tell: Callable[[int], None]) -> dict[str, int]:
    """Attack many times; how often what came out, and beginnings with ``!`` are what should not have.

    Parameters
    ----------
    tell
        Called with the number of each input before it is tried.
    """
    fuzzer, seen = Fuzzer(original, folder), Counter[str]()
    for number in range(inputs):
        tell(number)
        try:
            seen[fuzzer.attack(random.Random(f"{seed} {number}"))] += 1
        except Exception as error:
            seen[f"!{type(error).__name__}: {str(error)[:80]} (seed {seed}, input {number})"] += 1
    strangers = sorted(place.name for place in folder.iterdir() if place.name != "store")
    if strangers:
        seen[f"!written outside the store: {strangers}"] += 1
    return dict(seen)
