"""`TangentKernel`: the empirical neural tangent kernel of a network at one θ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathkernel._typing import Loss, Parameters, PyTree
from pathkernel.errors import InputError, ModelMismatchError, check
from pathkernel.functional import ModelFunction
from pathkernel.parameters import ParameterLayout, constants_of, named_trainable
from pathkernel.pytrees import as_tensors, cast_floating, count, memory_bytes
from pathkernel.tangent_kernel.engine import Engine
from pathkernel.tangent_kernel.jacobian import JacobianEngine
from pathkernel.tangent_kernel.layerwise import LayerwiseEngine
from pathkernel.tangent_kernel.outputs import OutputSelection, select_outputs
from pathkernel.tangent_kernel.products import kernel_vector_product

ENGINES: dict[str, type[Engine]] = {"auto": LayerwiseEngine, "layerwise": LayerwiseEngine, "jacobian": JacobianEngine}


def make_engine(engine: str, function: ModelFunction, selection: OutputSelection, memory: int | str) -> Engine:
    """The engine of that name, or the best one for ``"auto"``."""
    check(
        engine in ENGINES,
        InputError,
        f"`engine={engine!r}` was given",
        f"Engines are {', '.join(map(repr, ENGINES))}",
        'Write `engine="auto"`',
    )
    return ENGINES[engine](function, selection, memory_bytes(memory))


def split_samples(X: PyTree, selection: OutputSelection, dtype: torch.dtype) -> tuple[PyTree, PyTree]:
    """Inputs of a kernel and the context of its output function, as tensors."""
    if selection.with_targets:
        check(
            isinstance(X, (tuple, list)) and len(X) == 2,
            InputError,
            f"A kernel of losses was given a {type(X).__name__}",
            "The loss of a sample needs its target",
            "Pass samples as pairs: `kernel((X, y))`",
        )
        return as_tensors(X[0], dtype), cast_floating(as_tensors(X[1], dtype), dtype)
    inputs = as_tensors(X, dtype)
    return inputs, torch.zeros(count(inputs), 0)


class TangentKernel:
    r"""Empirical neural tangent kernel at one θ.

    .. math:: \hat\Theta(x, x') = \nabla_\theta f(x; \theta)\, \nabla_\theta f(x'; \theta)^\top

    Parameters
    ----------
    model
        Any module that treats samples independently; evaluated in eval mode, in blocks through `torch.func`.
    parameters
        θ by name, all or some of the model's parameters; by default the trainable ones at their present values. The
        kernel keeps copies: later training does not change it.
    outputs
        ``"trace"`` (default), ``"mean"``, ``"sum"``, an index, ``"full"``, ``"loss"`` or a callable; see
        `pathkernel.tangent_kernel.outputs.select_outputs`.
    engine
        ``"auto"`` or ``"jacobian"``.
    memory
        Budget for intermediate rows, as bytes or text.
    dtype
        Floating type of the arithmetic, by default the parameters'. Sums over blocks are float64.
    loss
        ``(output, target)``, for ``outputs="loss"``.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> kernel = pk.TangentKernel(torch.nn.Linear(3, 1))
    >>> kernel(torch.eye(3)).tolist()  # ⟨x, x'⟩ + 1
    [[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]]

    References
    ----------
    Jacot et al. 2018, "Neural tangent kernel" (1806.07572); Novak et al. 2022 (2206.08720) for its cost.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters | None = None,
        *,
        outputs: Any = "trace",
        engine: str = "auto",
        memory: int | str = "1GB",
        dtype: torch.dtype | None = None,
        loss: Loss | None = None,
    ) -> None:
        chosen = _chosen_parameters(model, parameters)
        layout = ParameterLayout.of(chosen)
        self.theta = layout.flatten({name: p.detach() for name, p in chosen.items()})
        function = ModelFunction(model, layout, constants_of(model, layout), dtype or self.theta.dtype)
        self.selection = select_outputs(outputs, loss)
        self.function, self.engine = function, make_engine(engine, function, self.selection, memory)

    def __call__(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Kernel matrix.

        Parameters
        ----------
        X, Y
            n and m samples (queries and columns); Y None stands for X. Pairs ``(inputs, targets)`` for
            ``outputs="loss"``.

        Returns
        -------
        numpy.ndarray
            float64 (n, m), or (n, m, C, C) for ``outputs="full"``.
        """
        x, context_x = split_samples(X, self.selection, self.function.dtype)
        if Y is None or Y is X:
            return self.engine.gram(self.theta, x, None, context_x, None, None).numpy()
        y, context_y = split_samples(Y, self.selection, self.function.dtype)
        return self.engine.gram(self.theta, x, y, context_x, context_y, None).numpy()

    def diagonal(self, X: PyTree) -> np.ndarray:
        """K(x, x) for every sample: (n,), or (n, C, C) for ``outputs="full"``."""
        x, context = split_samples(X, self.selection, self.function.dtype)
        return self.engine.diagonal(self.theta, x, context, None).numpy()

    def matvec(self, X: PyTree, v: np.ndarray | Tensor) -> np.ndarray:
        """K(X, X) v without the matrix, v (n,), or (n, C) for ``outputs="full"``."""
        x, context = split_samples(X, self.selection, self.function.dtype)
        vector = torch.as_tensor(v)
        check(
            vector.shape[:1] == (count(x),) and vector.dim() == (2 if self.selection.combine == "full" else 1),
            InputError,
            f"`matvec` was given {count(x)} samples and a vector of shape {tuple(vector.shape)}",
            "The vector has one entry for each row of the kernel matrix",
            "Pass v of shape (n,), or (n, C) for `outputs='full'`",
        )
        return kernel_vector_product(self.function, self.selection, self.theta, x, context, vector).numpy()

    def explain(self) -> str:
        """Which engine computes this kernel, in which precision, under which budget."""
        return (
            f"TangentKernel of {self.selection.name!r}: P = {self.function.layout.size} parameters, "
            f"engine {self.engine.name!r}, {str(self.function.dtype).removeprefix('torch.')} products accumulated in "
            f"float64, memory budget {self.engine.memory / 1e6:.0f} MB"
        )

    def __repr__(self) -> str:
        return f"<{self.explain()}>"

    def __sklearn_clone__(self) -> TangentKernel:
        return self


def _chosen_parameters(model: nn.Module, parameters: Parameters | None) -> Parameters:
    """The parameters that make up θ, checked against the model's."""
    own = dict(model.named_parameters())
    if parameters is None:
        chosen: Parameters = named_trainable(model)
    else:
        chosen = parameters
    wrong = [
        f"`{name}` {tuple(p.shape)}" for name, p in chosen.items() if name not in own or own[name].shape != p.shape
    ]
    check(
        not wrong,
        ModelMismatchError,
        f"`parameters` holds {', '.join(wrong)}",
        "Names and shapes must be those of `model.named_parameters()`",
        "Pass `parameters=trajectory.parameters(s)` of this very model",
    )
    check(
        len(chosen) > 0,
        InputError,
        "The model has no trainable parameters",
        "A tangent kernel is made of gradients in the parameters",
        "Set `requires_grad_(True)` on some, or name them in `parameters`",
    )
    return chosen


