"""Questions to a flow: what makes no sense is refused by name, and points of short flows are told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamical import LOSS, data, network

from pathkernel import dynamics
from pathkernel.errors import InputError

NONE = torch.zeros(0, 3, dtype=torch.float64)


@pytest.fixture(scope="module")
def flow() -> dynamics.Flow:
    return dynamics.gradient_flow(network(), LOSS, data(), 0.1, points=3)


@pytest.mark.parametrize("name", ["tolerance", "quadrature", "measure"])
def test_options_that_a_path_kernel_of_a_flow_has_not_are_refused(flow: dynamics.Flow, name: str) -> None:
    options: dict[str, Any] = {name: "left"}
    said = f"`{name}=` was given to a flow's path kernel.*`dtype`, `engine`, `memory`, `outputs`, `progress`"
    for ask in (flow.kernel, lambda **o: flow.path_kernel(data()[0], **o)):
        with pytest.raises(InputError, match=said):
            ask(**options)


@pytest.mark.parametrize("make", [dynamics.langevin, dynamics.gradient_flow])
def test_options_are_refused_before_the_network_runs(make: Callable[..., Any]) -> None:
    model, noisy = network(), {"step": 0.01, "noise": 0.1} if make is dynamics.langevin else {}
    model.register_forward_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(InputError, match="`unknown=` was given to a flow"):
        make(model, LOSS, data(), unknown=1, **noisy)


def test_no_samples_have_no_outputs_and_no_explanation(flow: dynamics.Flow) -> None:
    for asker in ("outputs", "explain"):
        with pytest.raises(InputError, match=rf"`Flow\.{asker}` was given no samples"):
            getattr(flow, asker)(NONE)
    assert flow.path_kernel(NONE).shape == (0, 0)  # an empty matrix is one


def test_a_flow_of_one_point_explains_nothing(flow: dynamics.Flow) -> None:
    alone = dynamics.Flow(flow.system, flow.times[:1], flow.states[:1], flow.solver)
    with pytest.raises(InputError, match="a flow that has one point"):
        alone.explain(data()[0])


def test_points_of_a_very_short_flow_are_told_apart() -> None:
    short = dynamics.gradient_flow(network(), LOSS, data(), 1e-9, points=5)
    assert len({tuple(theta.tolist()) for theta in short.theta}) == 5
    torch.testing.assert_close(short.at(short.times), short.theta, rtol=0, atol=0)
