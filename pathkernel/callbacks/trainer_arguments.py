"""Arguments of the Trainer of transformers: those that are refused, and what follows from them for the recorder."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset

from pathkernel.errors import RecordingError


def check_arguments(args: Any) -> None:
    """Refuse what is not recorded: several processes or devices, and what the Trainer does to the model meanwhile.

    Raises
    ------
    RecordingError
        Naming what it is.
    """
    several = [
        *([f"on {args.n_gpu} GPUs (DataParallel)"] if args.n_gpu > 1 else []),
        *([f"by {args.world_size} processes"] if args.world_size > 1 else []),
    ]
    if several:
        raise RecordingError(
            f"The Trainer trains {' and '.join(several)}",
            "The whole gradient of a step and all its samples are seen where one process trains on one device",
            "Set `CUDA_VISIBLE_DEVICES` to one device and start the script with `python`, or leave TrainerRecorder out",
        )
    if getattr(args, "torch_compile", False):
        raise RecordingError(
            "The Trainer compiles the model (`torch_compile=True`), and calls another module in its place",
            "Passes are seen where the loop calls the model that the callbacks are given",
            "Write `model.compile()` before the Trainer is made, and leave out `torch_compile`",
        )
    if getattr(args, "neftune_noise_alpha", None) is not None:
        raise RecordingError(
            "The Trainer adds noise to the embeddings (`neftune_noise_alpha`), by a hook that it takes off afterwards",
            "Recorded batches are run again when the network is explained, with all that was in the network",
            "Leave out `neftune_noise_alpha`, or add the noise in the model's own `forward`",
        )


def found_in(args: Any, model: nn.Module, dataset: Any, ids: str | None) -> dict[str, Any]:
    """Options of the recorder that follow from what the Trainer was given."""
    found: dict[str, Any] = {"returns": "logits"}
    if not args.label_smoothing_factor:  # with it, the Trainer evaluates the loss
        found["loss"] = "returned"
    if ids is None and not isinstance(dataset, IterableDataset):
        with contextlib.suppress(TypeError):
            found["data"] = len(dataset)
    config, name = getattr(model, "config", None), type(model).__name__
    regression = getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", 2) < 2
    if name.endswith(("ForSequenceClassification", "ForImageClassification", "ForMultipleChoice")) and not regression:
        found["task"] = "classification"
    return found


def same_samples(one: Any, other: Any) -> bool:
    """True where two training sets are the same object, or made alike from the same (as by the removal of columns)."""
    mark = getattr(one, "_fingerprint", None)
    return one is other or (mark is not None and mark == getattr(other, "_fingerprint", None))
