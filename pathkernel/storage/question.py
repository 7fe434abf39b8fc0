"""Questions that stored answers belong to: settings in words, and in numbers what a question does.

Functions have no identity that a file could hold: two lambdas have one name, and two closures one code. So a question
is known again by what it makes of outputs, its values and its gradients, which are compared within rounding.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.per_sample import OutputFunctional
from pathkernel.gradients.pytrees import count, take
from pathkernel.runtime.checksum import condensed
from pathkernel.storage.fingerprints import compared, data_identity, digest, loss_identity, named
from pathkernel.trajectory.trajectory import Trajectory

Identity = Mapping[str, Any]
"""Text by name, and numbers as `numbers` gives them."""

SAMPLES = 64
"""Queries that a question is asked of; the queries themselves are compared to the last bit."""
OUTPUTS = 2**20
"""Most outputs that are held at once."""
ARBITRARY = 8
"""Vectors of outputs that no network gave."""
SCALES = (0.3, 1.0, 3.0)
LENGTH = 16
"""Numbers of a row; of more, as many weighted sums."""
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}
"""What a function of a few outputs may differ by, relative to the largest number of a row."""
NETWORK_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""What may differ by the rounding of whole passes through a network, on another machine or with other threads."""
DEPTH = 8
"""Of values within values."""
TEXT = 1000
"""Characters of a description, of which a longer one keeps the digest."""
OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial)


# -- in words -------------------------------------------------------------------------------------------------------


def identity_of(trajectory: Trajectory, **settings: Any) -> dict[str, Any]:
    """Identity that must be the same for a computation to be gone on with: the path, and what is made of it."""
    middle, objective = len(trajectory) // 2, trajectory.objective
    points = {"initial": trajectory.initial, "middle": trajectory.vector(middle), "final": trajectory.final}
    state = {**trajectory.constants, **{f"final {name}": value for name, value in trajectory.final_buffers.items()}}
    return {
        "trajectory": f"{len(trajectory)} steps of {trajectory.rule.name}, {digest(points.items())}",
        "state": digest(sorted(state.items())),
        "training": f"{loss_identity(objective.loss)}, {objective.reduction}, {sorted(objective.regularizers)}",
        "data": str(data_identity(trajectory.data)),
        **{key: value if isinstance(value, Mapping) else str(value) for key, value in settings.items()},
    }


def samples_identity(X: PyTree) -> str:
    """Number and digest of samples, by their places in whatever holds them."""
    leaves = [(pytree.keystr(place), leaf) for place, leaf in pytree.tree_flatten_with_path(X)[0] if _is_tensor(leaf)]
    return f"{len(leaves[0][1]) if leaves else 0} samples, {digest(leaves)}"


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def described(value: Any, argument: str) -> str:
    """A setting in words that another process finds too: its class, and what it holds.

    Parameters
    ----------
    value
        A number, text, a tensor, or an object that holds such.
    argument
        Under which name the user gave it.

    Raises
    ------
    InputError
        For an object that holds anything else, such as a function.
    """
    text = _described(value, DEPTH)
    if text is None:
        raise InputError(
            f"`{argument}={value!r}` was given together with `store=`",
            "A stored answer is found again by what it depends on, and functions and other objects without values of "
            "their own cannot be told from others",
            f"Give `{argument}` a class whose attributes are numbers, text or tensors, or leave `store` out",
        )
    return text


def _described(value: Any, depth: int) -> str | None:
    """None where it cannot be said."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return repr(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return f"tensor {digest([('', value)])}"
    if depth == 0 or isinstance(value, OPAQUE):
        return None
    if isinstance(value, (list, tuple)):
        held: Mapping[Any, Any] = dict(enumerate(value))
    elif isinstance(value, (set, frozenset)):
        held = dict(enumerate(sorted(value, key=repr)))
    elif isinstance(value, Mapping):
        held = value
    else:
        slots = [name for cls in type(value).__mro__ for name in _slots(cls)]
        held = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
        if not slots and not hasattr(value, "__dict__"):
            return None
    parts = {repr(key): _described(own, depth - 1) for key, own in held.items()}
    if None in parts.values():
        return None
    text = ", ".join(f"{key}: {own}" for key, own in sorted(parts.items()))
    # The whole run of an average's moves, for example: what is written down anew with each block stays small.
    short = text if len(text) <= TEXT else hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return f"{named(type(value))}({short})"


def _slots(cls: type) -> Iterable[str]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else slots
    return (name for name in names if name not in ("__dict__", "__weakref__"))


# -- in numbers -----------------------------------------------------------------------------------------------------


def numbers(rows: Iterable[Tensor], tolerance: float) -> dict[str, Any]:
    """Rows of numbers that may differ by rounding, relative to the largest of each; NaN and infinity as None."""
    plain = [condensed(row.detach().double().reshape(1, -1), LENGTH)[0].tolist() for row in rows]
    return {"rows": [[v if np.isfinite(v) else None for v in row] for row in plain], "tolerance": tolerance}


def is_ours(value: Any) -> bool:
    """True for a setting of the package: its name and its values say what it does, and those of others' may not.

    Two classes of a user's may have one name, and the code of one may change.
    """
    return type(value).__module__.partition(".")[0] in ("pathkernel", "builtins")


def behaviour(
    functional: OutputFunctional, points: Sequence[tuple[ModelFunction, Tensor]], inputs: PyTree, context: PyTree
) -> dict[str, Any]:
    """Numbers that tell a question from others by what it does.

    Its values and gradients on the outputs of the queries at a few θ, which tell networks apart as well; and on outputs
    that no network gave, to the rounding of the function itself.

    Parameters
    ----------
    functional
        h.
    points
        The network with θ, a few times: functions that agree at one θ need not be the same.
    inputs, context
        The queries.

    Raises
    ------
    InputError
        For a function that fails, or that gives another answer to the same outputs.
    """
    function, theta = points[0]
    n = count(inputs)
    size = function.outputs(theta, take(inputs, slice(0, 1))).shape[1]
    few = torch.linspace(0, n - 1, max(1, min(n, SAMPLES, OUTPUTS // size))).long().unique()
    inputs, context = take(inputs, few), function.cast(take(context, few))
    network, own = NETWORK_ROUNDING[function.dtype], ROUNDING[function.dtype]
    with generators_untouched():
        outputs = [f.outputs(theta, inputs, block=8) for f, theta in points]
        try:
            found = [_values_and_gradients(functional, z, context) for z in outputs]
            again = _values_and_gradients(functional, outputs[-1], context)
        except Exception as error:
            raise InputError(
                f"`outputs=` fails on the outputs of a query ({type(error).__name__}: {str(error)[:200]})",
                "A function of the outputs takes one sample's outputs (C,) and returns a scalar that depends on them",
                "Write for example `outputs=lambda z: z[0] - z[1]`",
            ) from error
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found[-1], again, strict=True)):
            raise InputError(
                "`outputs=` gave two answers for the same outputs, and `store=` was given",
                "A stored answer is found again by what its question does, which must be the same every time",
                "Draw random numbers once, outside of the function, or leave `store` out",
            )
        try:
            arbitrary = _arbitrary(size).to(outputs[0])
            places = torch.arange(len(arbitrary)) % len(few)
            rows = _values_and_gradients(functional, arbitrary, take(context, places))
        except Exception:  # it may be made for some outputs alone, such as probabilities
            rows = (torch.zeros(0, 1), torch.zeros(0, 1))
    values, gradients = (torch.cat([kind.reshape(-1) for kind in kinds]) for kinds in zip(*found, strict=True))
    return {
        "values": numbers([values], network),
        "gradients": numbers([gradients], network),
        "function": numbers([*rows[0], *rows[1]], own),
    }


def _values_and_gradients(functional: OutputFunctional, outputs: Tensor, context: PyTree) -> tuple[Tensor, Tensor]:
    """h (n, K), and the gradient of a weighted sum of its components in the outputs, (n, C), one by one."""
    values, gradients = [], []
    for place, row in enumerate(outputs):
        z = row.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            h = functional(z, take(context, place)).reshape(-1)
            total = (h * torch.cos(torch.arange(len(h), dtype=h.dtype, device=h.device))).sum()
            gradient = torch.autograd.grad(total, z, allow_unused=True)[0] if total.requires_grad else None
        values.append(h.detach())
        gradients.append(torch.zeros_like(row) if gradient is None else gradient)
    return torch.stack(values), torch.stack(gradients)


def _arbitrary(size: int) -> Tensor:
    """Outputs (n, C) that depend on nothing."""
    few = max(len(SCALES), min(ARBITRARY, OUTPUTS // size))
    drawn = np.random.default_rng(0).standard_normal((few, min(size, OUTPUTS)))
    scaled = drawn * np.resize(SCALES, few)[:, None]
    return torch.from_numpy(np.stack([np.resize(row, size) for row in scaled]))


def nearby(trajectory: Trajectory) -> Tensor:
    """A θ that is not on the path: between its ends, and a twentieth aside."""
    middle = (trajectory.initial.double() + trajectory.final.double()) / 2
    aside = 1 + 0.05 * torch.cos(torch.arange(middle.numel(), dtype=torch.float64, device=middle.device))
    return (middle * aside).to(trajectory.initial.dtype)


# -- compared -------------------------------------------------------------------------------------------------------


def differences(recorded: Identity, found: Identity, kind: str) -> list[str]:
    """Differences between two questions, in words."""
    numeric = [key for key, value in found.items() if isinstance(value, Mapping)]
    old, new = ({key: value for key, value in one.items() if key not in numeric} for one in (recorded, found))
    others = [key for key in numeric if not _close(recorded.get(key), found[key])]
    other = [f"{kind}: what is asked gives other numbers ({', '.join(others)})"] if others else []
    return compared(old, new, kind) + other


def _close(recorded: Any, found: Mapping[str, Any]) -> bool:
    old = recorded.get("rows", []) if isinstance(recorded, Mapping) else []
    return len(old) == len(found["rows"]) and all(
        _close_row(a, b, found["tolerance"]) for a, b in zip(old, found["rows"], strict=True)
    )


def _close_row(old: Sequence[float | None], new: Sequence[float | None], tolerance: float) -> bool:
    if [v is None for v in old] != [v is None for v in new]:
        return False
    scale = max((abs(v) for v in (*old, *new) if v is not None), default=0.0)
    pairs = ((a, b) for a, b in zip(old, new, strict=True) if a is not None and b is not None)
    return all(abs(a - b) <= tolerance * scale for a, b in pairs)
