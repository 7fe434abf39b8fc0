"""`TrainerRecorder`: records training inside the Trainer of transformers."""

from __future__ import annotations

from pathkernel.callbacks.versions import check_version

check_version("transformers")

from transformers import TrainerCallback  # noqa: E402 - its absence has a message of our own


class TrainerRecorder(TrainerCallback):
    """Callback of the Trainer of transformers that records training."""
