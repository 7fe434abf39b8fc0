"""What makes a model or an optimizer unfit for an exact record, found before training starts."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from pathkernel.errors import RecordingError, UnsupportedOptimizerError
from pathkernel.update_rules.rule import UpdateRule


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s and distributed training's wrappers, which share its parameters."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
            continue
        compiled_from = getattr(model, "_orig_mod", None)
        if not isinstance(compiled_from, nn.Module):
            return model
        model = compiled_from


def check_optimizer(model: nn.Module, optimizer: Optimizer, rule: UpdateRule) -> None:
    """Refuse an optimizer that moves something else than the model, or in a way that its rule does not cover.

    Raises
    ------
    RecordingError
        With all problems at once.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise RecordingError(
                f"Parameter `{name}` has no shape yet",
                "The recorder lays out all parameters before training",
                "Run one batch through the lazy modules before making the recorder",
            )
        if parameter.is_complex():
            raise RecordingError(
                f"Parameter `{name}` is complex",
                "Tangent kernels are defined here for real parameters",
                "Store real and imaginary part as two real parameters",
            )
    named = {id(p): name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [tuple(p.shape) for p in parameters if id(p) not in named]
    if strangers:
        raise RecordingError(
            f"The optimizer holds {len(strangers)} parameters that are not the model's, with shapes "
            f"{', '.join(map(str, strangers[:5]))}",
            "Optimizer and model must share their parameters: the very same tensors, not copies",
            "Make the optimizer from `model.parameters()`, after the model has been moved or wrapped",
        )
    refusals = {reason for group in optimizer.param_groups if (reason := rule.refusal(group)) is not None}
    if refusals:
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} was made with settings outside its update rule: {'; '.join(sorted(refusals))}",
            "Every step must be linear in the gradients given what is frozen",
            "Change these settings, or pass `rule=` with an `UpdateRule` that covers them",
        )
