"""`LightningRecorder`: records training inside Lightning."""

from __future__ import annotations

from pathkernel.callbacks.versions import check_version

check_version("lightning")

from lightning.pytorch import Callback  # noqa: E402 - its absence has a message of our own


class LightningRecorder(Callback):
    """Callback of Lightning that records training."""
