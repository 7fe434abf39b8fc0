"""The contract of stores, kept by those of the package and checked for others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pathkernel.storage.disk import DiskStore
from pathkernel.testing import StoreContractError, check_store
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.step import Step


@pytest.mark.parametrize("flush_every", [1, 3, 16])
def test_disk(tmp_path: Path, flush_every: int) -> None:
    check_store(lambda: DiskStore(tmp_path / "run", flush_every=flush_every, durable=flush_every == 3))


class Forgetful(MemoryStore):
    """Copies what it gives back, so that ends are not shared."""

    def read(self, index: int) -> Step:
        step = super().read(index)
        return replace(step, before=step.before.clone(), after=step.after.clone())


class Rounding(MemoryStore):
    def read(self, index: int) -> Step:
        step = super().read(index)
        return replace(step, gradient=step.gradient.bfloat16().to(step.gradient))


class Short(MemoryStore):
    def __len__(self) -> int:
        return min(5, super().__len__())


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (Forgetful, "the end of step 0 is not the very tensor that step 1 begins with"),
        (Rounding, "`gradient` of step 0 is not what was put into it"),
        (Short, "`len` is 5 after 6 steps"),
    ],
)
def test_broken_stores(store: type[MemoryStore], message: str) -> None:
    with pytest.raises(StoreContractError, match=message):
        check_store(store)
