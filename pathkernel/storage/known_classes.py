"""Closed tables of the classes that names in a store may stand for, and nothing else.

A store may come from anybody, and importing runs code. So nothing that a header says is ever imported, looked up in a
module or evaluated: a name stands in a table here, which was made from classes that are there already, or whatever it
stands for has to be passed as an argument.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn, optim

from pathkernel._typing import Loss
from pathkernel.errors import StoreError, quoted
from pathkernel.gradients.losses import RETURNED
from pathkernel.optimizers import momentum, runge_kutta, scaled
from pathkernel.storage import fingerprints as identity
from pathkernel.update_rules.rule import UpdateRule
from pathkernel.update_rules.table import NAMED_RULES, RULES

LOSSES: dict[str, type[nn.Module]] = {
    identity.named(cls): cls
    for cls in (
        nn.BCELoss,
        nn.BCEWithLogitsLoss,
        nn.CrossEntropyLoss,
        nn.HingeEmbeddingLoss,
        nn.HuberLoss,
        nn.KLDivLoss,
        nn.L1Loss,
        nn.MSELoss,
        nn.MultiLabelMarginLoss,
        nn.MultiLabelSoftMarginLoss,
        nn.MultiMarginLoss,
        nn.NLLLoss,
        nn.PoissonNLLLoss,
        nn.SmoothL1Loss,
        nn.SoftMarginLoss,
    )
}
"""Those losses of `torch.nn` that take an output and a target and have no parameters, by module and name."""

LOSS_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    identity.named(function): function
    for function in (
        nn.functional.binary_cross_entropy,
        nn.functional.binary_cross_entropy_with_logits,
        nn.functional.cross_entropy,
        nn.functional.hinge_embedding_loss,
        nn.functional.huber_loss,
        nn.functional.kl_div,
        nn.functional.l1_loss,
        nn.functional.mse_loss,
        nn.functional.multi_margin_loss,
        nn.functional.multilabel_margin_loss,
        nn.functional.multilabel_soft_margin_loss,
        nn.functional.nll_loss,
        nn.functional.poisson_nll_loss,
        nn.functional.smooth_l1_loss,
        nn.functional.soft_margin_loss,
    )
}
"""Those losses of `torch.nn.functional` that take an output and a target, by module and name."""

OWN_OPTIMIZERS = (
    momentum.Momentum,
    runge_kutta.Heun,
    runge_kutta.RungeKutta4,
    scaled.Lion,
    scaled.NormalizedDescent,
    scaled.PolyakStep,
    scaled.ScalarRMSprop,
    scaled.SignDescent,
)
"""Optimizers of the package, which name their rules."""

OPTIMIZERS: dict[str, type[optim.Optimizer]] = {
    identity.named(cls): cls
    for cls in (*vars(optim).values(), *OWN_OPTIMIZERS)
    if isinstance(cls, type) and issubclass(cls, optim.Optimizer) and cls is not optim.Optimizer
}
"""The optimizers of `torch.optim` and of the package, by module and name."""

UPDATE_RULES: dict[str, type[UpdateRule]] = {
    identity.named(cls): cls
    for cls in (*RULES.values(), *NAMED_RULES.values(), *(optimizer.rule for optimizer in OWN_OPTIMIZERS))
}
"""The update rules of the package, by module and name."""

RENAMED = {"pathkernel.dynamics.": "pathkernel.optimizers."}
"""Folders of the package as stores of earlier versions name them, and as they are called now."""


def current_name(recorded: str) -> str:
    """The module and name of a class of the package, whatever version of it wrote them."""
    for before, now in RENAMED.items():
        if recorded.startswith(before):
            return now + recorded.removeprefix(before)
    return recorded


LIMITS: dict[str, Callable[[Any], bool]] = {
    "reduction": lambda value: value in ("none", "mean", "sum"),
    "delta": lambda value: value > 0,
    "beta": lambda value: value >= 0,
}
"""Settings whose wrong values the constructors of losses let through."""
MAX_SETTING = 100
"""Characters of a setting, which is a number or the name of a reduction."""


def known_loss(recorded: Mapping[str, Any]) -> Loss | str | None:
    """The loss of a recording, where it is one of torch, or where there was none.

    Parameters
    ----------
    recorded
        As `pathkernel.storage.fingerprints.loss_identity` says it. Settings are read as literals, and only those that
        the class names as keywords; the loss that is made must be what was recorded in every one of them.

    Raises
    ------
    StoreError
        For any other loss, which has to be passed.
    """
    name, settings = recorded["name"], recorded["settings"]
    if name in ("", RETURNED) and not settings:  # none was given, or the network returns it
        return name or None
    if name in LOSS_FUNCTIONS and not settings:
        return LOSS_FUNCTIONS[name]
    made = None
    if name in LOSSES:
        try:
            made = LOSSES[name](**_keywords(LOSSES[name], settings))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            made = None
    found = quoted(name)
    if name in LOSSES:
        found += f" with the settings {quoted(dict(settings))}"
    if made is None or identity.loss_identity(made) != {"name": name, "settings": dict(settings)}:
        raise StoreError(
            f"The loss on record is {found}, which was not imported",
            "A store runs nothing: losses of `torch.nn` are found by their name, with settings that are numbers or "
            "text; any other loss has to be named by you",
            "Write `--loss train.py:loss` with the loss of the training, or pass `loss=` to `Trajectory.open`",
        )
    return made


def _keywords(cls: type[nn.Module], settings: Mapping[str, str]) -> dict[str, Any]:
    """Settings by keyword; each must be a literal, of the type that the keyword has by default."""
    defaults = {name: each.default for name, each in inspect.signature(cls).parameters.items()}
    keywords = {}
    for name, text in settings.items():
        value, default = _literal(text), defaults.get(name, ...)
        alike = type(value) is type(default) or (type(value) is int and type(default) is float)
        if not alike or name in ("size_average", "reduce"):  # these two are deprecated ways to say the reduction
            raise ValueError(name)
        if isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) < 2**63):
            raise ValueError(name)
        if name in LIMITS and not LIMITS[name](value):
            raise ValueError(name)
        keywords[name] = value
    return keywords


def _literal(text: str) -> Any:
    """A number or text as `repr` writes it."""
    if len(text) > MAX_SETTING:
        raise ValueError("too long")
    try:
        return ast.literal_eval(text)
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(str(error)) from None
