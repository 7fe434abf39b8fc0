"""Other torch libraries at the same work, each as its documentation has it. Runs in the peers' environment."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _workloads import OUTPUTS, Task, loaded, sample_losses
from torch import Tensor, nn

Arrays = dict[str, np.ndarray]
Call = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]
"""What is timed, and how its result becomes an (n, m) or (n, m, C, C) array."""


class CannotDo(RuntimeError):
    """The library has no way to do this."""


def refuse(condition: bool, reason: str) -> None:
    if condition:
        raise CannotDo(reason)


def queries(arrays: Arrays) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(arrays["Xq"]), torch.from_numpy(arrays["yq"])


def references(arrays: Arrays) -> tuple[Tensor, Tensor]:
    return (torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["y"])) if "X" in arrays else queries(arrays)


def nngeometry(task: Task, arrays: Arrays) -> Call:
    """Its layer-wise Gram matrix, all pairs of outputs; it has none of the trace."""
    from nngeometry.gram import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    refuse(task.outputs != "full" or "X" in arrays, "has symmetric full Gram matrices only")
    model, (X, y) = loaded(task, arrays), queries(arrays)
    loader = DataLoader(TensorDataset(X, y), batch_size=len(X))
    return (
        lambda: GramMatrix(model, loader, function=lambda x, _: model(x)).data,
        lambda gram: gram.permute(1, 3, 0, 2).numpy(),
    )


def asdfghjkl(task: Task, arrays: Arrays) -> Call:
    """Hadamard products of layer Grams for the trace, output by output; rows of gradients for the rest."""
    from asdl.gradient import batch_gradient
    from asdl.kernel import empirical_class_wise_hadamard_ntk

    warnings.simplefilter("ignore")
    model, (Xq, yq), (X, y) = loaded(task, arrays), queries(arrays), references(arrays)
    refuse(task.outputs != "loss" and "X" in arrays, "compared on symmetric Gram matrices")
    refuse(task.network == "transformer", "takes the positions of a sequence for samples of their own")
    if task.outputs == "trace":
        return lambda: empirical_class_wise_hadamard_ntk(model, Xq).sum(dim=2), Tensor.numpy

    def rows(scalar: Callable[[], Tensor]) -> Tensor:
        def closure() -> None:
            model.zero_grad()
            scalar().backward()

        return batch_gradient(model, closure)

    def losses(x: Tensor, targets: Tensor) -> Tensor:
        return rows(lambda: sample_losses(model(x), targets).sum())

    if task.outputs == "loss":
        return lambda: losses(Xq, yq) @ losses(X, y).T, Tensor.numpy

    def full() -> Tensor:
        flat = torch.cat([rows(lambda c=c: model(Xq)[:, c].sum()) for c in range(OUTPUTS)])
        return (flat @ flat.T).reshape(OUTPUTS, len(Xq), OUTPUTS, len(Xq))

    return full, lambda K: K.permute(1, 3, 0, 2).numpy()


def backpack(task: Task, arrays: Arrays) -> Call:
    """Gradients of each sample by one backward pass for each output, and products of them."""
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import BatchGrad

    refuse(task.network == "transformer", "needs an nn.Sequential of layers that it knows")
    refuse(task.network == "cnn", "has no rule for GroupNorm")
    model = extend(loaded(task, arrays))
    parameters = list(model.parameters())

    def rows(outputs: Tensor, of: Callable[[Tensor], Tensor], retain: bool) -> Tensor:
        with extensions(BatchGrad(), retain_graph=retain):
            of(outputs).backward(retain_graph=retain)
        flat = torch.cat([p.grad_batch.flatten(1) for p in parameters], dim=1)
        for p in parameters:
            del p.grad_batch, p.grad
        return flat

    def losses(X: Tensor, y: Tensor) -> Tensor:
        criterion = extend(nn.CrossEntropyLoss(reduction="sum"))
        return rows(model(X), lambda z: criterion(z, y), False)

    (Xq, yq), (X, y) = queries(arrays), references(arrays)
    if task.outputs == "loss":
        return lambda: losses(Xq, yq) @ losses(X, y).T, Tensor.numpy
    refuse("X" in arrays, "compared on symmetric Gram matrices")

    def trace() -> Tensor:
        outputs, total = model(Xq), torch.zeros(len(Xq), len(Xq))
        for c in range(outputs.shape[1]):
            flat = rows(outputs, lambda z, c=c: z[:, c].sum(), c + 1 < outputs.shape[1])
            total.addmm_(flat, flat.T)
        return total

    def full() -> Tensor:
        outputs = model(Xq)
        n, k = outputs.shape
        flat = torch.cat([rows(outputs, lambda z, c=c: z[:, c].sum(), c + 1 < k) for c in range(k)])
        return (flat @ flat.T).reshape(k, n, k, n)

    if task.outputs == "trace":
        return trace, Tensor.numpy
    return full, lambda K: K.permute(1, 3, 0, 2).numpy()


def opacus(task: Task, arrays: Arrays) -> Call:
    """Gradients of each sample's loss by hooks, and one product."""
    from opacus import GradSampleModule

    refuse(task.outputs != "loss", "makes gradients of losses")
    warnings.simplefilter("ignore")
    model = GradSampleModule(loaded(task, arrays).train(), loss_reduction="sum")

    def rows(X: Tensor, y: Tensor) -> Tensor:
        model.zero_grad()
        sample_losses(model(X), y).sum().backward()
        return torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1)

    (Xq, yq), (X, y) = queries(arrays), references(arrays)
    if "X" not in arrays:
        return lambda: (lambda G: G @ G.T)(rows(Xq, yq)), Tensor.numpy
    return lambda: rows(Xq, yq) @ rows(X, y).T, Tensor.numpy


def captum(task: Task, arrays: Arrays, sample_wise: bool = True) -> Call:
    """TracInCP at one checkpoint, in its faster setting: one batch, and gradients of all its samples at once."""
    from captum.influence import TracInCP
    from torch.utils.data import TensorDataset

    refuse(task.outputs != "loss" or task.network == "transformer", "TracInCP is of losses, of one label a sample")
    model, (Xq, yq), (X, y) = loaded(task, arrays), queries(arrays), references(arrays)

    def checkpoint(_: nn.Module, __: str) -> float:
        return 1.0

    influence = TracInCP(
        model,
        TensorDataset(X, y),
        ["as it is"],
        checkpoints_load_func=checkpoint,
        loss_fn=nn.CrossEntropyLoss(reduction="sum" if sample_wise else "none"),
        batch_size=len(X),
        sample_wise_grads_per_batch=sample_wise,
    )
    return lambda: influence.influence((Xq, yq)), lambda scores: scores.detach().numpy()


def captum_default(task: Task, arrays: Arrays) -> Call:
    """TracInCP as it is by default: gradients sample by sample."""
    return captum(task, arrays, sample_wise=False)


def dattri(task: Task, arrays: Arrays, batch_size: int | None = None) -> Call:
    """TracIn at one checkpoint, without its random projection."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    refuse(task.outputs != "loss", "TracIn is of losses")
    model, (Xq, yq), (X, y) = loaded(task, arrays), queries(arrays), references(arrays)

    def loss(parameters: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        x, target = data
        outputs = torch.func.functional_call(model, parameters, x.unsqueeze(0))
        return sample_losses(outputs, target.unsqueeze(0))[0]

    attribution = AttributionTask(loss, model, model.state_dict())
    attributor = TracInAttributor(attribution, torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None  # its constructor takes None for "the default projection"
    train = DataLoader(TensorDataset(X, y), batch_size=batch_size or len(X))
    test = DataLoader(TensorDataset(Xq, yq), batch_size=batch_size or len(Xq))
    return lambda: attributor.attribute(train, test), lambda scores: scores.T.numpy()


def dattri_batches(task: Task, arrays: Arrays) -> Call:
    """TracIn in batches of 64, as in its examples: test gradients are made again for every training batch."""
    return dattri(task, arrays, batch_size=64)


METHODS = {
    "nngeometry": nngeometry,
    "asdfghjkl": asdfghjkl,
    "backpack": backpack,
    "opacus": opacus,
    "captum": captum,
    "captum-default": captum_default,
    "dattri": dattri,
    "dattri-batches": dattri_batches,
}
