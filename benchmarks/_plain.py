"""The same work by `torch.func`, written down as plainly as it can be: what engines are faster than, and are right by.

`reference` is the float64 result that errors are measured against.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _workloads import BETAS, EPSILON, LEARNING_RATE, OUTPUTS, Task, loaded, sample_losses
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

Arrays = dict[str, np.ndarray]
Call = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]
"""What is timed, and how its result becomes an (n, m) or (n, m, C, C) array."""

warnings.filterwarnings("ignore", message="There is a performance drop")


def samples_of(task: Task, arrays: Arrays, dtype: torch.dtype) -> tuple[Any, Any]:
    """Queries and references as pairs of inputs and targets."""

    def pair(x: str, y: str) -> tuple[Tensor, Tensor]:
        inputs = torch.from_numpy(arrays[x])
        return inputs.to(dtype) if inputs.is_floating_point() else inputs, torch.from_numpy(arrays[y])

    queries = pair("Xq", "yq")
    return queries, pair("X", "y") if "X" in arrays else queries


class Function:
    """f(θ, x, y) of one sample, θ a dictionary: its outputs (C,), or its loss."""

    def __init__(self, task: Task, arrays: Arrays, dtype: torch.dtype) -> None:
        self.model, self.loss = loaded(task, arrays).to(dtype), task.outputs == "loss"
        self.theta = {name: p.detach() for name, p in self.model.named_parameters()}

    def __call__(self, theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(self.model, theta, x.unsqueeze(0))
        return sample_losses(outputs, y.unsqueeze(0)) if self.loss else outputs[0]

    def rows(self, samples: tuple[Tensor, Tensor], output: int, theta: dict[str, Tensor] | None = None) -> Tensor:
        """∇f_c of each sample, (n, P)."""
        theta = self.theta if theta is None else theta
        gradient = grad(lambda theta, x, y: self(theta, x, y)[output])
        return flat(vmap(gradient, (None, 0, 0))(theta, *samples))

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        pieces = vector.split([p.numel() for p in self.theta.values()])
        return {name: v.view_as(p) for (name, p), v in zip(self.theta.items(), pieces, strict=True)}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


# --------------------------------------------------------------------------------------------- tangent kernels


def tutorial(task: Task, arrays: Arrays) -> Call:
    """The tutorial "Neural tangent kernels" of torch.func: vmap(jacrev) on either side, einsum by parameter."""
    function = Function(task, arrays, torch.float32)
    queries, references = samples_of(task, arrays, torch.float32)
    contraction = {"full": "Naf,Mbf->NMab"}.get(task.outputs, "Naf,Maf->NM")

    def jacobians(samples: tuple[Tensor, Tensor]) -> list[Tensor]:
        jacobian = vmap(jacrev(function), (None, 0, 0))(function.theta, *samples)
        return [j.flatten(2) for j in jacobian.values()]

    def kernel() -> Tensor:
        left, right = jacobians(queries), jacobians(references)
        return torch.stack([torch.einsum(contraction, a, b) for a, b in zip(left, right, strict=True)]).sum(0)

    return kernel, Tensor.numpy


def rows(task: Task, arrays: Arrays, dtype: torch.dtype = torch.float32) -> Call:
    """vmap(grad) for every output into one buffer, one product."""
    if task.kind == "shares":
        return share_rows(task, arrays)
    if task.kind == "path gram":
        return path_rows(task, arrays)
    function, outputs = Function(task, arrays, dtype), 1 if task.outputs == "loss" else OUTPUTS
    queries, references = samples_of(task, arrays, dtype)
    same, n, m = references is queries, len(queries[0]), len(references[0])
    if task.outputs == "full":

        def everything(samples: tuple[Tensor, Tensor]) -> Tensor:
            return torch.cat([function.rows(samples, c) for c in range(outputs)])

        def full() -> Tensor:
            left = everything(queries)
            return (left @ (left if same else everything(references)).T).reshape(outputs, n, outputs, m)

        return full, lambda K: K.permute(1, 3, 0, 2).numpy()

    def trace() -> Tensor:
        total = torch.zeros(n, m, dtype=dtype)
        for c in range(outputs):
            left = function.rows(queries, c)
            total.addmm_(left, (left if same else function.rows(references, c)).T)
        return total

    return trace, Tensor.numpy


def path_rows(task: Task, arrays: Arrays) -> Call:
    """One node of the path, as above; the others cost the same."""
    single = Task(**task.to_json() | {"kind": "gram"})
    return rows(single, arrays)


# -------------------------------------------------------------------------------------------------------- shares


def share_rows(task: Task, arrays: Arrays) -> Call:
    """Shares by rows of gradients over the last `part` steps (all, if 0); the time of a step is that of any other."""
    sweep = ShareSweep(task, arrays, torch.float32)
    return lambda: sweep.run(task.part or task.steps), Tensor.numpy


class ShareSweep:
    r"""The backward sweep, Q rows of gradients and B rows of the batch at a time.

    .. math:: \mathrm{share}_i = \sum_{s : i \in B_s} \tfrac1B \langle c_s, \nabla\ell_i(\theta_s)\rangle,\qquad
              c_s = -\eta\, u_s \;\text{(SGD)},\qquad
              c_s = (1 - \beta_1) m_s,\; m_s = \beta_1 m_{s+1} - \tfrac{\eta}{1 - \beta_1^s}
              \frac{u_s}{\sqrt{\hat v_s} + \varepsilon} \;\text{(AdamW)}

    with u_s the gradient of the query's chosen output at the middle of step s and, for the discrete gradient, the
    multiple of Δ_s that makes u_s·Δ_s the change of the output.
    """

    def __init__(self, task: Task, arrays: Arrays, dtype: torch.dtype, chosen: np.ndarray | None = None) -> None:
        self.task, self.dtype = task, dtype
        self.path, self.ids = torch.from_numpy(arrays["path"]), torch.from_numpy(arrays["ids"])
        self.f = Function(Task(network=task.network, width=task.width), arrays, dtype)
        self.loss = Function(Task(network=task.network, width=task.width, outputs="loss"), arrays, dtype)
        (Xq, yq), (self.X, self.y) = samples_of(task, arrays, dtype)
        self.queries = (Xq, yq) if chosen is None else (Xq[chosen], yq[chosen])
        self.outputs = self.all_outputs(self.path[-1]).argmax(dim=1)
        if task.optimizer == "AdamW":
            self.scales = self.second_moments(arrays)

    def theta(self, vector: Tensor) -> dict[str, Tensor]:
        return self.f.unflatten(vector.to(self.dtype))

    def all_outputs(self, vector: Tensor) -> Tensor:
        return functional_call(self.f.model, self.theta(vector), self.queries[0])

    def values(self, vector: Tensor) -> Tensor:
        return self.all_outputs(vector).gather(1, self.outputs[:, None])[:, 0]

    def second_moments(self, arrays: Arrays) -> list[Tensor]:
        """√v̂_s + ε of every step as training had it, in its arithmetic: gradients close to zero are mostly rounding."""
        single = Task(network=self.task.network, width=self.task.width)
        f, X = Function(single, arrays, torch.float32), torch.from_numpy(arrays["X"])
        v, scales = torch.zeros_like(self.path[0]), []
        for s, ids in enumerate(self.ids):
            theta = {name: p.requires_grad_() for name, p in f.unflatten(self.path[s].clone()).items()}
            loss = torch.nn.functional.cross_entropy(functional_call(f.model, theta, X[ids]), self.y[ids])
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(theta.values()))])
            v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
            scales.append(((v / (1 - BETAS[1] ** (s + 1))).sqrt() + EPSILON).to(self.dtype))
        return scales

    def query_rows(self, s: int) -> Tensor:
        """u_s, (Q, P)."""
        start, end = self.path[s].double(), self.path[s + 1].double()
        middle = self.theta((start + end) / 2)

        def chosen(theta: dict[str, Tensor], x: Tensor, y: Tensor, output: Tensor) -> Tensor:
            return self.f(theta, x, y).gather(0, output[None])[0]

        u = flat(vmap(grad(chosen), (None, 0, 0, 0))(middle, *self.queries, self.outputs))
        if self.task.quadrature == "discrete_gradient":
            step = (end - start).to(self.dtype)
            missed = self.values(self.path[s + 1]) - self.values(self.path[s]) - u @ step
            u = torch.addr(u, missed / (step @ step), step)
        return u

    def run(self, steps: int) -> Tensor:
        """Shares (Q, N) of the last so many steps."""
        shares = torch.zeros(len(self.outputs), len(self.X), dtype=self.dtype)
        rate, memory = LEARNING_RATE[self.task.optimizer], torch.zeros(())
        for s in reversed(range(len(self.ids) - steps, len(self.ids))):
            u, ids = self.query_rows(s), self.ids[s]
            if self.task.optimizer == "AdamW":
                memory = BETAS[0] * memory - rate / (1 - BETAS[0] ** (s + 1)) * u / self.scales[s]
                weight = (1 - BETAS[0]) * memory
            else:
                weight = -rate * u
            gradients = self.loss.rows((self.X[ids], self.y[ids]), 0, self.theta(self.path[s]))
            shares.index_add_(1, ids, weight @ gradients.T / len(ids))
        return shares


# ----------------------------------------------------------------------------------------------------- reference


def reference(task: Task, arrays: Arrays, rows_of: np.ndarray, columns_of: np.ndarray) -> np.ndarray:
    """The float64 result for some rows and columns."""
    if task.kind == "shares":
        sweep = ShareSweep(task, arrays, torch.float64, rows_of)
        return sweep.run(task.steps).numpy()[:, columns_of]
    columns = ("X", "y") if "X" in arrays else ("Xq", "yq")
    chosen = {"Xq": arrays["Xq"][rows_of], "yq": arrays["yq"][rows_of]}
    chosen |= {"X": arrays[columns[0]][columns_of], "y": arrays[columns[1]][columns_of]}
    chosen |= {name: array for name, array in arrays.items() if name.startswith("theta/")}
    single = Task(**task.to_json() | {"kind": "gram", "queries": len(rows_of), "references": len(columns_of)})
    if task.kind == "gram":
        run, canonical = rows(single, chosen, torch.float64)
        return canonical(run())
    return path_reference(single, chosen, torch.from_numpy(arrays["path"]))


def path_reference(task: Task, arrays: Arrays, path: Tensor) -> np.ndarray:
    """Trapezoids of the tangent kernel along the path, each step weighted by its learning rate."""
    function, total = Function(task, arrays, torch.float64), 0.0
    queries, references = samples_of(task, arrays, torch.float64)
    for s, vector in enumerate(path.double()):
        theta = function.unflatten(vector)
        weight = LEARNING_RATE[task.optimizer] * (0.5 if s in (0, len(path) - 1) else 1.0)
        for c in range(OUTPUTS):
            total = total + weight * function.rows(queries, c, theta) @ function.rows(references, c, theta).T
    return total.numpy()


METHODS = {"tutorial": tutorial, "rows": rows}
