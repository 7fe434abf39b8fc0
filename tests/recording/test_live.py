"""How the recorder reads the live parameters: quickly, and without being fooled."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.recording import slabs
from pathkernel.recording.equality import equal_joined
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.modules import WatchedModules
from pathkernel.recording.slabs import Slabs
from pathkernel.runtime.checksum import checksum

CE = nn.CrossEntropyLoss()

# -- equality ---------------------------------------------------------------------------------------------------------

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", TYPES)
def test_equal_to_the_last_bit(dtype: torch.dtype) -> None:
    pieces = [torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype), torch.empty(0, dtype=dtype)]
    vector = torch.cat([p.reshape(-1) for p in pieces])
    assert equal_joined(pieces, vector)
    for entry in range(len(vector)):
        changed = vector.clone()
        changed.view(torch.uint8)[entry * vector.element_size()] ^= 1
        assert not equal_joined(pieces, changed)


def test_equality_is_that_of_numbers() -> None:
    zero = torch.zeros(3)
    assert equal_joined([zero], -zero)
    nan = torch.tensor([1.0, torch.nan])
    assert equal_joined([nan], nan.clone())
    assert equal_joined([torch.ones(2), torch.ones(2, dtype=torch.float64)], torch.ones(4, dtype=torch.float64))
    square = torch.arange(9.0).reshape(3, 3)
    assert equal_joined([square.T], square.T.reshape(-1))
    assert not equal_joined([square.T], square.reshape(-1))
    assert not equal_joined([torch.ones(3)], torch.ones(4))
    assert not equal_joined([torch.ones(5)], torch.ones(4))


# -- flat views -------------------------------------------------------------------------------------------------------


def live_square() -> tuple[nn.Linear, LiveParameters]:
    model = nn.Linear(3, 3)
    return model, LiveParameters(dict(model.named_parameters()), torch.optim.SGD(model.parameters(), lr=0.1))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def change_in_place(model: nn.Linear) -> None:
    model.weight.data[0, 0] += 1


def change_storage(model: nn.Linear) -> None:
    model.weight.data = torch.randn(3, 3)


def change_strides(model: nn.Linear) -> None:
    model.weight.data = model.weight.data.t()


def change_through_numpy(model: nn.Linear) -> None:
    model.bias.detach().numpy()[1] = 7


@pytest.mark.parametrize("change", [change_in_place, change_storage, change_strides, change_through_numpy])
def test_no_change_of_a_parameter_escapes(change) -> None:
    model, live = live_square()
    before = live.vector()
    assert live.is_at(before) and live.checksum() == checksum(model.parameters())
    change(model)
    assert not live.is_at(before)
    assert torch.equal(live.vector(), flat(model)) and live.checksum() == checksum(model.parameters())
    change_in_place(model)
    assert torch.equal(live.vector(), flat(model)) and live.checksum() == checksum(model.parameters())


def test_gradients_of_parameters_that_the_optimizer_does_not_hold() -> None:
    model = nn.Linear(3, 2)
    live = LiveParameters(dict(model.named_parameters()), torch.optim.SGD([model.bias], lr=0.1))
    model(torch.ones(1, 3)).sum().backward()
    assert live.active() == {"bias"} == set(live.gradients())
    assert live.gradient().tolist() == [0] * 6 + [1, 1]
    live.optimizer.add_param_group({"params": [model.weight]})
    assert set(live.gradients()) == {"weight", "bias"} == live.active()
    model.zero_grad()
    assert live.active() == frozenset()


def test_settings_are_shared_while_they_stay() -> None:
    _, live = live_square()
    first = live.settings()
    assert live.settings() is first
    live.optimizer.param_groups[0]["lr"] = 0.2
    assert first[0]["lr"] == 0.1
    assert live.settings()[0]["lr"] == 0.2


# -- slabs ------------------------------------------------------------------------------------------------------------


def addresses(vectors: list[Tensor]) -> set[int]:
    return {vector.data_ptr() for vector in vectors}


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    source, like = Slabs(), torch.empty(0)
    size = slabs.SLAB // 16  # of four bytes: four of them fill a slab
    first, second = ([source.empty(size, like) for _ in range(4)] for _ in range(2))
    held, before = first[0][1:2], addresses(first)
    del first
    gc.collect()
    third = [source.empty(size, like) for _ in range(4)]
    assert not addresses(third) & (before | addresses(second))  # a view of a vector is still there
    del held
    gc.collect()
    assert addresses([source.empty(size, like) for _ in range(4)]) == before


def test_vectors_do_not_overlap() -> None:
    source = Slabs()
    vectors = []
    for index, dtype in enumerate([torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float32] * 3):
        vectors.append(source.empty(70_001, torch.empty(0, dtype=dtype)).fill_(index))
        assert vectors[-1].shape == (70_001,)
        assert vectors[-1].dtype == dtype
        assert vectors[-1].data_ptr() % slabs.LINE == 0
    for index, vector in enumerate(vectors):
        assert (vector == index).all()


@pytest.mark.parametrize("size", [slabs.SLAB // 16 + 1, slabs.SLAB // 4 + 3])
def test_large_vectors_have_slabs_of_their_own(size: int) -> None:
    source, like = Slabs(), torch.empty(0)
    one, other = (source.empty(size, like).fill_(k) for k in (1, 2))
    assert (one == 1).all()
    assert (other == 2).all()
    assert abs(one.data_ptr() - other.data_ptr()) >= 4 * size
    before = addresses([other])
    del other
    assert addresses([source.empty(size, like)]) == before


def test_few_free_slabs_are_kept() -> None:
    source, like = Slabs(), torch.empty(0)
    vectors = [source.empty(slabs.SLAB // 4, like) for _ in range(slabs.FREE // slabs.SLAB + 3)]
    del vectors
    gc.collect()
    assert 0 < source.workspace.kept <= slabs.FREE


# -- modules ----------------------------------------------------------------------------------------------------------


def test_modules_that_are_put_in_and_replaced_are_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    watched = WatchedModules(model, {name: b.clone() for name, b in model.named_buffers()})
    assert watched.modes() is True
    assert watched.changed_buffers() == {}
    model[0] = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0][1].eval()
    assert watched.modes() == {name: name != "0.1" for name, _ in model.named_modules()}
    model.eval()
    assert watched.modes() is False
    model[1].running_mean = torch.ones(2)  # another tensor
    changed = watched.changed_buffers()
    assert set(changed) == {"1.running_mean"}
    assert watched.changed_buffers() is changed
    model[1].running_mean.add_(1)
    assert watched.changed_buffers()["1.running_mean"].tolist() == [2, 2]
    assert changed["1.running_mean"].tolist() == [1, 1]


# -- listening --------------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_every_parameter_has_one_hook_while_recording() -> None:
    model, X, y = nn.Linear(3, 2), torch.randn(12, 3), torch.randint(2, (12,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y)) as recorder:
        for accumulated in (1, 1, 3, 2, 1, 1):
            optimizer.zero_grad()
            for k in range(accumulated):
                x, target = recorder.batch([k, k + 1])
                (CE(model(x), target) / accumulated).backward()
            seen.append(hooks(model))
            optimizer.step()
    assert seen == [2] * 6
    assert [len(step.batches) for step in recorder.trajectory.steps()] == [1, 1, 3, 2, 1, 1]
    assert hooks(model) == 0


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("skipped", [0, 1])
def test_a_first_batch_that_was_not_used_or_skipped(set_to_none: bool, skipped: int) -> None:
    model, X, y = nn.Linear(3, 2), torch.randn(12, 3), torch.randint(2, (12,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pk.KernelRecorder(model, optimizer, CE, data=(X, y), audit_every=1) as recorder:
        for first in (0, 3, 6):
            for used in (False, True):
                x, target = recorder.batch([first + 2 * used, first + 2 * used + 1])
                optimizer.zero_grad(set_to_none=set_to_none)
                if used or skipped:
                    CE(model(x), target).backward()
            optimizer.step()
    assert [[b.ids.tolist() for b in step.batches] for step in recorder.trajectory.steps()] == [
        [[first + 2, first + 3]] for first in (0, 3, 6)
    ]
