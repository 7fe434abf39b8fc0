"""Analyses of kernel matrices (alignment, speed, spectrum, two samples, bounds), and judges of attributions."""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.analysis.alignment import centered_kernel_alignment as centered_kernel_alignment
    from pathkernel.analysis.alignment import kernel_alignment as kernel_alignment
    from pathkernel.analysis.alignment import target_alignment as target_alignment
    from pathkernel.analysis.alignment import target_kernel as target_kernel
    from pathkernel.analysis.evaluation import brittleness as brittleness
    from pathkernel.analysis.evaluation import leave_one_out_correlation as leave_one_out_correlation
    from pathkernel.analysis.evaluation import linear_datamodeling_score as linear_datamodeling_score
    from pathkernel.analysis.evaluation import metasmoothness as metasmoothness
    from pathkernel.analysis.evaluation import mislabel_auc as mislabel_auc
    from pathkernel.analysis.evaluation import mislabel_precision as mislabel_precision
    from pathkernel.analysis.evaluation import query_loss_difference as query_loss_difference
    from pathkernel.analysis.evaluation import random_subsets as random_subsets
    from pathkernel.analysis.evaluation import top_removals as top_removals
    from pathkernel.analysis.generalization import LossPathBound as LossPathBound
    from pathkernel.analysis.generalization import loss_path_bound as loss_path_bound
    from pathkernel.analysis.regime import KernelRegime as KernelRegime
    from pathkernel.analysis.regime import kernel_regime as kernel_regime
    from pathkernel.analysis.spectrum import cumulative as cumulative
    from pathkernel.analysis.spectrum import effective_rank as effective_rank
    from pathkernel.analysis.support_vectors import KernelRow as KernelRow
    from pathkernel.analysis.support_vectors import kernels_as_svm as kernels_as_svm
    from pathkernel.analysis.two_sample import TwoSampleTest as TwoSampleTest
    from pathkernel.analysis.two_sample import mmd_squared as mmd_squared
    from pathkernel.analysis.two_sample import two_sample_test as two_sample_test
    from pathkernel.analysis.velocity import kernel_distance as kernel_distance
    from pathkernel.analysis.velocity import kernel_velocity as kernel_velocity

_HOMES = {
    "KernelRegime": "analysis.regime",
    "KernelRow": "analysis.support_vectors",
    "LossPathBound": "analysis.generalization",
    "TwoSampleTest": "analysis.two_sample",
    "brittleness": "analysis.evaluation",
    "centered_kernel_alignment": "analysis.alignment",
    "cumulative": "analysis.spectrum",
    "effective_rank": "analysis.spectrum",
    "kernel_alignment": "analysis.alignment",
    "kernel_distance": "analysis.velocity",
    "kernel_regime": "analysis.regime",
    "kernel_velocity": "analysis.velocity",
    "kernels_as_svm": "analysis.support_vectors",
    "loss_path_bound": "analysis.generalization",
    "mmd_squared": "analysis.two_sample",
    "target_alignment": "analysis.alignment",
    "target_kernel": "analysis.alignment",
    "two_sample_test": "analysis.two_sample",
    "leave_one_out_correlation": "analysis.evaluation",
    "linear_datamodeling_score": "analysis.evaluation",
    "metasmoothness": "analysis.evaluation",
    "mislabel_auc": "analysis.evaluation",
    "mislabel_precision": "analysis.evaluation",
    "query_loss_difference": "analysis.evaluation",
    "random_subsets": "analysis.evaluation",
    "top_removals": "analysis.evaluation",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
