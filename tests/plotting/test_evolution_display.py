"""The kernel in training: panels, curves and their lengths."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt

from pathkernel.analysis.alignment import target_alignment, target_kernel
from pathkernel.errors import PathKernelError
from pathkernel.plotting.evolution import KernelEvolutionDisplay

STEPS = [0, 5, 20]


def test_from_grams_measures_distance_and_alignment():
    y = np.repeat([0, 1], 4)
    grams = [np.eye(8) + weight * target_kernel(y) for weight in (0.0, 0.5, 2.0)]
    display = KernelEvolutionDisplay.from_grams(STEPS, grams, y)
    assert display.distance_from_start[0] == display.distance_from_end[-1] == 0.0
    assert display.distance_from_start[-1] == pytest.approx(display.distance_from_end[0], rel=1e-14)
    assert (np.diff(display.distance_from_start) > 0).all()
    np.testing.assert_allclose(display.alignment, [target_alignment(gram, y) for gram in grams])
    assert (np.diff(display.alignment) > 0).all()


def test_without_a_loss_there_are_two_panels_and_with_one_three():
    curves = ([0.0, 0.1, 0.2], [0.2, 0.1, 0.0], [0.1, 0.4, 0.6])
    two = KernelEvolutionDisplay(STEPS, *curves).plot()
    three = KernelEvolutionDisplay(STEPS, *curves, train_loss=[2.3, 1.0, 0.1]).plot()
    assert len(two.axes_) == 2
    assert len(three.axes_) == 3
    assert three.axes_[2].get_yscale() == "log"
    assert three.ax_ is three.axes_[0]
    start, end = three.ax_.lines
    np.testing.assert_array_equal(start.get_ydata(), curves[0])
    np.testing.assert_array_equal(end.get_ydata(), curves[1])
    np.testing.assert_array_equal(three.axes_[1].lines[0].get_ydata(), curves[2])


def test_a_loss_that_reaches_zero_is_drawn_on_a_linear_scale():
    zeros = np.zeros(3)
    display = KernelEvolutionDisplay(STEPS, zeros, zeros, zeros, train_loss=[1.0, 0.1, 0.0]).plot()
    assert display.axes_[2].get_yscale() == "linear"


def test_the_panels_take_the_place_of_given_axes():
    figure, axes = plt.subplots(1, 2, layout="constrained")
    display = KernelEvolutionDisplay(STEPS, *np.zeros((3, 3))).plot(axes[1])
    figure.canvas.draw()
    assert display.figure_ is figure
    assert display.ax_.get_position().x0 > axes[0].get_position().x1
    assert not axes[1].axison


def test_axes_placed_by_hand_are_refused():
    ax = plt.figure().add_axes((0.1, 0.1, 0.8, 0.8))
    with pytest.raises(PathKernelError, match="placed by hand") as caught:
        KernelEvolutionDisplay(STEPS, *np.zeros((3, 3))).plot(ax)
    assert "plt.subplots" in caught.value.write


@pytest.mark.parametrize("steps", [[], [0, 0, 1], [[0, 1, 2]]])
def test_steps_must_rise(steps):
    with pytest.raises(PathKernelError, match="not a rising sequence"):
        KernelEvolutionDisplay(steps, *np.zeros((3, 3)))


def test_a_curve_of_another_length_is_named():
    with pytest.raises(PathKernelError) as caught:
        KernelEvolutionDisplay(STEPS, [0, 0, 0], [0, 0, 0], [0, 0])
    assert caught.value.found == "`alignment` has shape (2,) for 3 steps"
    assert caught.value.expected == "One value per step: shape (3,)"
    assert caught.value.write
