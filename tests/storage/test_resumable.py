"""Long computations go on where they were stopped, and come out the same to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from cases import record
from torch import Tensor

import pathkernel as pk
from pathkernel.errors import CorruptBlockError, StoreError
from pathkernel.storage.resumable import _Tile, resumable_blocks, resumable_gram
from pathkernel.tangent_kernel.cost.model import CostModel

TERMS = 12


def addend(rows: slice, columns: slice, s: int) -> Tensor:
    generator = torch.Generator().manual_seed(s)
    features = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    return features[rows] @ features[columns].T


def whole() -> np.ndarray:
    total = addend(slice(0, 9), slice(0, 9), 0)
    for s in range(1, TERMS):
        total += addend(slice(0, 9), slice(0, 9), s)
    return total.numpy()


def gram(path: Path, term=addend, identity=None) -> np.ndarray:
    return resumable_gram(path, identity or {"of": "a test"}, (9, 9), True, TERMS, term)


def test_a_gram_matrix_is_what_it_is_without_a_store(tmp_path: Path) -> None:
    assert np.array_equal(gram(tmp_path / "gram"), whole())


@pytest.mark.parametrize("stop", range(TERMS))
def test_it_goes_on_after_an_interruption_and_computes_nothing_twice(tmp_path: Path, stop: int) -> None:
    taken: list[int] = []

    def interrupted(rows: slice, columns: slice, s: int) -> Tensor:
        if s == stop and len(taken) == stop:
            taken.append(-1)
            raise KeyboardInterrupt
        taken.append(s)
        return addend(rows, columns, s)

    with pytest.raises(KeyboardInterrupt):
        gram(tmp_path / "gram", interrupted)
    assert np.array_equal(gram(tmp_path / "gram", interrupted), whole())
    again = [s for s in taken if s >= 0]
    assert len(again) - TERMS <= max(0, stop), "no more than what had not been written"
    finished = list(taken)
    assert np.array_equal(gram(tmp_path / "gram", interrupted), whole())
    assert taken == finished, "a finished matrix is read"


def test_tiles_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathkernel.storage.resumable.TILE_BYTES", 8 * 4 * 4)
    assert np.allclose(gram(tmp_path / "gram"), whole(), rtol=1e-13)
    rectangular = resumable_gram(tmp_path / "other", {"of": "it"}, (9, 5), False, TERMS, addend)
    assert np.allclose(rectangular, whole()[:, :5], rtol=1e-13)


def test_full_blocks(tmp_path: Path) -> None:
    def full(rows: slice, columns: slice, s: int) -> Tensor:
        return addend(rows, columns, s)[:, :, None, None] * torch.tensor([[1.0, 2.0], [2.0, 5.0]], dtype=torch.float64)

    found = resumable_gram(tmp_path / "gram", {"of": "blocks"}, (9, 9, 2, 2), True, TERMS, full)
    assert np.allclose(found[..., 1, 1], 5 * whole()) and np.allclose(found, found.transpose(1, 0, 3, 2))


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import importlib.util
spec = importlib.util.spec_from_file_location("t", {file!r}); t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
def slow(rows, columns, s):
    print(s, flush=True)
    time.sleep(0.02)
    return t.addend(rows, columns, s)
t.gram(t.Path({path!r}), slow)
"""


@pytest.mark.slow
def test_it_survives_being_killed(tmp_path: Path) -> None:
    code = CHILD.format(tests=str(Path(__file__).parents[1]), file=__file__, path=str(tmp_path / "gram"))
    seen: list[list[int]] = []
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(3)]
        time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        rest = child.communicate()[0].split()
        seen.append([int(line) for line in [*lines, *rest] if line.strip()])
    assert seen[1] and seen[1][0] >= seen[0][-1] - 1, "no more than the sum in hand is lost"
    assert np.array_equal(gram(tmp_path / "gram"), whole())


def test_another_computation_in_its_place_is_refused(tmp_path: Path) -> None:
    gram(tmp_path / "gram")
    with pytest.raises(StoreError, match=r"of is another, not a test.*same trajectory.*another path"):
        gram(tmp_path / "gram", identity={"of": "another"})
    with pytest.raises(StoreError, match=r"holds 'gram'.*kind 'attributions'"):
        resumable_blocks(tmp_path / "gram", {"of": "a test"}, [1], lambda index: {})


def test_other_files_in_its_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"other files.*folder of its own"):
        gram(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    gram(tmp_path / "gram")
    where = tmp_path / "gram" / "zarr.json"
    where.write_text(where.read_text().replace('"version": 2', '"version": 9'))
    with pytest.raises(StoreError, match=r"version 9.*reads version 2"):
        gram(tmp_path / "gram")


def test_damage_is_found(tmp_path: Path) -> None:
    gram(tmp_path / "gram")
    chunk = tmp_path / "gram" / "gram" / "c" / "0" / "0"
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 4
    chunk.write_bytes(raw)
    with pytest.raises(CorruptBlockError, match="checksum"):
        gram(tmp_path / "gram")


def test_blocks_of_queries(tmp_path: Path) -> None:
    computed: list[int] = []

    def block(index: int) -> dict[str, np.ndarray]:
        if index == 2 and computed == [0, 1]:
            computed.append(-1)
            raise KeyboardInterrupt
        computed.append(index)
        size = [4, 4, 3][index]
        arrays = {"shares": np.full((size, 5), float(index)), "output": np.arange(size) + 10.0 * index}
        return arrays if index != 1 else {**arrays, "late": np.ones(size)}

    with pytest.raises(KeyboardInterrupt):
        resumable_blocks(tmp_path / "why", {"of": "it"}, [4, 4, 3], block)
    found = resumable_blocks(tmp_path / "why", {"of": "it"}, [4, 4, 3], block)
    assert computed == [0, 1, -1, 2]
    assert found["shares"].shape == (11, 5) and found["output"][-1] == 22.0
    assert found["late"].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 3


def test_a_block_that_is_gone_is_found(tmp_path: Path) -> None:
    def run() -> dict[str, np.ndarray]:
        return resumable_blocks(tmp_path / "why", {"of": "it"}, [2, 2], lambda index: {"shares": np.ones((2, 3))})

    run()
    chunk = tmp_path / "why" / "array-0" / "c" / "1" / "0"
    kept = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(CorruptBlockError, match="is missing"):
        run()
    chunk.write_bytes(kept)
    where = tmp_path / "why" / "zarr.json"
    where.write_text(where.read_text().replace('"shares"', '"sharer"', 1))
    with pytest.raises(CorruptBlockError, match="checksum is wrong"):
        run()


def test_what_was_settled_stays_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathkernel.storage.resumable.TILE_BYTES", 8 * 4 * 4)
    seen: list[tuple[Any, Any]] = []

    def settle(sizes, settled):
        seen.append((sizes, settled))
        return {str(size): settled.get(str(size), f"call {len(seen)}") for size in sizes}

    for _ in range(2):
        resumable_gram(tmp_path / "gram", {"of": "a test"}, (9, 9), True, TERMS, addend, settle)
    sizes = [(4, None), (4, 4), (4, 1), (1, None)]
    assert seen == [(sizes, {}), (sizes, dict.fromkeys(map(str, sizes), "call 1"))]


def test_a_kernel_that_goes_on_keeps_the_engines_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are chosen by the speed of the machine, which is another one on every day, and differ by rounding."""
    run = record(dtype=torch.float32)
    monkeypatch.setattr("pathkernel.tangent_kernel.engines.auto.WORTH_CHOOSING", 0)
    monkeypatch.setattr(CostModel, "layers_suffice", lambda *_: False)
    monkeypatch.setattr("pathkernel.tangent_kernel.engines.auto.choose", lambda *_: ("jacobian", "yesterday"))
    computed = lambda name: pk.PathKernel(run.trajectory)(run.X, store=tmp_path / name)  # noqa: E731

    plain = computed("whole")
    monkeypatch.setattr(_Tile, "computed", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        computed("begun")
    monkeypatch.undo()
    monkeypatch.setattr("pathkernel.tangent_kernel.engines.auto.WORTH_CHOOSING", 0)
    monkeypatch.setattr(CostModel, "layers_suffice", lambda *_: False)
    monkeypatch.setattr("pathkernel.tangent_kernel.engines.auto.choose", lambda *_: ("layerwise", "today"))
    assert not np.array_equal(computed("other"), plain)
    assert np.array_equal(computed("begun"), plain)
