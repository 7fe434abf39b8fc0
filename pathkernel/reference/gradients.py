"""Gradients with respect to the parameters, by plain loops of `torch.autograd.grad`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def double(values: Tensor) -> Tensor:
    """Convert floating-point data to float64; integers stay as they are."""
    return values.detach().to(torch.float64) if values.is_floating_point() else values


def double_loss(loss: Loss) -> Loss:
    """Copy a loss module in float64: it may hold tensors, such as class weights."""
    return copy.deepcopy(loss).to(torch.float64) if isinstance(loss, nn.Module) else loss


def trainable(model: nn.Module) -> Parameters:
    """Name the parameters that P counts, in `named_parameters()` order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def module_at(model: nn.Module, parameters: Parameters) -> nn.Module:
    """Copy the model in float64, holding the values of `parameters`."""
    missing = sorted(set(trainable(model)) - set(parameters))
    if missing:
        raise ValueError(
            f"`parameters` lacks {missing}; every trainable parameter of the model is needed. "
            "Write `dict(model.named_parameters())`."
        )
    twin = copy.deepcopy(model).to(torch.float64)
    with torch.no_grad():
        for name, value in parameters.items():
            twin.get_parameter(name).copy_(value)
    return twin


def gradient(scalar: Tensor, twin: nn.Module) -> Tensor:
    """Differentiate a scalar that was computed with `twin`: ∇_θ as one vector (P,)."""
    gradients = torch.autograd.grad(scalar, list(trainable(twin).values()), retain_graph=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in gradients])


def flatten(model: nn.Module, parameters: Parameters) -> Tensor:
    """Join the trainable parameters into one float64 vector (P,)."""
    return torch.cat([double(parameters[name]).reshape(-1) for name in trainable(model)])


def unflatten(model: nn.Module, vector: Tensor) -> Parameters:
    """Cut a vector (P,) into parameters, the inverse of `flatten`."""
    named = trainable(model)
    parts = torch.split(vector, [p.numel() for p in named.values()])
    return {name: part.reshape(p.shape).clone() for (name, p), part in zip(named.items(), parts, strict=True)}


Output = int | Callable[[Tensor], Tensor]
"""An entry of the flattened output, or a scalar function of all of them."""


def output_value(twin: nn.Module, x: Tensor, output: Output) -> Tensor:
    """Evaluate f_output(x) for one sample x given without batch dimension."""
    z: Tensor = twin(double(x)[None]).reshape(-1)
    return output(z) if callable(output) else z[output]


def margin(z: Tensor, label: int) -> Tensor:
    """Margin of a label, log p_y − log(1 − p_y), with p = softmax(z), or the sigmoid of a single output.

    Parameters
    ----------
    z : Tensor of shape (C,)
    label : int

    Returns
    -------
    Tensor of shape ()
    """
    if len(z) == 1:
        p = torch.sigmoid(z)
        return torch.log(p[0]) - torch.log(1 - p[0]) if label else torch.log(1 - p[0]) - torch.log(p[0])
    p = torch.softmax(z, dim=0)
    return torch.log(p[label]) - torch.log(torch.stack([p[k] for k in range(len(p)) if k != label]).sum())


def value_gradients(model: nn.Module, parameters: Parameters, X: Tensor, outputs: Sequence[Output]) -> Tensor:
    """Gradient of one function of the outputs for every sample, ∇_θ h_i(f(x_i; θ)).

    Parameters
    ----------
    model, parameters
        As in `output_gradients`.
    X : Tensor of shape (n, ...)
    outputs : sequence of n
        An entry of the flattened output, or a scalar function of all of them, for each sample.

    Returns
    -------
    Tensor of shape (n, P), float64
    """
    twin = module_at(model, parameters)
    return torch.stack([gradient(output_value(twin, x, h), twin) for x, h in zip(X, outputs, strict=True)])


def output_gradients(model: nn.Module, parameters: Parameters, X: Tensor) -> Tensor:
    """Gradient of every output for every sample, ∇_θ f_c(x_i; θ).

    Each sample goes through the model alone, and each output is differentiated alone.

    Parameters
    ----------
    model : nn.Module
        Maps (n, ...) to outputs of any shape (n, ...), which are flattened to C.
    parameters : dict of str to Tensor
        The point θ.
    X : Tensor of shape (n, ...)

    Returns
    -------
    Tensor of shape (n, C, P), float64
    """
    twin = module_at(model, parameters)
    rows = []
    for x in double(X):
        outputs = twin(x[None]).reshape(-1)
        rows.append(torch.stack([gradient(outputs[c], twin) for c in range(len(outputs))]))
    return torch.stack(rows)


def sample_gradients(model: nn.Module, parameters: Parameters, loss: Loss, X: Tensor, y: Tensor) -> Tensor:
    """Weighted per-sample gradients c_i g_i, whose sum is the gradient of the batch loss L = loss(model(X), y).

    With the outputs z of the batch and λ = ∂L/∂z, row i is ∇_θ (z_i · λ_i) with λ held fixed. The weight c_i of the
    reduction sits in λ, so that means, sums and weighted means need no case distinction.

    Parameters
    ----------
    model, parameters
        As in `output_gradients`.
    loss : callable
        (output, target) -> scalar.
    X : Tensor of shape (B, ...)
    y : Tensor of shape (B, ...)

    Returns
    -------
    Tensor of shape (B, P), float64
    """
    twin = module_at(model, parameters)
    z = twin(double(X))
    (lam,) = torch.autograd.grad(double_loss(loss)(z, double(y)), z, retain_graph=True)
    return torch.stack([gradient((z[i] * lam[i]).sum(), twin) for i in range(len(z))])


def sample_gradients_from_losses(
    model: nn.Module, parameters: Parameters, loss: Loss, X: Tensor, y: Tensor, reduction: str | None = None
) -> Tensor:
    """Weighted per-sample gradients from single losses, c ∇_θ loss(model(x_i), y_i).

    The weight c is 1/B for a mean and 1 for a sum. The rows are those of `sample_gradients` when the batch loss is the
    mean or the sum of single losses; class-weighted means are not, and only `sample_gradients` is right for them.

    Parameters
    ----------
    model, parameters, loss, X, y
        As in `sample_gradients`.
    reduction : {"mean", "sum"}, optional
        ``loss.reduction`` when not given.

    Returns
    -------
    Tensor of shape (B, P), float64

    Raises
    ------
    ValueError
        If the reduction is neither given nor known from the loss.
    """
    reduction = getattr(loss, "reduction", None) if reduction is None else reduction
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f'The reduction of the loss is {reduction!r}; "mean" or "sum" was expected. Write `reduction="mean"`.'
        )
    twin, loss = module_at(model, parameters), double_loss(loss)
    X, y = double(X), double(y)
    c = 1 / len(X) if reduction == "mean" else 1.0
    return torch.stack([c * gradient(loss(twin(X[i : i + 1]), y[i : i + 1]), twin) for i in range(len(X))])
