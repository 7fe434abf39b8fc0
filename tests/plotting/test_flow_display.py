"""Pictures of flows and ledgers: what is drawn is what was measured."""

from __future__ import annotations

from typing import Any

import dynamical
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from pathkernel import dynamics
from pathkernel.dynamics import EnergyLedger, Ledger, LossLedger, RegularizationLedger
from pathkernel.errors import PathKernelError
from pathkernel.plotting import EnergyDisplay, FlowDisplay, LossLedgerDisplay, RegularizationDisplay
from pathkernel.plotting.appearance import write_figure


@pytest.fixture(scope="module")
def flow() -> dynamics.Flow:
    return dynamics.gradient_flow(dynamical.network(), dynamical.LOSS, dynamical.data(), 0.2, points=5)


def test_a_flow_alone_has_its_way_and_its_loss(flow: dynamics.Flow) -> None:
    display = FlowDisplay.from_flow(flow).plot()
    assert len(display.axes_) == 2 and display.ax_ is display.axes_[0] and display.distance is None
    np.testing.assert_array_equal(display.axes_[1].lines[0].get_ydata(), flow.losses)
    np.testing.assert_array_equal(display.plane[0], [0, 0])
    # The plane holds what there is of the way to be seen: no more than its length, and nearly all of it.
    away = (flow.theta - flow.theta[0]).norm(dim=1).numpy()
    seen = np.linalg.norm(display.plane, axis=1)
    assert (seen <= away + 1e-12).all() and seen[-1] > 0.99 * away[-1]
    display.figure_.canvas.draw()


def test_beside_a_run_the_distance_is_drawn(flow: dynamics.Flow) -> None:
    trajectory = dynamical.recorded(lambda p: torch.optim.SGD(p, lr=0.05), 4)
    display = FlowDisplay.from_flow(flow, trajectory).plot()
    assert len(display.axes_) == 3
    beside = flow.distance(trajectory)
    np.testing.assert_array_equal(display.axes_[2].lines[0].get_ydata(), beside.distance)
    assert display.run_losses is not None
    assert display.run_losses[-1] == pytest.approx(float(flow.system.loss.value(trajectory.final)), rel=1e-12)
    assert [line.get_label() for line in display.axes_[0].lines] == ["gradient flow", "recorded run", "start"]


def test_a_run_comes_whole() -> None:
    with pytest.raises(PathKernelError, match=r"Part of a recorded run.*FlowDisplay.from_flow"):
        FlowDisplay([0, 1], [1, 0], [[0, 0], [1, 1]], run_times=[0, 1])


def test_energies_are_stacked_up_to_the_start() -> None:
    ledger = EnergyLedger(np.arange(3.0), np.array([1.0, 0.5, 0.2]), np.array([0, 0.3, 0.1]), np.array([0, 0.2, 0.7]))
    display = EnergyDisplay(ledger).plot()
    areas = [collection.get_paths()[0].get_extents() for collection in display.ax_.collections]
    assert len(areas) == 3 and max(area.y1 for area in areas) == pytest.approx(1.0)
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels == ["loss", "kinetic energy", "lost to friction", "at the start"]


def test_a_regularization_ledger_shows_every_part_and_the_remainder() -> None:
    parts = {name: np.array(value) for name, value in {"flow": -1.0, "regularization": -0.1, "start": 0.05}.items()}
    steps = {"flow": np.array([-0.6, -0.4]), "regularization": np.array([-0.04, -0.06])}
    ledger = RegularizationLedger(Ledger(np.array(-1.0), parts), None, steps, np.array([0.0, 0.5, 1.0]))
    display = RegularizationDisplay(ledger).plot()
    course, sums = display.axes_
    np.testing.assert_allclose(course.lines[0].get_ydata(), [0, -0.6, -1.0])
    assert [label.get_text() for label in sums.get_yticklabels()] == ["flow", "regularization", "start", "remainder"]
    assert [bar.get_width() for bar in sums.patches] == pytest.approx([1.0, 0.1, 0.05, 0.05])
    assert "\N{MINUS SIGN}1.00" in [text.get_text() for text in sums.texts]


@pytest.mark.filterwarnings("error")
def test_a_ledger_of_a_run_that_stood_still_is_drawn() -> None:
    still = dynamics.regularization_ledger(dynamical.recorded(lambda p: torch.optim.SGD(p, lr=0.0), 1))
    display = RegularizationDisplay(still).plot()
    display.figure_.canvas.draw()
    assert [bar.get_width() for bar in display.axes_[1].patches] == [0, 0, 0]


def test_a_loss_ledger_is_drawn_by_samples_modules_and_steps() -> None:
    samples, steps = np.array([-0.3, 0.1, -0.2]), np.array([-0.25, -0.15])
    modules: dict[str, Any] = {"0": -0.3, "2": -0.1}
    ledger = LossLedger(1.0, 0.61, samples, modules, steps, {"rounding": 0.0, "weight_decay": 0.01}, np.zeros((3, 2)))
    display = LossLedgerDisplay(ledger).plot()
    left, middle, right = display.axes_
    assert "2 of 3 lowered it" in left.get_xlabel()
    assert [bar.get_width() for bar in middle.patches] == pytest.approx([-0.3, -0.1, 0.01])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [1.0, 0.75, 0.6])


def test_a_figure_is_written_and_let_go(tmp_path, flow: dynamics.Flow) -> None:
    figure = FlowDisplay.from_flow(flow).plot().figure_
    write_figure(figure, tmp_path / "deep" / "flow.png")
    assert (tmp_path / "deep" / "flow.png").read_bytes().startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)
