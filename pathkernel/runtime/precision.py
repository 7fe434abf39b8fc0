"""Products of float32 numbers in float32, whatever torch was told about them.

A user may let torch round the factors of matrix products and convolutions: to TensorFloat-32, of eleven bits, on a GPU,
where cuDNN does so unless it is told not to; to bfloat16 on processors that have it. Kernels and explanations are sums
over many such products, and rows that are formed in two ways are compared; so they are computed in full precision, and
the settings stay the user's. Training that is run again is run as the loop ran it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager
from typing import Any

import torch

Setting = tuple[Any, str, Any]
"""Object, attribute, and the value that asks for full precision."""


def _gpu_settings() -> list[Setting]:
    """Switches of TensorFloat-32 on a GPU: of matrix products, convolutions and recurrent layers.

    The older names refuse once somebody has used the newer ones, and the other way round they refuse until these are
    put back.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    older = [(holder, "allow_tf32", False) for holder in (matmul, cudnn, cudnn)]
    try:
        for holder, name, _ in older:
            getattr(holder, name)
    except RuntimeError:
        newer: Any = cudnn
        return [(holder, "fp32_precision", "ieee") for holder in (matmul, newer.conv, newer.rnn)]
    return older


class _MatrixProducts:
    """Torch's common setting of matrix products on all devices, as an attribute."""

    @property
    def precision(self) -> str:
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


def _common_settings() -> list[Setting]:
    """The setting that the switch of matrix products on a GPU changes as well, where putting that back loses it.

    Torch then has ``"high"`` for ``"medium"``, and refuses to tell which where the processor's switch says otherwise.
    """
    common = _MatrixProducts()
    try:
        return [(common, "precision", "highest")] if common.precision == "medium" else []
    except RuntimeError:  # somebody has used the newer names
        return []


def _processor_settings() -> list[Setting]:
    """Switches of oneDNN on the CPU."""
    parts = (getattr(torch.backends.mkldnn, name, None) for name in ("matmul", "conv", "rnn"))
    return [(part, "fp32_precision", "ieee") for part in parts if hasattr(part, "fp32_precision")]


def _present(settings: list[Setting]) -> list[tuple[Any, str, Any, Any]]:
    """Settings with the value that each has now."""
    return [(holder, name, full, getattr(holder, name)) for holder, name, full in settings]


class ExactProducts(ContextDecorator):
    """The settings while anybody computes in full precision, and the user's when nobody does any more.

    They belong to the process: with two threads inside, the last one to leave puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._threads: Counter[int] = Counter()
        self._lifted = 0
        self._found: list[tuple[Any, str, Any, Any]] = []
        """Settings that were not as they have to be, with the user's value last."""
        self._on_gpu: list[Any] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                gpu = torch.cuda.is_initialized()
                on_gpu = _present(_gpu_settings()) if gpu else []
                common = _present(_common_settings()) if gpu else []
                self._on_gpu = [own for *_, own in on_gpu]
                # "none" on the CPU asks for nothing, and follows a common setting, which a value would not.
                on_processor = [one for one in _present(_processor_settings()) if one[3] != "none"]
                self._found = [one for one in (*on_gpu, *common, *on_processor) if one[3] != one[2]]
                self._put(exact=True)
            self._inside += 1
            self._threads[threading.get_ident()] += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            self._threads -= Counter({threading.get_ident(): 1})
            if self._inside == 0:
                self._put(exact=False)
                self._found = []

    def _put(self, *, exact: bool) -> None:
        for holder, name, full, own in self._found:
            setattr(holder, name, full if exact else own)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The user's settings inside, also within a computation in full precision: for what is run as the loop ran."""
        with self._lock:
            self._lifted += 1
            self._put(exact=False)
        try:
            yield
        finally:
            with self._lock:
                self._lifted -= 1
                if self._inside and not self._lifted:
                    self._put(exact=True)

    @contextmanager
    def tensor_floats_in_products(self) -> Iterator[None]:
        """Products that are started inside may round their factors to TensorFloat-32, on a GPU, where somebody asked.

        In full precision where another thread computes in it meanwhile, and as the user has it where training is run
        again: the switch is the process's. Others come in when it has been put back.
        """
        with self._lock:
            if self._lifted or set(self._threads) != {threading.get_ident()}:
                yield
                return
            holder, name, full = _gpu_settings()[0]
            setattr(holder, name, "tf32" if full == "ieee" else True)
            try:
                yield
            finally:
                setattr(holder, name, full)

    def tensor_floats(self) -> tuple[bool, bool, bool]:
        """Permissions to round to TensorFloat-32 on a GPU: in matrix products, convolutions, recurrent layers."""
        with self._lock:
            own = self._on_gpu if self._inside and self._on_gpu else [own for *_, own in _present(_gpu_settings())]
        matmul, convolution, recurrence = (value in (True, "tf32") for value in own)
        return matmul, convolution, recurrence


EXACT_PRODUCTS = ExactProducts()
"""Entered by whoever computes kernels or explanations; also a decorator, below `pathkernel.runtime.interrupts`' own."""
