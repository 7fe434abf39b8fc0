"""Pictures of games of two numbers, of their stability, and of shares in the plane."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt

from pathkernel.dynamics import dirac_gan
from pathkernel.dynamics.local_stability import Stability
from pathkernel.errors import PathKernelError
from pathkernel.plotting.appearance import LOWERS, RAISES
from pathkernel.plotting.share_map import ShareMapDisplay
from pathkernel.plotting.stability import StabilityDisplay
from pathkernel.plotting.vector_field import DiracGANDisplay, VectorFieldDisplay


def test_arrows_have_one_length_and_point_along_the_field():
    display = VectorFieldDisplay.from_field(lambda x, y: (-y, x), 1.0, {"a": [[1, 0], [0, 1]]}, title="turns").plot()
    u, v, x, y = display.arrows_.U, display.arrows_.V, display.x.ravel(), display.y.ravel()
    away = np.hypot(x, y) > 0
    np.testing.assert_allclose(np.hypot(u, v)[away], 1.0)
    np.testing.assert_allclose(u * x + v * y, 0.0, atol=1e-12)  # it turns
    np.testing.assert_array_equal(display.lines_["a"].get_xydata(), [[1, 0], [0, 1]])
    assert display.ax_.get_title(loc="left") == "turns" and display.ax_.get_legend() is not None


def test_a_path_lies_in_the_plane():
    with pytest.raises(PathKernelError, match=r"The path 'a' has shape \(3,\)"):
        VectorFieldDisplay.from_field(lambda x, y: (-y, x), 1.0, {"a": [1, 2, 3]})


def test_variants_are_drawn_side_by_side_with_what_they_did_before_they_diverged():
    chosen = [dirac_gan.r1(1.0), dirac_gan.wgan_gp(0.0), dirac_gan.wgan("spectral")]
    display = DiracGANDisplay.from_variants(chosen, rate=3.0, steps=60).plot()
    assert [panel.get_title(loc="left") for panel in display.axes_] == [variant.name for variant in chosen]
    assert len(display.fields[0].paths["simultaneous"]) < 61
    (legend,) = display.figure_.legends
    assert [text.get_text() for text in legend.get_texts()] == list(dirac_gan.UPDATES)


def test_eigenvalues_that_make_a_game_unstable_have_another_colour():
    report = Stability(np.array([0.1, -0.2 + 1j, -0.2 - 1j]), np.array([1.2, 0.5j]), 0.0, (("D", "G"),), True)
    display = StabilityDisplay.from_stability(report).plot()
    for name, unstable in (("flow", [0.1]), ("map", [1.2])):
        lines = {line.get_color(): line.get_xdata() for line in display.axes_[name].lines if line.get_marker() == "o"}
        assert lines[LOWERS].tolist() == unstable and len(lines[RAISES]) == len(getattr(report, name)) - 1
    assert "radius 1.2" in display.axes_["map"].get_title(loc="left")


@pytest.mark.parametrize("updates", ["alternating", ("D", "D", "D", "D", "D", "G")], ids=str)
def test_eigenvalues_on_the_border_are_neutral_whatever_their_rounding(updates):
    report = dirac_gan.gan().stability(0.05, updates)
    moved = Stability(
        report.flow + 1e-16, report.map * (1 + 1e-15), 0.0, report.updates, True, rounding=report.rounding
    )
    for one in (report, moved):
        for panel in StabilityDisplay.from_stability(one).plot().axes_.values():
            assert [text.get_text() for text in panel.get_legend().get_texts()] == ["neutral: 2"]


def test_groups_in_the_plane_share_their_limits():
    real, fakes = np.eye(2), np.array([[3.0, 0.0], [0.0, -3.0], [1.0, 1.0]])
    figure, ax = plt.subplots()
    groups = {"real": (real, [1.0, 2.0]), "generated": (fakes, [-0.5, -3.0, 0.0])}
    display = ShareMapDisplay(groups, [0.5, 0.5]).plot(ax)
    one, other = display.axes_.values()
    assert one.get_xlim() == other.get_xlim() and one.get_ylim() == other.get_ylim()
    low, high = other.collections[0].get_clim()
    assert low == -high and high > one.collections[0].get_clim()[1]
    assert other.collections[0].get_array()[-1] == -3.0  # the strongest on top
    assert "-3.5 in all" in other.get_title(loc="left") and display.figure_ is figure


def test_a_group_has_a_share_of_each_point():
    with pytest.raises(PathKernelError, match=r"The group 'real' has points \(2, 2\) and shares \(3,\)"):
        ShareMapDisplay({"real": (np.eye(2), np.ones(3))}, [0, 0])
