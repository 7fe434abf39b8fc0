"""Samples that a network takes, found out by giving it one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, Int, PyTree
from pathkernel.errors import InputError, PathKernelError
from pathkernel.gradients.forward_derivatives import REFUSALS
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import check_rows, count, take

SHAPES = {
    "in_features": "(n, …, {})",
    "input_size": "(n, …, {})",
    "embed_dim": "(n, …, {})",
    "in_channels": "(n, {}, …)",
    "num_features": "(n, {}, …)",
    "normalized_shape": "(n, …, {})",
}
"""Attributes of torch's layers that say what they take."""


def with_floats(inputs: PyTree, dtype: torch.dtype) -> PyTree:
    """Integers and booleans as floating-point numbers, for networks that take no integers."""
    return pytree.tree_map(lambda leaf: leaf if leaf.is_floating_point() else leaf.to(dtype), inputs)


def with_integers(inputs: PyTree) -> PyTree:
    """Whole numbers as integers: scikit-learn makes floating-point numbers of token ids. None where they are not whole.

    Nor are numbers so large that their floating type does not tell them from their neighbours.
    """
    for leaf in pytree.tree_leaves(inputs):
        if leaf.is_floating_point():
            told_apart = leaf.abs() < 1 / torch.finfo(leaf.dtype).eps
            if not bool((told_apart & (leaf == leaf.round())).all()):
                return None
    return pytree.tree_map(lambda leaf: leaf.to(torch.int64) if leaf.is_floating_point() else leaf, inputs)


class Acceptance:
    """Prepares samples for a network as it takes them: with integers in its floating type where it takes no integers.

    Every new shape and type is tried with one sample, which is passed through the network.

    Parameters
    ----------
    function
        The network.
    theta
        θ at which it is tried, (P,).
    asker
        Who is given the samples, for messages.
    """

    def __init__(self, function: ModelFunction, theta: Float[Tensor, " P"], asker: str) -> None:
        self.function, self.theta, self.asker = function, theta, asker
        self._conversions: dict[Any, Callable[[PyTree], PyTree]] = {}

    def __call__(self, inputs: PyTree) -> PyTree:
        """The samples, converted if need be.

        Raises
        ------
        InputError
            For samples that the network refuses, or makes no finite numbers of, with the row.
        """
        check_rows(inputs, self.asker)
        if not count(inputs):
            return inputs
        leaves, tree = pytree.tree_flatten(inputs)
        key = (tree, *((leaf.shape[1:], leaf.dtype) for leaf in leaves))
        if key not in self._conversions:
            with generators_untouched():  # networks that draw from them are refused elsewhere
                self._conversions[key] = self._conversion(inputs)
        converted = self._conversions[key](inputs)
        if converted is None:  # only the first sample had whole numbers
            raise InputError(
                f"`{self.asker}` was given numbers with a fraction, for a network that takes integers",
                "Whole numbers, such as token ids, are converted",
                "Pass integers, `X.astype(int)`",
            )
        check_finite(self.function, self.theta, converted, self.asker)
        return converted

    def _conversion(self, inputs: PyTree) -> Callable[[PyTree], PyTree]:
        one = take(inputs, slice(0, 1))
        leaves = pytree.tree_leaves(inputs)
        if all(leaf.dim() == 1 for leaf in leaves) and not self._takes_scalars(one):
            raise single_sample(self.asker, "Tangent kernels", tuple(leaves[0].shape))
        error = self._refusal(one)
        if error is None:
            return lambda samples: samples
        for conversion in (lambda samples: with_floats(samples, self.function.dtype), with_integers):
            changed = conversion(one)
            if changed is not None and self._refusal(changed) is None:
                return conversion
        if self._refusal(take(inputs, slice(0, 3))) is None:  # no function of one sample, as is said elsewhere
            return lambda samples: samples
        raise self._refused(inputs, error)

    def _refusal(self, inputs: PyTree) -> Exception | None:
        """Exception that the network raises."""
        try:
            self.function.outputs(self.theta, inputs)
        except PathKernelError:
            raise
        except REFUSALS as error:
            return error
        return None

    def _takes_scalars(self, one: PyTree) -> bool:
        """Test that n numbers are n samples to the network, not one: it gives as many answers, for any n."""
        return all(self._answers(one, n) == n for n in (2, 3))

    def _answers(self, one: PyTree, n: int) -> int:
        for conversion in (lambda samples: samples, lambda samples: with_floats(samples, self.function.dtype)):
            try:
                return len(self.function.outputs(self.theta, conversion(pytree.tree_map(lambda x: x.expand(n), one))))
            except REFUSALS:
                continue
        return 0

    def _refused(self, inputs: PyTree, error: Exception) -> InputError:
        shapes = ", ".join(f"{tuple(leaf.shape)} {_name(leaf.dtype)}" for leaf in pytree.tree_leaves(inputs))
        layer, given = _where(error)
        expected = next((text.format(getattr(layer, key)) for key, text in SHAPES.items() if hasattr(layer, key)), None)
        found = "" if layer is None else f" in `{_shown(layer)}`, which was given {given},"
        return InputError(
            f"`{self.asker}` was given samples of shape {shapes}, and the network fails{found} with: "
            f"{str(error).strip().splitlines()[0] if str(error) else type(error).__name__}",
            f"The network takes samples of shape {expected}" if expected else "The network has to take the samples",
            "Pass X with one row for each sample, shaped as the network takes them",
        )


def single_sample(asker: str, kernels: str, shape: tuple[int, ...]) -> InputError:
    """The refusal of a single row, as scikit-learn's pairwise callers pass them."""
    return InputError(
        f"`{asker}` was called with a single sample of shape {shape}, as KernelRidge, KernelPCA and Nystroem do pair "
        "by pair",
        f"{kernels} take whole arrays of samples",
        'Write `make_pipeline(PathKernelTransformer(kernel), KernelRidge(kernel="precomputed"))`, or pass `X[None]` '
        "(`numpy.stack(X)` for a list of rows)",
    )


def check_finite(function: ModelFunction, theta: Float[Tensor, " P"], inputs: PyTree, asker: str) -> None:
    """Refuse samples with NaN or infinities, unless the network's outputs and gradients are finite, as with masks.

    Raises
    ------
    InputError
        That names the first such row.
    """
    rows = not_finite(inputs)
    if len(rows) and not _is_finite(function, theta, take(inputs, rows)):
        wrong = [row for row in rows if not _is_finite(function, theta, take(inputs, row[None]))]
        raise named_rows(asker, wrong or list(rows), "samples")


def not_finite(tree: PyTree) -> Int[Tensor, " rows"]:
    """The rows in which some number is NaN or infinite."""
    wrong = torch.zeros(count(tree), dtype=torch.bool)
    for leaf in pytree.tree_leaves(tree):
        if leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            wrong |= ~leaf.reshape(len(leaf), -1).isfinite().all(dim=1).cpu()
    return wrong.nonzero().flatten()


def named_rows(asker: str, rows: Sequence[Tensor], what: str) -> InputError:
    """The refusal of rows that are not finite."""
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return InputError(
        f"`{asker}` was given {what} with NaN or infinite numbers: row {int(rows[0])}{more}",
        "Outputs and gradients have to be finite",
        "Fill in what is missing, as with `sklearn.impute.SimpleImputer`, or leave these rows out",
    )


def _is_finite(function: ModelFunction, theta: Float[Tensor, " P"], inputs: PyTree) -> bool:
    """Test that the sum of all outputs and its gradient are finite."""
    point = function.cast(theta).detach().requires_grad_(True)
    try:
        with function.evaluating(gradients=True):
            outputs = function.batch(function.layout.unflatten(point), function.cast(inputs))
            (gradient,) = torch.autograd.grad(outputs.sum(), point)
    except REFUSALS:
        return False
    return bool(outputs.isfinite().all() and gradient.isfinite().all())


def _where(error: Exception) -> tuple[nn.Module | None, str]:
    """The innermost module whose ``forward`` raised, and the shapes of the tensors that it was given."""
    layer, given = None, ""
    for frame in _frames(error):
        own = frame.f_locals.get("self")
        if frame.f_code.co_name == "forward" and isinstance(own, nn.Module):
            names = frame.f_code.co_varnames[1 : frame.f_code.co_argcount]
            tensors = [v for v in pytree.tree_leaves([frame.f_locals.get(n) for n in names]) if isinstance(v, Tensor)]
            layer, given = own, ", ".join(f"{tuple(t.shape)} {_name(t.dtype)}" for t in tensors) or "no tensor"
    return layer, given


def _frames(error: Exception) -> Iterator[Any]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _shown(layer: nn.Module) -> str:
    return type(layer).__name__ if any(True for _ in layer.children()) else repr(layer)[:80]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
