"""`SkorchRecorder`: records training inside skorch."""

from __future__ import annotations

from pathkernel.callbacks.versions import check_version

check_version("skorch")

from skorch.callbacks import Callback  # noqa: E402 - its absence has a message of our own


class SkorchRecorder(Callback):
    """Callback of skorch that records training."""
