"""The heat map: sorted by class, normalised, labels apart."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib import pyplot as plt

from pathkernel.errors import PathKernelError
from pathkernel.plotting.gram import GramDisplay


def overlaps(labels) -> bool:
    """Whether two neighbouring tick labels share pixels."""
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    return any(first.overlaps(second) for first, second in pairwise(boxes))


def test_samples_are_sorted_by_class_and_keep_their_order_within():
    y = np.array([1, 0, 1, 0, 2])
    K = np.diag(np.arange(1.0, 6.0))
    display = GramDisplay.from_gram(K, y, normalize=False)
    np.testing.assert_array_equal(display.order, [1, 3, 0, 2, 4])
    np.testing.assert_array_equal(np.diag(display.gram), [2, 4, 1, 3, 5])
    np.testing.assert_array_equal(display.boundaries, [0, 2, 4, 5])
    assert display.classes == ["0", "1", "2"]


def test_cosines_have_a_diagonal_of_ones_and_ignore_the_length_of_features():
    features = np.random.default_rng(0).normal(size=(8, 3))
    lengths = np.arange(1.0, 9.0)[:, None]
    short = GramDisplay.from_gram(features @ features.T)
    long = GramDisplay.from_gram((lengths * features) @ (lengths * features).T)
    np.testing.assert_allclose(np.diag(short.gram), 1.0, rtol=1e-14)
    np.testing.assert_allclose(long.gram, short.gram, atol=1e-14)


def test_floating_point_targets_sort_without_boundaries():
    display = GramDisplay.from_gram(np.eye(3), [0.3, 0.1, 0.2])
    np.testing.assert_array_equal(display.order, [1, 2, 0])
    assert display.boundaries is None
    assert display.plot().ax_.get_xlabel() == "sample"


def test_plot_draws_a_line_at_every_boundary_and_names_classes(gram, digits):
    display = GramDisplay.from_gram(gram, digits[1]).plot()
    assert len(display.ax_.lines) == 2 * 9
    assert sorted({line.get_ydata()[0] for line in display.ax_.lines[::2]}) == list(display.boundaries[1:-1] - 0.5)
    assert [label.get_text() for label in display.ax_.get_yticklabels()] == [str(k) for k in range(10)]
    assert display.figure_ is display.ax_.figure
    np.testing.assert_array_equal(display.im_.get_array(), display.gram)
    assert display.colorbar_ is not None


def test_lines_between_very_many_classes_would_hide_the_map():
    assert GramDisplay.from_gram(np.eye(100), np.arange(100)).plot().ax_.lines[:] == []


def test_plot_uses_the_axes_it_is_given(gram):
    figure, ax = plt.subplots()
    display = GramDisplay.from_gram(gram).plot(ax, colorbar=False)
    assert display.ax_ is ax
    assert display.figure_ is figure
    assert display.colorbar_ is None
    assert len(figure.axes) == 1


def test_a_scale_with_clearly_negative_values_is_symmetric_about_zero():
    display = GramDisplay.from_gram(np.array([[1.0, -0.5], [-0.5, 1.0]])).plot()
    assert display.im_.get_clim() == (-1.0, 1.0)
    assert GramDisplay.from_gram(np.eye(2)).plot().im_.get_clim() == (0.0, 1.0)


@pytest.mark.parametrize(("classes", "name"), [(100, "{}"), (10, "a rather long class {}"), (60, "class {}")])
def test_tick_labels_do_not_overlap(classes, name):
    y = np.array([name.format(k) for k in range(classes)]).repeat(3)
    display = GramDisplay.from_gram(np.eye(len(y)), y).plot()
    display.figure_.canvas.draw()
    assert not overlaps(display.ax_.get_xticklabels())
    assert not overlaps(display.ax_.get_yticklabels())


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((np.eye(3), [0, 1]), "`y` has shape (2,) for a Gram matrix of 3 samples"),
        ((np.diag([1.0, 0.0]),), "Sample 1 has K_ii = 0"),
        ((np.ones((2, 3)),), "`K` has shape (2, 3)"),
    ],
)
def test_refusals_have_three_parts(arguments, found):
    with pytest.raises(PathKernelError) as caught:
        GramDisplay.from_gram(*arguments)
    assert caught.value.found == found
    assert caught.value.expected
    assert caught.value.write
