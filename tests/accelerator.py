"""A second device that needs no hardware: its tensors say that they lie on ``"meta"``, and have values.

Operations on them are computed on the CPU. As on an accelerator, tensors of two devices are refused in one operation,
and what waits for the device in the thread that entered it is counted, with the file of the package that waited: the
thread that writes a store waits by itself. As on CUDA, the host waits for what it reads, and for what it sends from
ordinary memory unless it says `non_blocking`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import pathkernel

aten = torch.ops.aten
ROOT = pathkernel.__file__.removesuffix("__init__.py")
DEVICE = torch.device("meta")

WAITS = {
    getattr(aten, name).default
    for name in (
        "_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "allclose", "bincount",
        "_unique2", "unique_dim", "unique_consecutive",
    )
} | {aten.repeat_interleave.Tensor}  # fmt: skip
"""Operations whose result, or the shape of it, the host has to know."""

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations that take indices from the CPU, for which they wait, and for how many places a mask marks."""


class OnDevice(Tensor):
    """Tensor on the device. Attributes: ``values``, the same on the CPU."""

    values: Tensor
    is_meta = False  # it has values, which tensors on "meta" have not
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        found = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        found.values = values
        return found

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Accelerator(TorchDispatchMode):
    """Makes the device known inside, and counts.

    Attributes
    ----------
    waits
        How often the host waited for the device, by the file of the package that did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func, args, kwargs):
            self.waits[asker()] += 1
        return computed(func, args, kwargs)


def asker() -> str:
    """File of the package that is running, below its root; those that read for others apart."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.endswith(("transfers.py", "checksum.py")):
            return name.removeprefix(ROOT)
        frame = frame.f_back
    return "the loop"


def waits(func: Any, args: Any, kwargs: Any) -> bool:
    """True where a call on the device's tensors waits for it."""
    if func is aten._to_copy.default:
        here, there = isinstance(args[0], OnDevice), torch.device(kwargs.get("device") or args[0].device).type != "cpu"
        return here != there and not (there and kwargs.get("non_blocking"))
    leaves = pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, OnDevice) for leaf in leaves):
        return False
    if func is aten.copy_.default:
        there, here = (isinstance(leaf, OnDevice) for leaf in args[:2])
        return here != there and not (there and (args[2:] or [kwargs.get("non_blocking")])[0])
    if func in INDEXING:
        return any(index is not None and (index.dtype == torch.bool or index.device != DEVICE) for index in args[1])
    return func in WAITS


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation: on the device if its tensors lie there, or it is made there."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    device = kwargs.get("device")
    made_here = device is not None and torch.device(device).type == DEVICE.type
    if not here and not made_here:
        return func(*args, **kwargs)
    if here and func not in (aten._to_copy.default, aten.copy_.default):
        refuse_mixtures(func, tensors)
    known = {id(tensor.values): tensor for tensor in here}
    plain, options = pytree.tree_map(lambda leaf: leaf.values if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    if device is not None:
        options["device"] = torch.device("cpu")
    if func is aten._efficientzerotensor.default:  # has no numbers anywhere, and is found among derivatives
        func = aten.zeros.default
    result = func(*plain, **options)
    if func is aten._to_copy.default and not made_here and device is not None:
        return result.clone() if id(result) in known else result  # a copy on the CPU
    if func is aten.copy_.default and not isinstance(args[0], OnDevice):
        return args[0]

    def placed(leaf: Any) -> Any:
        """What an operation wrote on as the tensor that it was given, and new tensors on the device."""
        if not isinstance(leaf, Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else OnDevice(leaf)

    return pytree.tree_map(placed, result)


def refuse_mixtures(func: Any, tensors: list[Tensor]) -> None:
    """Refuse tensors of two devices, but for single numbers and indices from the CPU, as torch does."""
    away = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
    written = func._schema.is_mutable and not isinstance(tensors[0], OnDevice)
    if written or (func not in INDEXING and any(tensor.dim() for tensor in away)):
        places = ", ".join(f"{tuple(tensor.shape)} on {tensor.device.type}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} was given {places}")


@contextmanager
def accelerator() -> Iterator[Accelerator]:
    """The device, with what torch would not do on ``"meta"``: mixed precision asked for, tensors made of numbers."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    class Autocast(autocast):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    def moved(make: Any) -> Any:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            there = device is not None and torch.device(device).type == DEVICE.type
            return make(*args, **kwargs).to(device) if there else make(*args, device=device, **kwargs)

        return made

    with pytest.MonkeyPatch.context() as patch, Accelerator() as mode:
        patch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != (DEVICE.type,) and enabled(*kind))
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(torch, "tensor", moved(torch.tensor))
        patch.setattr(torch, "as_tensor", moved(torch.as_tensor))
        yield mode
