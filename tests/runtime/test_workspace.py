"""Memory that is used again: never by two arrays at a time, never more of it kept than was allowed."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from typing import Any

import pytest
import torch

from pathkernel.runtime import workspace
from pathkernel.runtime.workspace import FreedMemory, Workspace, give_back_freed_memory

MEGABYTE = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1000, 3000), (3, 5), (0, 4), ()])
def test_its_memory_is_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    array = Workspace(MEGABYTE).empty(shape, dtype)
    assert array.shape == shape and array.dtype == dtype and array.is_contiguous()
    assert array.fill_(2).sum(dtype=torch.float64) == 2 * array.numel()


def test_memory_is_used_again_once_nobody_refers_to_it() -> None:
    workspace = Workspace(64 * MEGABYTE)
    first = workspace.empty((MEGABYTE,), torch.float32)
    place = first.data_ptr()
    view = first.view(4, -1)[1:, ::2]
    del first
    # A view, a numpy array and what autograd saved are as good a reason to keep the memory as the array itself.
    second = workspace.empty((MEGABYTE,), torch.float32)
    assert second.data_ptr() != place
    array = second.numpy()[1:]
    other = second.data_ptr()
    del second
    factor = torch.ones(MEGABYTE, requires_grad=True)
    third = workspace.empty((MEGABYTE,), torch.float32).fill_(3)
    assert third.data_ptr() not in (place, other)
    product = (factor * third).sum()
    saved = third.data_ptr()
    del third
    assert workspace.empty((MEGABYTE,), torch.float32).fill_(5).data_ptr() not in (place, other, saved)
    product.backward()
    assert factor.grad is not None and bool((factor.grad == 3).all())
    size = workspace.used + workspace.kept
    del view, array, product, factor
    assert (workspace.used, workspace.kept) == (0, size)
    again = [workspace.empty((MEGABYTE - 100,), torch.float32) for _ in range(3)]
    assert {place, other, saved} & {array.data_ptr() for array in again}
    assert workspace.used + workspace.kept == size


def test_no_more_is_kept_than_was_allowed() -> None:
    workspace = Workspace(16 * MEGABYTE)
    for megabytes in (2, 5, 9, 3, 14, 1, 7):
        workspace.empty((megabytes, MEGABYTE), torch.int8)
        assert 0 < workspace.used + workspace.kept <= 16 * MEGABYTE
    # What is in use is in use, however much.
    held = [workspace.empty((9, MEGABYTE), torch.int8).fill_(i) for i in range(4)]
    assert workspace.used == 36 * MEGABYTE
    assert [int(array[0, 0]) for array in held] == [0, 1, 2, 3]
    del held
    assert workspace.kept == 9 * MEGABYTE
    array = workspace.empty((20, MEGABYTE), torch.int8).fill_(3)
    assert (workspace.used, workspace.kept) == (20 * MEGABYTE, 0)
    small = workspace.empty((3, MEGABYTE), torch.int8)
    del small
    assert workspace.kept == 3 * MEGABYTE
    workspace.clear()
    assert workspace.kept == 0 and int(array[7, 7]) == 3


def test_two_threads_never_get_the_same_memory() -> None:
    workspace = Workspace(64 * MEGABYTE)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            array = workspace.empty((2, MEGABYTE), torch.int8).fill_(number)
            if int(array.min()) != number or int(array.max()) != number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_array_outlives_its_workspace() -> None:
    array = Workspace(0).empty((2, MEGABYTE), torch.int8).fill_(7)
    assert int(array.min()) == 7


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_a_copy_shares_nothing(copied: Any) -> None:
    workspace = Workspace(8 * MEGABYTE)
    workspace.empty((2, MEGABYTE), torch.int8)
    other = copied(workspace)
    assert (other.limit, other.used, other.kept) == (8 * MEGABYTE, 0, 0) and workspace.kept == 2 * MEGABYTE


def test_memory_that_the_system_does_not_give_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refused)
    with pytest.raises(MemoryError, match="MB for an array"):
        Workspace(MEGABYTE).empty((10_000_000,), torch.float64)


# -- freed memory ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc")
def test_freed_memory_is_given_back_once_a_process_has_grown_by_a_good_part_of_its_budget() -> None:
    def grown() -> int:
        return (workspace._resident() or 0) - before

    size = 8 * MEGABYTE // 4
    torch.empty(31 * MEGABYTE, dtype=torch.uint8)  # blocks up to this size are kept
    give_back_freed_memory()  # of nobody's budget
    with FreedMemory(1000 * MEGABYTE):
        before = workspace._resident() or 0
        # Every second block stays, so that no hole is large, and none at the end.
        blocks = [torch.ones(size) for _ in range(16)]
        del blocks[::2]
        give_back_freed_memory()
        kept = grown()
        with FreedMemory(100 * MEGABYTE) as freed:
            freed.start = before
            give_back_freed_memory()
            assert grown() <= kept
            assert grown() <= 80 * MEGABYTE
    assert len(blocks) == 8


def test_where_the_system_does_not_tell_nothing_is_given_back(monkeypatch) -> None:
    monkeypatch.setattr(workspace, "_resident", lambda: None)
    with FreedMemory(1) as freed:
        freed.give_back()
    monkeypatch.undo()
    monkeypatch.setattr(workspace.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError))
    workspace._trim.cache_clear()
    assert workspace._trim() is None
    workspace._trim.cache_clear()
