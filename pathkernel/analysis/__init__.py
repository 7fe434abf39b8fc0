"""Analyses of kernel matrices: alignment with the task, speed of change, spectrum."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.analysis.alignment import centered_kernel_alignment as centered_kernel_alignment
    from pathkernel.analysis.alignment import kernel_alignment as kernel_alignment
    from pathkernel.analysis.alignment import target_alignment as target_alignment
    from pathkernel.analysis.alignment import target_kernel as target_kernel
    from pathkernel.analysis.spectrum import cumulative as cumulative
    from pathkernel.analysis.spectrum import effective_rank as effective_rank
    from pathkernel.analysis.velocity import kernel_distance as kernel_distance
    from pathkernel.analysis.velocity import kernel_velocity as kernel_velocity

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
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
