"""Analyses of kernel matrices: alignment with the task, speed of change, spectrum."""

from pathkernel.runtime.lazy import lazy_names

_HOMES = {
    "centered_kernel_alignment": "analysis.alignment",
    "cumulative": "analysis.spectrum",
    "effective_rank": "analysis.spectrum",
    "kernel_alignment": "analysis.alignment",
    "kernel_distance": "analysis.velocity",
    "kernel_velocity": "analysis.velocity",
    "target_alignment": "analysis.alignment",
    "target_kernel": "analysis.alignment",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
