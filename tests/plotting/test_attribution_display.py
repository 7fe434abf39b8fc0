"""The explanation of one prediction: which samples, in which order, and the account that adds up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib import pyplot as plt

from pathkernel.errors import PathKernelError
from pathkernel.plotting.appearance import LOWERS, RAISES, written
from pathkernel.plotting.attribution import AttributionDisplay, as_image
from pathkernel.plotting.waterfall import waterfall


def drawn(panel) -> np.ndarray:
    (image,) = panel.images
    return np.asarray(image.get_array())


def test_samples_come_strongest_first_and_images_belong_to_them(attributions, digits):
    images, labels = digits
    display = AttributionDisplay.from_attributions(attributions, 2, images, labels, k=4).plot()
    ascending = np.argsort(attributions.shares[2])
    assert [sample.index for sample in display.raising] == list(ascending[::-1][:4])
    assert [sample.index for sample in display.lowering] == list(ascending[:4])
    for side in ("raising", "lowering"):
        for panel, sample in zip(display.axes_[side], getattr(display, side), strict=True):
            np.testing.assert_array_equal(drawn(panel), images[sample.index])
            assert panel.get_xlabel().strip() == f"#{sample.index} · {labels[sample.index]}"
            assert sample.share == attributions.shares[2, sample.index]


def test_shares_are_written_with_their_sign_and_colour(attributions, digits):
    display = AttributionDisplay.from_attributions(attributions, 0, digits[0], k=2).plot()
    for side, sign, color in (("raising", "+", RAISES), ("lowering", "\N{MINUS SIGN}", LOWERS)):
        for panel in display.axes_[side]:
            (text,) = panel.texts
            assert text.get_text().startswith(sign)
            assert text.get_color() == color


def test_a_sample_on_the_wrong_side_is_never_shown(attributions, digits):
    shares = np.abs(attributions.shares)
    shares[0, 7] = 0.0
    display = AttributionDisplay.from_attributions(replace(attributions, shares=shares), 0, digits[0], k=50).plot()
    assert len(display.raising) == len(digits[0]) - 1
    assert display.lowering == display.axes_["lowering"] == []
    headings = [text.get_text() for panel in display.figure_.axes for text in panel.texts]
    assert "Lowered it most: none" in headings


def test_ties_are_shown_in_id_order(attributions, digits):
    tied = replace(attributions, shares=np.ones_like(attributions.shares))
    display = AttributionDisplay.from_attributions(tied, 0, digits[0], k=3)
    assert [sample.index for sample in display.raising] == [0, 1, 2]


def test_the_query_image_is_drawn_only_when_given(attributions, digits):
    images, _ = digits
    with_query = AttributionDisplay.from_attributions(attributions, 0, images, query_image=images[9]).plot()
    np.testing.assert_array_equal(drawn(with_query.axes_["query"]), images[9])
    assert "query" not in AttributionDisplay.from_attributions(attributions, 0, images).plot().axes_


def test_the_default_title_names_sample_and_output(attributions, digits):
    titles = [AttributionDisplay.from_attributions(attributions, q, digits[0]).title for q in (0, 5)]
    assert titles == ["Query 100, output 3", "Query 105"]  # output -1: a functional was explained
    assert AttributionDisplay.from_attributions(attributions, 0, digits[0], title="Mine").title == "Mine"


def test_long_labels_get_a_line_of_their_own_and_are_shortened(attributions, digits):
    for label, shown in (
        ("cat", " · cat"),
        ("automobile", "\nautomobile"),
        ("a remarkably long label", "\na remarkabl…"),
    ):
        labels = np.full(len(digits[0]), label)
        display = AttributionDisplay.from_attributions(attributions, 0, digits[0], labels, k=1).plot()
        assert display.axes_["raising"][0].get_xlabel().strip() == f"#{display.raising[0].index}{shown}"


def test_the_waterfall_steps_from_the_initial_network_to_the_output(attributions):
    bars = waterfall(attributions, 1)
    names = ["initial network", "samples, raising", "samples, lowering", "other channels", "network output"]
    assert [name for name, _, _ in bars] == names
    for (_, _, end), (_, start, _) in pairwise(bars[:-1]):
        assert start == end
    assert bars[0][1:] == (0.0, attributions.channels["initial"][1])
    raising, lowering = bars[1], bars[2]
    shares = attributions.shares[1]
    assert raising[2] - raising[1] == pytest.approx(shares[shares > 0].sum())
    assert lowering[2] - lowering[1] == pytest.approx(shares[shares < 0].sum())
    assert bars[-1] == ("network output", 0.0, attributions.output[1])
    assert bars[-2][2] == pytest.approx(attributions.output[1], rel=1e-12)


def test_a_visible_residual_gets_its_own_bar_and_a_lone_channel_its_name(attributions):
    channels = {name: attributions.channels[name] for name in ("initial", "weight_decay")}
    names = [name for name, _, _ in waterfall(replace(attributions, channels=channels), 1)]
    assert names[3:] == ["weight_decay", "residual", "network output"]


def test_the_waterfall_is_drawn_bar_by_bar(attributions, digits):
    display = AttributionDisplay.from_attributions(attributions, 1, digits[0]).plot()
    edges = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in display.ax_.patches]
    np.testing.assert_allclose(edges, [(start, end) for _, start, end in display.bars], atol=1e-12)


def test_the_display_takes_the_place_of_given_axes(attributions, digits):
    figure, axes = plt.subplots(2, 1, layout="constrained")
    display = AttributionDisplay.from_attributions(attributions, 1, digits[0]).plot(axes[1])
    figure.canvas.draw()
    assert display.figure_ is figure
    assert display.ax_.get_position().y1 < axes[0].get_position().y0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 8), (8, 8)), ((1, 8, 8), (8, 8)), ((8, 8, 1), (8, 8)), ((3, 8, 8), (8, 8, 3)), ((8, 8, 4), (8, 8, 4))],
)
def test_images_may_have_their_colours_first_or_last(shape, expected):
    assert as_image(np.zeros(shape), "images").shape == expected


def test_colours_outside_the_unit_interval_are_clipped():
    np.testing.assert_array_equal(np.unique(as_image(np.array([[[-1.0, 0.5, 2.0]]]), "images")), [0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"query": 6}, "`query` is 6"),
        ({"query": -1}, "`query` is -1"),
        ({"k": 0}, "`k` is 0"),
        ({"images": np.zeros((3, 8, 8))}, "There are 3 images for 40 training samples"),
        ({"labels": [1, 2]}, "There are 2 labels for 40 training samples"),
        ({"images": np.zeros((40, 64))}, "An entry of `images` has shape (64,)"),
        ({"query_image": np.zeros((2, 8, 8))}, "An entry of `query_image` has shape (2, 8, 8)"),
    ],
)
def test_refusals_have_three_parts(attributions, digits, changes, found):
    with pytest.raises(PathKernelError) as caught:
        AttributionDisplay.from_attributions(attributions, **({"query": 0, "images": digits[0]} | changes))
    assert caught.value.found == found
    assert caught.value.expected
    assert caught.value.write


@pytest.mark.parametrize(
    ("value", "scale", "sign", "text"),
    [
        (-3.7, 6.48, True, "−3.70"),
        (0.0992, 0.467, True, "+0.099"),
        (2.0, 1234.0, False, "2"),
        (2e-7, 3e-7, False, "2.00e−07"),
        (0.0, 0.0, False, "0.00"),
    ],
)
def test_numbers_side_by_side_have_the_same_decimals(value, scale, sign, text):
    assert written(value, scale, sign) == text
