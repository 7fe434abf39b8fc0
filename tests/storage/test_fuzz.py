"""Stores that a mutation fuzzer made up lead to a value or to an error of the package, and touch nothing else."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from cases import record
from stores import written

from benchmarks._faults_fuzz import Fuzzer, fuzzed, packed_of
from pathkernel.storage.packing import PackingError, pack, unpack


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "run"
    written(record(optimizer="adam", dtype=torch.float32).trajectory, path, flush_every=2)
    return path


@pytest.mark.parametrize("seed", range(2))
def test_made_up_stores(original: Path, tmp_path: Path, seed: int) -> None:
    seen = fuzzed(original, tmp_path, seed, 1500, lambda number: None)
    assert not [what for what in seen if what.startswith("!")], seen
    assert sum(seen.values()) == 1500 and seen["accepted"] > 50
    assert {"CorruptBlockError", "PackingError", "StoreError"} <= seen.keys()


def test_the_fuzzer_would_notice(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fuzzer, "chunk", lambda self, rng: (self.path.parent / "outside").write_text(str(1 // 0)))
    seen = fuzzed(original, tmp_path, 0, 60, lambda number: None)
    assert any(what.startswith("!ZeroDivisionError") for what in seen)
    (tmp_path / "outside").write_text("")
    shutil.rmtree(tmp_path / "store")
    assert any("outside" in what for what in fuzzed(original, tmp_path, 0, 1, lambda number: None))


def test_many_tensors_from_few_bytes() -> None:
    size = 2**16
    tree = {"tensors": [["uint8", [size], 0]] * 50, "value": [{"tensor": i} for i in range(50)]}
    assert len(unpack(pack([torch.zeros(size, dtype=torch.uint8)] * 3))) == 3
    with pytest.raises(PackingError, match="over another"):
        unpack(packed_of(tree, bytes(size)))


@pytest.mark.parametrize("seed", range(20))
def test_a_changed_record_is_still_the_record_or_refused(original: Path, tmp_path: Path, seed: int) -> None:
    fuzzer, rng = Fuzzer(original, tmp_path), random.Random(seed)
    before = {p: p.read_bytes() for p in fuzzer.path.rglob("*") if p.is_file()}
    fuzzer.attack(rng)
    assert before == {p: p.read_bytes() for p in fuzzer.path.rglob("*") if p.is_file()}
