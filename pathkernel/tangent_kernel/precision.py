"""Floating types that a kernel may be asked for: those of torch, and products in TensorFloat-32."""

from __future__ import annotations

import torch

from pathkernel.errors import InputError

TENSOR_FLOATS = "tf32"
"""TensorFloat-32, of which torch has no tensors: factors of ten bits behind the point, added up in float32."""

AMPERE = 8, 0
"""Compute capability of the first NVIDIA GPUs that multiply in it."""


def asked_precision(dtype: torch.dtype | str | None, device: torch.device) -> tuple[torch.dtype | None, bool]:
    """Floating type of a kernel, and whether factors of products between gradients are rounded to TensorFloat-32.

    Parameters
    ----------
    dtype
        A type of torch, ``"tf32"``, or None for the parameters' own.
    device
        Where the network is.

    Raises
    ------
    InputError
        For other words, and for ``"tf32"`` on a device that does not multiply in it: it would be float32 by another
        name.
    """
    if not isinstance(dtype, str):
        return dtype, False
    if dtype != TENSOR_FLOATS:
        raise InputError(
            f"`dtype={dtype!r}` was given",
            'Floating types are those of torch, and "tf32" for products in TensorFloat-32 on a GPU',
            "Write `dtype=torch.float32`",
        )
    if not multiplies_tensor_floats(device):
        raise InputError(
            f'`dtype="tf32"` was given for a network on {device}, which does not multiply in TensorFloat-32',
            "NVIDIA GPUs of compute capability 8.0 or later do; anywhere else it would be float32 by another name",
            'Write `dtype=torch.float32`, or move the network first, `model.to("cuda")`',
        )
    return torch.float32, True


def multiplies_tensor_floats(device: torch.device) -> bool:
    """Test that a device has products in TensorFloat-32."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available()
    return nvidia and torch.cuda.get_device_capability(device) >= AMPERE
