"""Networks that estimators train: the user's, or a multilayer perceptron that standardises its inputs."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pathkernel.errors import InputError, is_whole

GENERATORS = threading.RLock()
"""Held while torch's generators are seeded: two threads that fit would draw from each other's."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside, and leave them as they were."""
    with GENERATORS, torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of columns, (d,) each.

    Attributes
    ----------
    mean, scale
        The scale of a column that is constant is 1.
    """

    mean: Tensor
    scale: Tensor


BOUND = 3.0
"""Standard deviations within which standardised inputs stay: a feature that is rarely not zero would outweigh the rest
of a sample by far. Measured on digits, breast cancer, wine and diabetes."""


class Affine(nn.Module):
    """A map of columns that is fixed when the network is made.

    Parameters
    ----------
    moments
        Mean and scale of the columns.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.register_buffer("mean", moments.mean)
        self.register_buffer("scale", moments.scale)


class Standardized(Affine):
    r"""The map :math:`x \mapsto b \tanh(z / b)`, z = (x − mean) / scale, b = 3: standardised, without outliers."""

    def forward(self, x: Tensor) -> Tensor:
        """Standardised inputs, of the same order within each column."""
        return BOUND * torch.tanh((x - self.mean) / (BOUND * self.scale))


class Unstandardized(Affine):
    """The map z ↦ z · scale + mean: outputs in the units of the targets."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs in the units of the targets."""
        return x * self.scale + self.mean


class StandardizedSquaredError(nn.Module):
    r"""Squared error in units of the targets' standard deviation, :math:`\|(z - y) / \mathrm{scale}\|^2` by row.

    Parameters
    ----------
    scale
        (k,), of the training targets.
    """

    reduction = "none"
    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared errors, (B, k)."""
        return ((outputs - targets) / self.scale).square()


def multilayer_perceptron(
    inputs: Moments, hidden: Sequence[int], outputs: int, targets: Moments | None = None
) -> nn.Sequential:
    """Rectified layers on standardised inputs, in float64.

    Parameters
    ----------
    inputs
        Moments of the training inputs.
    hidden
        Widths of the hidden layers.
    outputs
        Number of outputs.
    targets
        Moments of the targets of a regression, in whose units the outputs are.
    """
    widths = [len(inputs.mean), *hidden]
    layers: list[nn.Module] = [Standardized(inputs)]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    layers.append(nn.Linear(widths[-1], outputs))
    if targets is not None:
        layers.append(Unstandardized(targets))
    return nn.Sequential(*layers).double()


def check_hidden(hidden: Any) -> tuple[int, ...]:
    """Accept widths of hidden layers: a whole number, or several.

    Raises
    ------
    InputError
        For anything else.
    """
    widths = (hidden,) if is_whole(hidden) else hidden
    if not isinstance(widths, (tuple, list)) or not all(is_whole(width) and width > 0 for width in widths):
        raise InputError(
            f"`hidden={hidden!r}` was given",
            "It holds the width of each hidden layer, whole numbers from 1 upwards",
            "Write for example `hidden=(64,)`",
        )
    return tuple(int(width) for width in widths)


def made_network(module: Any, features: int | None, outputs: int) -> nn.Module:
    """The network of a user's module or factory; a module that was given stays as it is, and its copy is trained.

    Parameters
    ----------
    module
        A module, or a function or class that makes one: called with those of ``n_features`` and ``n_outputs`` that it
        names among its arguments.
    features, outputs
        Numbers of features (None where samples have no rows of them), and of outputs.

    Raises
    ------
    InputError
        For anything else, and for a factory that makes no module.
    """
    if isinstance(module, nn.Module):
        return copy.deepcopy(module)
    if not callable(module):
        raise InputError(
            f"`module` is a {type(module).__name__}",
            "A network is a torch.nn.Module, or a function or class that makes one",
            "Write `module=nn.Sequential(...)`, `module=make_network`, or leave it out for a multilayer perceptron",
        )
    made = module(**_wanted(module, {"n_features": features, "n_outputs": outputs}))
    if not isinstance(made, nn.Module):
        raise InputError(
            f"`module` is a factory that made a {type(made).__name__}",
            "A factory makes a torch.nn.Module",
            "Let it return `nn.Sequential(...)`",
        )
    return made


def _wanted(factory: Callable[..., Any], known: dict[str, Any]) -> dict[str, Any]:
    try:
        names = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # builtins may have none
        return {}
    return {name: value for name, value in known.items() if name in names}


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
"""Optimizers by the names that estimators take."""


def made_optimizer(optimizer: Any, network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer of a network's trainable parameters.

    Parameters
    ----------
    optimizer
        A name among `OPTIMIZERS`, or a class or function called as ``optimizer(parameters, lr=learning_rate)``.

    Raises
    ------
    InputError
        For anything else.
    """
    make = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if make is None or isinstance(make, torch.optim.Optimizer) or not callable(make):
        given = repr(optimizer) if isinstance(optimizer, str) else f"a {type(optimizer).__name__}"
        raise InputError(
            f"`optimizer` is {given}",
            f"It is one of {', '.join(map(repr, OPTIMIZERS))}, or a class or function that makes one of parameters and "
            "`lr=`, since the network is made in `fit`",
            'Write `optimizer="adamw"` or `optimizer=functools.partial(torch.optim.SGD, momentum=0.9)`',
        )
    return make([parameter for parameter in network.parameters() if parameter.requires_grad], lr=learning_rate)
