"""The spectrum on logarithmic axes."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt

from pathkernel.errors import PathKernelError
from pathkernel.plotting.spectrum import SpectrumDisplay


def legend(display: SpectrumDisplay) -> list[str]:
    return [text.get_text() for text in display.ax_.get_legend().get_texts()]


def test_eigenvalues_are_drawn_against_their_rank():
    display = SpectrumDisplay.from_gram(np.diag([1.0, 8.0, 4.0, 2.0])).plot()
    np.testing.assert_allclose(display.line_.get_xydata(), [[1, 8], [2, 4], [3, 2], [4, 1]], rtol=1e-14)
    assert display.ax_.get_xscale() == display.ax_.get_yscale() == "log"
    assert display.figure_ is display.ax_.figure


def test_rounding_is_left_out_and_counted():
    features = np.random.default_rng(0).normal(size=(30, 4))
    display = SpectrumDisplay.from_gram(features @ features.T).plot()
    assert len(display.line_.get_xdata()) == 4
    assert "26 eigenvalues at rounding" in legend(display)[0]


def test_the_legend_states_the_effective_rank():
    assert "effective rank 5.0 of 5" in legend(SpectrumDisplay.from_gram(np.eye(5)).plot())[0]
    assert "effective rank 1.0 of 1" in legend(SpectrumDisplay.from_gram([[2.0]]).plot())[0]


def test_several_kernels_share_axes():
    _, ax = plt.subplots()
    SpectrumDisplay.from_gram(np.eye(3)).plot(ax, label="one")
    second = SpectrumDisplay.from_gram(np.diag([3.0, 2.0, 1.0])).plot(ax, label="two", color="#D55E00")
    assert second.ax_ is ax
    assert [entry.splitlines()[0] for entry in legend(second)] == ["one", "two"]


def test_a_zero_kernel_is_refused():
    with pytest.raises(PathKernelError, match="Every eigenvalue of `K` is zero"):
        SpectrumDisplay.from_gram(np.zeros((2, 2)))
