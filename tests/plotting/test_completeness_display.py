"""Network against machine: what is drawn is what the account says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pathkernel.errors import PathKernelError
from pathkernel.plotting.completeness import CompletenessDisplay


def test_the_scatter_holds_network_and_machine(attributions):
    display = CompletenessDisplay.from_attributions(attributions).plot()
    machine = attributions.shares.sum(axis=1) + sum(attributions.channels.values())
    (points,) = display.ax_.collections
    np.testing.assert_allclose(points.get_offsets(), np.c_[attributions.output, machine], rtol=1e-12)
    assert display.ax_ is display.axes_[0]
    assert display.figure_ is display.ax_.figure


def test_a_gap_in_the_account_is_seen(attributions):
    output = attributions.output.copy()
    output[2] += 0.25
    display = CompletenessDisplay.from_attributions(replace(attributions, output=output)).plot()
    assert display.largest_difference == pytest.approx(0.25)
    assert "0.25" in display.ax_.texts[0].get_text()


def test_every_query_is_in_the_histogram_or_counted_as_zero(attributions):
    display = CompletenessDisplay(
        network=np.ones(4),
        machine=np.ones(4),
        residual=np.array([0.0, 1e-15, 1e-14, 1e-3]),
        quadrature_error=np.array([1e-6, 1e-5, 1e-5, 1e-4]),
    ).plot()
    panel = display.axes_[1]
    assert sum(bar.get_height() for bar in panel.patches) == 3 + 4
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["residual (1 exactly 0)", "quadrature error"]


def test_an_account_closed_exactly_can_be_drawn():
    zeros = np.zeros(3)
    display = CompletenessDisplay(network=zeros, machine=zeros, residual=zeros, quadrature_error=zeros).plot()
    display.figure_.canvas.draw()
    assert display.largest_difference == 0.0


def test_values_that_are_not_finite_are_refused_rather_than_left_out(attributions):
    error = np.array([np.nan, *attributions.quadrature_error[1:]])
    with pytest.raises(PathKernelError, match="not finite in quadrature_error") as caught:
        CompletenessDisplay.from_attributions(replace(attributions, quadrature_error=error))
    assert caught.value.expected
    assert "leave it out" in caught.value.write


def test_the_error_of_the_shares_is_drawn_where_it_was_measured(attributions):
    display = CompletenessDisplay.from_attributions(attributions).plot()
    assert len(display.axes_[1].get_legend().get_texts()) == 2
    verified = replace(attributions, shares_error=np.full(len(attributions.output), 1e-5))
    display = CompletenessDisplay.from_attributions(verified).plot()
    labels = [text.get_text() for text in display.axes_[1].get_legend().get_texts()]
    assert labels[-1] == "shares error"
    with pytest.raises(PathKernelError, match="not finite in shares_error"):
        CompletenessDisplay.from_attributions(replace(verified, shares_error=verified.shares_error * np.nan))
