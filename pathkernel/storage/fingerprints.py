"""Fingerprints: which network, loss and data a trajectory belongs to, so that nobody reads it with others."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss
from pathkernel.errors import brief
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.storage.packing import as_bytes
from pathkernel.trajectory.samples import Samples

SPREAD = 64
"""How many items of a dataset are looked at."""

Fingerprint = Mapping[str, Any]


def digest(tensors: Any) -> str:
    """BLAKE2b of types, shapes and bytes of tensors, by name."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(as_bytes(tensor).data)
    return state.hexdigest()


def named(thing: Any) -> str:
    """Module and name of a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def architecture(model: nn.Module) -> dict[str, Any]:
    """Class, submodules with their types, and the state's names, shapes and types; no values."""
    modules = {name: named(type(child)) for name, child in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items()}
    return {"modules": modules, "state": state}


def weights(model: nn.Module) -> str:
    """Digest of all parameters and buffers."""
    return digest([*model.named_parameters(), *model.named_buffers()])


def loss_identity(loss: Loss | str | None) -> dict[str, Any]:
    """Class or function, and its settings as far as they are numbers, text or tensors."""
    if loss is None or isinstance(loss, str):
        return {"name": loss or "", "settings": {}}
    if isinstance(loss, functools.partial):
        settings = {str(i): value for i, value in enumerate(loss.args)} | loss.keywords
        return {"name": f"partial of {loss_identity(loss.func)['name']}", "settings": _plain(settings)}
    if not isinstance(loss, nn.Module):
        return {"name": named(loss if hasattr(loss, "__qualname__") else type(loss)), "settings": {}}
    settings = {key: value for key, value in vars(loss).items() if not key.startswith("_") and key != "training"}
    tensors = {**dict(loss.named_parameters()), **dict(loss.named_buffers())}
    return {"name": named(type(loss)), "settings": _plain({**settings, **tensors})}


def _plain(settings: Mapping[str, Any]) -> dict[str, str]:
    plain = {}
    for key, value in settings.items():
        if isinstance(value, Tensor):
            plain[key] = f"tensor {digest([('', value)])}"
        elif value is None or isinstance(value, (bool, int, float, str)):
            plain[key] = repr(value)
    return plain


def data_identity(data: Samples) -> dict[str, Any]:
    """Number of samples, shapes and types, and a digest: of everything, or of a spread of a dataset's items.

    A dataset whose items differ from one look to the next (random augmentation) has no digest.
    """
    if data.announced and data.dataset is None:
        return {"count": data.limit or 0, "shapes": [], "digest": ""}
    if data.dataset is None:
        leaves = pytree.tree_leaves((data._inputs, data._targets))
        shapes = [f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}" for leaf in leaves]
        return {"count": len(data), "shapes": shapes, "digest": digest(enumerate(leaves))}
    places = sorted({round(i * (len(data) - 1) / (SPREAD - 1)) for i in range(SPREAD)})
    with generators_untouched():
        looks = [digest(_leaves(data.dataset[place] for place in places)) for _ in range(2)]
        shapes = [str(getattr(leaf, "shape", type(leaf).__name__)) for _, leaf in _leaves([data.dataset[0]])]
    return {"count": len(data), "shapes": shapes, "digest": looks[0] if looks[0] == looks[1] else ""}


def _leaves(items: Any) -> Iterator[tuple[str, Tensor]]:
    for item in items:
        for leaf in pytree.tree_leaves(item):
            if isinstance(leaf, Tensor):
                yield "", leaf
            elif isinstance(leaf, (str, bytes)):
                raw = leaf.encode() if isinstance(leaf, str) else leaf
                yield "text", torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
            else:
                array = np.asarray(leaf)
                yield (
                    str(array.dtype),
                    (torch.from_numpy(np.ascontiguousarray(array)) if array.dtype.kind in "fiub" else torch.zeros(0)),
                )


def compared(recorded: Fingerprint, found: Fingerprint, what: str) -> list[str]:
    """Differences between two fingerprints, in words."""
    differences = []
    for key in recorded.keys() | found.keys():
        old, new = recorded.get(key), found.get(key)
        if old == new or (key == "digest" and not (old and new)):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            shown = [
                f"`{brief(name)}` is {brief(new.get(name, 'missing'))}, not {brief(old.get(name, 'there'))}"
                for name in names[:3]
            ]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            differences.append(f"{what}: {'; '.join(shown)}{more}")
        elif key == "digest":
            differences.append(f"{what}: its content differs")
        else:
            differences.append(f"{what}: {brief(key)} is {brief(new)}, not {brief(old)}")
    return sorted(differences)
