"""Analyses of kernel matrices: alignment with the task, speed of change, spectrum, and a two-sample test."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.analysis.alignment import centered_kernel_alignment as centered_kernel_alignment
    from pathkernel.analysis.alignment import kernel_alignment as kernel_alignment
    from pathkernel.analysis.alignment import target_alignment as target_alignment
    from pathkernel.analysis.alignment import target_kernel as target_kernel
    from pathkernel.analysis.spectrum import cumulative as cumulative
    from pathkernel.analysis.spectrum import effective_rank as effective_rank
    from pathkernel.analysis.two_sample import TwoSampleTest as TwoSampleTest
    from pathkernel.analysis.two_sample import mmd_squared as mmd_squared
    from pathkernel.analysis.two_sample import two_sample_test as two_sample_test
    from pathkernel.analysis.velocity import kernel_distance as kernel_distance
    from pathkernel.analysis.velocity import kernel_velocity as kernel_velocity

_HOMES = {
    "TwoSampleTest": "analysis.two_sample",
    "centered_kernel_alignment": "analysis.alignment",
    "cumulative": "analysis.spectrum",
    "effective_rank": "analysis.spectrum",
    "kernel_alignment": "analysis.alignment",
    "kernel_distance": "analysis.velocity",
    "kernel_velocity": "analysis.velocity",
    "mmd_squared": "analysis.two_sample",
    "target_alignment": "analysis.alignment",
    "target_kernel": "analysis.alignment",
    "two_sample_test": "analysis.two_sample",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
