"""A player's view of a sample: which real samples and which fakes, and when these were made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot as plt

from pathkernel.dynamics.origins import Origins
from pathkernel.errors import PathKernelError
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.plotting.player import BARS, PlayerViewDisplay

REAL, FAKES = 30, 10


@pytest.fixture
def origins() -> Origins:
    """Ten fakes of the rounds 0 to 4, the last of which nobody made."""
    made_at = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, -1])
    return Origins(made_at, np.where(made_at < 0, "", "G").astype(object), made_at, None)


@pytest.fixture
def view(attributions: Attributions) -> Attributions:
    """The attributions of the other displays, the last ten of whose samples are fakes."""
    return replace(attributions, sources={"generated": slice(REAL, REAL + FAKES)})


def display(view: Attributions, origins: Origins, images: np.ndarray, query: int = 0, **options) -> PlayerViewDisplay:
    return PlayerViewDisplay.from_attributions(view, query, images[:REAL], images[REAL:], origins, **options)


def test_real_samples_and_fakes_are_told_apart(view, origins, digits):
    images = digits[0]
    found = display(view, origins, images, query=1, k=3, query_image=images[0]).plot()
    shares = view.shares[1]
    assert [one.index for one in found.real["raising"]] == list(np.argsort(-shares[:REAL])[:3])
    assert [one.index for one in found.generated["lowering"]] == list(np.argsort(shares[REAL:])[:3])
    for panel, sample in zip(found.axes_["generated raising"], found.generated["raising"], strict=True):
        (drawn,) = panel.images
        np.testing.assert_array_equal(drawn.get_array(), images[REAL + sample.index])
        made_at = origins.made_at[sample.index]
        assert panel.get_xlabel().strip() == ("?" if made_at < 0 else f"G {made_at}")
    assert found.axes_["real raising"][0].get_xlabel().startswith("#")
    assert found.figure_ is found.ax_.figure


def test_bars_add_up_the_shares_of_all_fakes_that_were_made(view, origins, digits):
    found = display(view, origins, digits[0])
    known = view.shares[0, REAL:][origins.known]
    assert found.raised.sum() + found.lowered.sum() == pytest.approx(known.sum())
    np.testing.assert_allclose((found.raised + found.lowered)[1], view.shares[0, REAL + 2 : REAL + 4].sum())
    assert found.edges.tolist() == [0, 1, 2, 3, 4, 5]
    found.plot()
    assert found.ax_.get_xlabel() == "step of G at which they were made"


def test_many_steps_share_a_bar(view, origins, digits):
    late = replace(origins, made_at=np.arange(FAKES) * 100)
    assert len(display(view, late, digits[0]).edges) <= BARS + 1


def test_without_fakes_on_one_side_it_says_so(view, origins, digits):
    shares = view.shares.copy()
    shares[0, REAL:] = np.abs(shares[0, REAL:])
    found = display(replace(view, shares=shares), origins, digits[0]).plot()
    said = [text.get_text() for panel in found.figure_.axes for text in panel.texts]
    assert "Fakes that lowered it: none" in said and found.axes_["generated lowering"] == []


def test_it_takes_the_place_of_given_axes(view, origins, digits):
    figure, ax = plt.subplots()
    assert display(view, origins, digits[0]).plot(ax).figure_ is figure


def test_what_does_not_belong_together_is_refused(view, origins, digits):
    images = digits[0]
    with pytest.raises(PathKernelError, match="Query 9 and the source 'generated' were asked for"):
        display(view, origins, images, query=9)
    with pytest.raises(PathKernelError, match="the source 'noise' were asked for"):
        display(view, origins, images, source="noise")
    with pytest.raises(PathKernelError, match="There are 29 `images` for 30 columns"):
        PlayerViewDisplay.from_attributions(view, 0, images[1:REAL], images[REAL:], origins)
    with pytest.raises(PathKernelError, match="There are 9 `generated` for 10 columns"):
        PlayerViewDisplay.from_attributions(view, 0, images[:REAL], images[REAL + 1 :], origins)
    few = replace(origins, **{name: getattr(origins, name)[1:] for name in ("step", "maker", "made_at")})
    with pytest.raises(PathKernelError, match="There are 9 `origins` for 10 columns"):
        display(view, few, images)
