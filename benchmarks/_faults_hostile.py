"""Stores that somebody made to do harm."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _faults_files import Stored, edited, must_be_refused, stored, with_damage
from _faults_fuzz import fuzzed, limited
from _faults_killed import Told, forked
from _faults_table import FAILED, SURVIVED, WRONG, Bench, Fault, Outcome
from _faults_training import Training

from pathkernel.errors import PathKernelError
from pathkernel.runtime.checksum import crc32c

MEMORY = 2**30
"""Bytes that a process may take in addition while it reads made-up stores of some kilobytes."""
INPUTS = 5000
"""Of one process."""


def hostile_metadata() -> list[tuple[str, Callable[[dict[str, Any]], Any]]]:
    """Files and what is done to them."""
    huge = [2**31, 2**62, 10**400, -1, float("nan"), float("inf"), 1e15, "9", None, [], {}, True]
    header: list[Callable[[dict[str, Any]], Any]] = [
        *(lambda c, n=n: c["attributes"].update(start=n) for n in huge),
        *(lambda c, n=n: c["attributes"].update(steps_per_block=n) for n in huge),
        *(lambda c, n=n: c["attributes"]["regions"][0][0].update(shape=[n, n]) for n in huge),
        *(lambda c, n=n: c["attributes"]["end"].update(steps=n) for n in huge if n is not True),
        *(lambda c, n=n: c["attributes"]["end"].update(values=[n, 10]) for n in ("../../etc", "/etc", "a/../../b", "")),
        *(lambda c, n=n: c["attributes"].update(tails=[n]) for n in huge),
        *(lambda c, n=n: c["attributes"].update(dtype=n) for n in ("object", "int64", "V8", 3)),
        lambda c: c["attributes"].update(rule={"name": "os.system", "class": "os.system", "memory": []}),
    ]
    array: list[Callable[[dict[str, Any]], Any]] = [
        *(lambda c, n=n: c["chunk_grid"]["configuration"].update(chunk_shape=[n, n]) for n in huge if n is not True),
        *(lambda c, n=n: c.update(data_type=n) for n in ("object", "|O", "float16", "numpy.datetime64", 3, [])),
        lambda c: c["codecs"].insert(1, {"name": "numcodecs.pickle", "configuration": {}}),
        lambda c: c["codecs"].append({"name": "numcodecs.zfpy"}),
        lambda c: c.update(codecs=[]),
        lambda c: c.update(codecs=[{"name": "sharding_indexed", "configuration": {}}]),
        lambda c: c.update(storage_transformers=[{"name": "x"}]),
        lambda c: c["chunk_key_encoding"].update(configuration={"separator": "../"}),
        lambda c: c["codecs"][1]["configuration"].update(clevel=float("inf")),
    ]
    return [("zarr.json", f) for f in header] + [
        (f"{name}/zarr.json", f) for name in ("theta-0", "log", "commit", "start") for f in array
    ]


def hostile(bench: Bench) -> Iterator[Outcome]:
    """Declared sizes beyond all limits, other types and codecs, links, pickles, bombs; memory is watched."""
    one = stored(bench.folder).copy(bench)
    cases = hostile_metadata()
    for name, change in bench.random.sample(cases, bench.count(40, len(cases))):
        yield must_be_refused(with_damage(one, name, edited((one.path / name).read_bytes(), change)), "metadata")
    payload = b"cos\nsystem\n(S'touch /tmp/pathkernel-was-here'\ntR."
    for name in bench.random.sample(one.files(), bench.count(5, 20)):
        yield must_be_refused(with_damage(one, name, payload), "pickle")
        yield must_be_refused(with_damage(one, name, payload + struct.pack("<I", crc32c(payload))), "pickle")
    for name in bench.random.sample([n for n in one.files() if "/c/" in n], bench.count(5, 20)):
        packed = bytearray((one.path / name).read_bytes()[:-4])
        packed[4:8] = struct.pack("<I", 2**31 - 1)  # decompresses to two gigabytes, it says
        yield must_be_refused(with_damage(one, name, bytes(packed) + struct.pack("<I", crc32c(bytes(packed)))), "bomb")
    yield from links(one, bench)
    if Path("/tmp/pathkernel-was-here").exists():
        yield Outcome(WRONG, "a pickle was run")


def links(one: Stored, bench: Bench) -> Iterator[Outcome]:
    """Links in place of files and folders: nothing behind them is read, written or deleted."""
    outside = bench.place()
    for place in ("zarr.json", "theta-0/c/1/0", "commit/c/1", "log", "start/c", "theta-0/c", "commit/c"):
        target = outside / place.replace("/", "-")
        outside.mkdir(exist_ok=True)
        (one.path / place).rename(target)
        (one.path / place).symlink_to(target)
        before = _tree(outside)
        outcome = must_be_refused(one.read(), "link")
        training = Training("adamw")
        try:
            training.recorded(one.path, 3)
            outcome = Outcome(WRONG, f"recording went on behind a link at {place}")
        except PathKernelError as error:
            outcome = outcome if outcome.verdict != SURVIVED else Outcome(SURVIVED, type(error).__name__)
        if _tree(outside) != before:
            outcome = Outcome(WRONG, f"something behind a link at {place} was changed")
        yield outcome
        (one.path / place).unlink()
        target.rename(one.path / place)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fuzz(original: Path, folder: Path, seed: int, inputs: int, told_at: Path) -> None:
    """A process that attacks, and leaves behind what came out."""
    told = Told(told_at)
    limited(MEMORY)

    def tell(number: int) -> None:
        told[0] = number

    seen = fuzzed(original, folder, seed, inputs, tell)
    told_at.with_suffix(".json").write_text(json.dumps(seen))


def made_up(bench: Bench) -> Iterator[Outcome]:
    """Stores made up by a mutation fuzzer, read by processes whose memory is limited."""
    one, left = stored(bench.folder), bench.count(1000, 110_000)
    while left > 0:
        inputs, seed = min(INPUTS, left), bench.random.getrandbits(32)
        left -= inputs
        told = Told(bench.place().with_suffix(".told"))
        with tempfile.TemporaryDirectory(dir=memory_disk()) as folder:
            process = forked(fuzz, one.path, Path(folder), seed, inputs, told.path)
            process.join(600)
            process.kill()
            process.join()
        if process.exitcode:
            yield Outcome(FAILED, f"crash {process.exitcode} at input {told[0]} of seed {seed}")
            continue
        for what, times in json.loads(told.path.with_suffix(".json").read_text()).items():
            yield from [Outcome(FAILED if what.startswith("!") else SURVIVED, what.lstrip("!"))] * times


def memory_disk() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


FAULTS = [
    Fault("hostile files", "none", hostile),
    Fault("made-up files (fuzz)", "none", made_up),
]
