"""Models and optimizers that are unfit for an exact record, refused mostly before training starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from pathkernel.errors import RecordingError, UnsupportedModelError, UnsupportedOptimizerError
from pathkernel.gradients.sample_wise import check_is_module, check_module
from pathkernel.recording.optimizers import JointOptimizer, described
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


def refuse_several_processes(model: nn.Module) -> None:
    """Refuse a network whose gradients are averaged over several processes.

    Raises
    ------
    UnsupportedModelError
        Where it is wrapped for more than one.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        processes = torch.distributed.get_world_size(model.process_group)
        if processes > 1:
            raise UnsupportedModelError(
                f"The network is wrapped in DistributedDataParallel for {processes} processes",
                "A step's gradient must be the sum over the samples that this process announces; there it is the "
                "average over those of all processes",
                "Record a training in one process",
            )


def inside_fabric(model: nn.Module) -> nn.Module:
    """The module inside Fabric's wrapper, which switches mixed precision on and casts what it returns.

    Raises
    ------
    InputError
        For what is no module.
    """
    check_is_module(model)
    inside = getattr(model, "_forward_module", None)
    set_up = isinstance(inside, nn.Module) and isinstance(getattr(model, "_original_module", None), nn.Module)
    return inside if set_up else model  # type: ignore[return-value]


def refuse_other_tensors(names: Sequence[str]) -> None:
    """Refuse parameters, by name, that are other tensors than on record.

    Raises
    ------
    RecordingError
        Where there are any.
    """
    if names:
        raise RecordingError(
            f"The network's parameters {', '.join(f'`{name}`' for name in names)} are not those that it had when "
            "recording began",
            "A record is of one network: its parameters are the same tensors from start to end, some of which may "
            "stay frozen until later",
            "Write new values into the parameters (`load_state_dict` without `assign=True`), or make optimizer and "
            "KernelRecorder after the network has been changed",
        )


def check_optimizer(model: nn.Module, optimizer: Optimizer | JointOptimizer, rule: UpdateRule) -> None:
    """Refuse an optimizer that moves something else than the model, or in a way that its rule does not cover.

    Raises
    ------
    RecordingError
        With all problems at once.
    """
    check_module(model)
    for name, child in model.named_modules():
        if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) and child.sparse:
            raise UnsupportedModelError(
                f"The embedding `{name}` gives sparse gradients",
                "The record holds one gradient for all parameters, and update rules are those of dense gradients",
                "Make it with `sparse=False`",
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
            f"{described(optimizer)} was made with settings outside its update rule: {'; '.join(sorted(refusals))}",
            "Every step must be linear in the gradients given what is frozen",
            "Change these settings, or pass `rule=` with an `UpdateRule` that covers them",
        )
