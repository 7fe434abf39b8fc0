"""`TangentKernel`: the empirical neural tangent kernel of a network at one θ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, Parameters, PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.acceptance import Acceptance, named_rows, not_finite
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout, constants_of
from pathkernel.gradients.pytrees import as_tensors, cast_floating, check_rows, copied_samples, count, take
from pathkernel.gradients.sample_wise import check_module, check_sample_wise
from pathkernel.kernels.kernel import Kernel
from pathkernel.runtime.pickling import check_picklable
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.runtime.transfers import received
from pathkernel.tangent_kernel.cost.model import CostRow
from pathkernel.tangent_kernel.cost.table import cost_rows, precision
from pathkernel.tangent_kernel.cost.table import describe as cost_table
from pathkernel.tangent_kernel.engines.auto import EngineValue, make_engine
from pathkernel.tangent_kernel.engines.engine import Engine
from pathkernel.tangent_kernel.engines.products import error_of_engine
from pathkernel.tangent_kernel.engines.projection import Projection, ProjectionEngine
from pathkernel.tangent_kernel.filters import ParameterFilter, chosen_parameters
from pathkernel.tangent_kernel.kernel_products import Point, Term
from pathkernel.tangent_kernel.lazy_operator import kernel_operator
from pathkernel.tangent_kernel.outputs import LossOfOutputs, MarginOfOutputs, OneOutput, OutputSelection, select_outputs
from pathkernel.tangent_kernel.precision import asked_precision

if TYPE_CHECKING:
    from pathkernel.tangent_kernel.operators import KernelOperator


def split_samples(X: PyTree, selection: OutputSelection, dtype: torch.dtype, asker: str) -> tuple[PyTree, PyTree]:
    """Inputs of a kernel and the context of its output function, as tensors; the asker is named in messages."""
    if selection.with_targets:
        if not isinstance(X, (tuple, list)) or len(X) != 2:
            raise InputError(
                f"A kernel of {'margins' if selection.name == 'margin' else 'losses'} was given a {type(X).__name__}",
                f"The {selection.name} of a sample needs its target",
                "Pass samples as pairs: `kernel((X, y))`",
            )
        inputs, targets = as_tensors(X[0], dtype), cast_floating(as_tensors(X[1], dtype), dtype)
        check_rows((inputs, targets), asker)
        if len(rows := not_finite(targets)):
            raise named_rows(asker, list(rows), "targets")
        return inputs, targets
    inputs = as_tensors(X, dtype)
    check_rows(inputs, asker)
    return inputs, torch.zeros(count(inputs), 0)


def learn_structure(
    selection: OutputSelection, function: ModelFunction, theta: Tensor, inputs: PyTree, targets: PyTree
) -> None:
    """Tell a loss or a margin in what form the network returns its outputs, from one sample; targets are checked."""
    if selection.structure is not None and selection.structure.returned is None and count(inputs):
        with function.evaluating(gradients=False):
            one = function.cast(take(inputs, slice(0, 1)))
            selection.structure.learn(function.call(function.parameters(theta), one))
    if isinstance(selection.function, (LossOfOutputs, MarginOfOutputs)) and count(inputs):
        selection.function.check(function.cast(targets))


def no_samples(asker: str) -> InputError:
    """The refusal of an empty X where a result of nothing would mean nothing."""
    return InputError(
        f"`{asker}` was given no samples",
        "One sample or more is needed; the kernel matrix alone may be empty",
        "Leave the call out where X is empty",
    )


class TangentKernel(Kernel):
    r"""Empirical neural tangent kernel at one θ.

    .. math:: \hat\Theta(x, x') = \nabla_\theta f(x; \theta)\, \nabla_\theta f(x'; \theta)^\top

    Parameters
    ----------
    model
        Any module that treats samples independently, evaluated in eval mode; three samples together and one by one must
        agree. It is never run or changed: passes run on a copy of its structure.
    parameters
        θ by name, all or some of the model's parameters; or which of the trainable ones make up θ, at their present
        values: a name or glob (``"layers.*.weight"``), a list of them, or a callable ``(name, parameter) -> bool``;
        by default all of them. The rest, and what is frozen, are constants and cost nothing. The kernel keeps copies:
        later training does not change it.
    outputs
        ``"trace"`` (default), ``"mean"``, ``"sum"``, an index, ``"full"``, ``"loss"``, ``"margin"`` or a callable; see
        `pathkernel.tangent_kernel.outputs.select_outputs`.
    engine
        ``"auto"`` (default), ``"layerwise"``, ``"jacobian"`` (rows of gradients by `torch.func`), ``"products"`` (one
        column at a time), a subclass of `pathkernel.tangent_kernel.engines.Engine`, or a value that makes an engine,
        such as a projection; see `describe`.
    memory
        Budget for what is held at once beside inputs and result, as bytes or text. Up to three quarters of it are kept
        for the next call, for as long as this object lives.
    dtype
        Floating type of passes and products, by default the parameters': ``torch.float64``, ``torch.float32``, or
        ``torch.bfloat16`` for passes in float32 and products of factors rounded to bfloat16, at an error of
        1e-3 to 4e-3 (relative, Frobenius; `benchmarks/engines.py` prints it). ``"tf32"``, on an NVIDIA GPU of compute
        capability 8.0 or later, rounds these factors to TensorFloat-32 instead, of three more bits; whatever torch was
        told, float32 is exact without it. The matrix is float64 in each case.
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
        parameters: Parameters | ParameterFilter | None = None,
        *,
        outputs: Any = "trace",
        engine: str | EngineValue | type[Engine] = "auto",
        memory: int | str = "1GB",
        dtype: torch.dtype | str | None = None,
        loss: Loss | None = None,
    ) -> None:
        check_module(model)
        chosen = chosen_parameters(model, parameters)
        layout = ParameterLayout.of(chosen)
        theta = layout.flatten({name: p.detach() for name, p in chosen.items()})
        left_out = {
            name: "not among `parameters`" if p.requires_grad else "frozen"
            for name, p in model.named_parameters()
            if name not in chosen
        }
        floating, tensor_floats = asked_precision(dtype, theta.device)
        self._make(
            {
                "model": model,
                "layout": layout,
                "theta": theta,
                "constants": constants_of(model, layout),
                "dtype": floating or theta.dtype,
                "tensor_floats": tensor_floats,
                "selection": select_outputs(outputs, loss),
                "engine": engine,
                "memory": memory,
                "left_out": left_out,
            }
        )

    def _make(self, made_of: dict[str, Any]) -> None:
        """Everything from what a kernel is made of, which is all that is saved of it."""
        self._made_of, self.theta, self.selection = made_of, made_of["theta"], made_of["selection"]
        function = ModelFunction(made_of["model"], made_of["layout"], made_of["constants"], made_of["dtype"])
        tensor_floats = made_of.get("tensor_floats", False)  # pickles of before lack it
        self.engine = make_engine(made_of["engine"], function, self.selection, made_of["memory"], tensor_floats)
        self.function = self.engine.function
        self._accept = Acceptance(self.function, self.theta, "TangentKernel")
        self._left_out = made_of["left_out"]

    def __getstate__(self) -> dict[str, Any]:
        made_of = self._made_of
        check_picklable(model=made_of["model"], outputs=self.selection, engine=made_of["engine"])
        return {**made_of, "chosen": dict(self.engine.choices)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        made_of = dict(state)
        chosen = made_of.pop("chosen")
        self._make(made_of)
        self.engine.choices.update(chosen)

    def _samples(self, X: PyTree) -> tuple[PyTree, PyTree]:
        """Inputs and context; a loss is told in what form the network returns its outputs."""
        x, context = split_samples(X, self.selection, self.function.dtype, "TangentKernel")
        x = self._accept(x)
        check_sample_wise(self.function, self.theta, x)
        if isinstance(self.selection.function, OneOutput) and count(x):
            self.selection.function.check(self.function.outputs(self.theta, take(x, slice(0, 1))).shape[1])
        learn_structure(self.selection, self.function, self.theta, x, context)
        return x, context

    def _some_samples(self, X: PyTree) -> tuple[PyTree, PyTree]:
        """Inputs and context of one sample or more."""
        x, context = self._samples(X)
        if not count(x):
            raise no_samples("TangentKernel")
        return x, context

    def _block(self, inputs: PyTree) -> tuple[int, ...]:
        """Shape of an entry of the matrix, told from samples of which there may be none."""
        if self.selection.combine != "full":
            return ()
        zeros = pytree.tree_map(lambda leaf: leaf.new_zeros((1, *leaf.shape[1:])), inputs)
        return (self.function.outputs(self.theta, self._accept(zeros)).shape[1],) * 2

    @one_at_a_time
    def __call__(self, X: PyTree, Y: PyTree | None = None) -> np.ndarray:
        """Kernel matrix.

        Parameters
        ----------
        X, Y
            n and m samples (queries and columns); Y None stands for X. Pairs ``(inputs, targets)`` for
            ``outputs="loss"`` and ``outputs="margin"``.

        Returns
        -------
        numpy.ndarray
            float64 (n, m), or (n, m, C, C) for ``outputs="full"``.
        """
        x, context_x = self._samples(X)
        y, context_y = (None, None) if Y is None or Y is X else self._samples(Y)
        if not count(x) or (y is not None and not count(y)):
            columns = x if y is None else y
            return np.zeros((count(x), count(columns), *self._block(columns if count(columns) else x)))
        return received(self.engine.gram(self.theta, x, y, context_x, context_y, None), self.engine.workspace)

    @one_at_a_time
    def diagonal(self, X: PyTree) -> np.ndarray:
        """K(x, x) for every sample: (n,), or (n, C, C) for ``outputs="full"``."""
        x, context = self._samples(X)
        if not count(x):
            return np.zeros((0, *self._block(x)))
        return self.engine.diagonal(self.theta, x, context, None).cpu().numpy()

    @one_at_a_time
    def matvec(self, X: PyTree, v: np.ndarray | Tensor) -> np.ndarray:
        """K(X, X) v without the matrix, v (n,), or (n, C) for ``outputs="full"``.

        For many products at the same samples, see `operator`.
        """
        n, vector = count(self._some_samples(X)[0]), np.asarray(v, dtype=np.float64)
        if not (vector.shape[:1] == (n,) and vector.ndim == (2 if self.selection.combine == "full" else 1)):
            raise InputError(
                f"`matvec` was given {n} samples and a vector of shape {tuple(vector.shape)}",
                "The vector has one entry for each row of the kernel matrix",
                "Pass v of shape (n,), or (n, C) for `outputs='full'`",
            )
        return self.operator(X).matvec(vector.reshape(-1)).reshape(vector.shape)

    def operator(self, X: PyTree, Y: PyTree | None = None) -> KernelOperator:
        """K(X, Y) as a linear operator that is never formed, for `scipy.sparse.linalg`.

        Parameters
        ----------
        X, Y
            n and m samples; Y None stands for X.

        Returns
        -------
        KernelOperator
            float64 (n, m), or (n C, m C) for ``outputs="full"``; symmetric for Y None.
        """
        same = Y is None or Y is X
        rows, columns = copied_samples((self._some_samples(X), None if same else self._some_samples(Y)))
        return kernel_operator([Point(self.theta)], self._engine_at, rows, columns, self.lock)

    @one_at_a_time
    def features(self, X: PyTree, dim: int = 1024, *, kind: str = "tensor", seed: int = 0) -> np.ndarray:
        """Features φ with φφᵀ ≈ K, for N beyond what a Gram matrix holds; the same in every call.

        Parameters
        ----------
        X
            n samples.
        dim
            Length of φ(x); the relative error falls like 1/√dim.
        kind, seed
            The random map, as of `pathkernel.tangent_kernel.engines.projection.Projection`.

        Returns
        -------
        numpy.ndarray
            float64 (n, dim), or (n, C, dim) for ``outputs="full"``.

        Notes
        -----
        Time and memory O(n · dim).
        """
        samples, projection = self._some_samples(X), Projection(dim, kind, seed)
        engine = ProjectionEngine(self.function, self.selection, self.engine.memory, projection)
        return engine.features(self.theta, *samples, None).cpu().numpy()

    def _engine_at(self, _: Term) -> Engine:
        return self.engine

    @one_at_a_time
    def cost(self, X: PyTree, n: int | None = None, m: int | None = None) -> list[CostRow]:
        """Costs of an (n, m) matrix on every engine, layer by layer, before it is computed.

        Parameters
        ----------
        X
            Samples like those of the matrix; the first few are passed through the network.
        n, m
            Rows and columns; n None for as many as X has, m None for the symmetric (n, n).

        Returns
        -------
        list of CostRow
            ``engine``, ``layer``, ``way``, ``flops``, ``bytes``, ``peak_bytes``, ``seconds``, ``reason``; an engine's
            rows add up to its cost.
        """
        x, context = self._some_samples(X)
        return cost_rows(self.engine, self.theta, x, context, count(x) if n is None else n, m)

    def describe(self, X: PyTree | None = None, n: int | None = None, m: int | None = None) -> str:
        """Description of the engine, precision and budget of this kernel; given samples, of its cost.

        Once gradients were taken, or given samples, with the parameters that no layer accounts for, and why.

        Parameters
        ----------
        X, n, m
            As for `cost`: with samples, the table of costs is added, layer by layer, with the way taken and why.
        """
        head = (
            f"TangentKernel of {self.selection.name!r}: P = {self.function.layout.size} parameters, "
            f"engine {self.engine.name!r}, {precision(self.engine)}, "
            f"memory budget {self.engine.memory / 1e6:.0f} MB"
        )
        if X is None:
            return "\n".join([head, *self.engine.describe()])
        x, context = self._some_samples(X)
        table = cost_table(self.engine, self.theta, x, context, count(x) if n is None else n, m, self._left_out)
        return f"{head}\n{table}"

    explain = describe
    """Older name of `describe`."""

    @one_at_a_time
    def check(self, X: PyTree) -> float:
        r"""Distance of the kernel matrix of some samples from autograd's, in a random direction.

        .. math:: \max_i \lvert (K u)_i - (J J^\top u)_i \rvert / \max_i \lvert (J J^\top u)_i \rvert

        with the second product by one reverse and one forward pass of the batch as it is, for each output.

        Parameters
        ----------
        X
            n samples.

        Returns
        -------
        float
            At rounding where every row belongs to its sample, of the order of 1 where samples get each other's; NaN
            where torch has no way to J v.
        """
        return error_of_engine(self.engine, self.theta, *self._samples(X), None)

    @property
    def lock(self) -> Any:
        """Lock that one thread holds at a time."""
        return self.function.lock

    def __repr__(self) -> str:
        return f"<{self.describe()}>"
