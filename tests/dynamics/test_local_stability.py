"""Eigenvalues of games: against finite differences of the steps that torch's own optimizers take, and closed forms."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import pathkernel as pk
from pathkernel.dynamics import local_stability
from pathkernel.dynamics.local_stability import stability

RATES = {"D": 0.3, "G": 0.2}


def players(width: int = 3) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        D = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()
        G = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    D[0].bias.requires_grad_(False)
    return {"D": D, "G": G}


REAL = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).double()
LATENT = torch.randn(6, 2, generator=torch.Generator().manual_seed(2)).double()
LOSSES = {
    "D": lambda D, G: softplus(-D(REAL)).mean() + softplus(D(G(LATENT))).mean(),
    "G": lambda D, G: softplus(-D(G(LATENT))).mean(),
}


def trained(networks: dict[str, nn.Module]) -> list[nn.Parameter]:
    return [p for network in networks.values() for p in network.parameters() if p.requires_grad]


def stepped(networks: dict[str, nn.Module], updates: Any) -> Tensor:
    """The players after plain steps by `torch.optim.SGD`, flat; the networks are put back."""
    before = {name: {k: v.clone() for k, v in network.state_dict().items()} for name, network in networks.items()}
    optimizers = {
        name: torch.optim.SGD([p for p in network.parameters() if p.requires_grad], RATES[name])
        for name, network in networks.items()
    }
    for stage in [("D", "G")] if updates == "simultaneous" else [(name,) for name in updates]:
        gradients = {}
        for name in stage:
            own = optimizers[name].param_groups[0]["params"]
            gradients[name] = torch.autograd.grad(LOSSES[name](*networks.values()), own)
        for name in stage:
            for p, gradient in zip(optimizers[name].param_groups[0]["params"], gradients[name], strict=True):
                p.grad = gradient
            optimizers[name].step()
    found = nn.utils.parameters_to_vector(trained(networks)).detach().clone()
    for name, network in networks.items():
        network.load_state_dict(before[name])
        network.zero_grad()
    return found


def differences(networks: dict[str, nn.Module], updates: Any, width: float = 1e-5) -> np.ndarray:
    """The Jacobian of these steps by central differences, (P, P)."""
    own = trained(networks)
    at = nn.utils.parameters_to_vector(own).detach().clone()
    columns = []
    for place in range(len(at)):
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved[place] += sign * width
            nn.utils.vector_to_parameters(moved, own)
            ends.append(stepped(networks, updates))
        columns.append((ends[0] - ends[1]) / (2 * width))
    nn.utils.vector_to_parameters(at, own)
    return torch.stack(columns, dim=1).numpy()


def by_size(values: np.ndarray) -> np.ndarray:
    return values[np.lexsort((values.imag, -np.abs(values).round(7)))]


@pytest.mark.parametrize("updates", ["simultaneous", ("D", "G"), ("D", "D", "G")], ids=str)
def test_eigenvalues_are_those_of_the_steps_that_optimizers_take(updates: Any) -> None:
    networks = players()
    report = stability(networks, LOSSES, RATES, updates=updates)
    expected = np.linalg.eigvals(differences(networks, updates))
    np.testing.assert_allclose(by_size(report.map), by_size(expected), atol=1e-7)
    assert report.complete and report.radius == pytest.approx(np.abs(expected).max(), abs=1e-7)


def test_steps_of_a_small_rate_are_the_flow() -> None:
    networks, rate = players(), 1e-6
    report = stability(networks, LOSSES, rate, updates="alternating")
    ordered = report.map[np.lexsort((-report.map.imag, -report.map.real.round(12)))]
    np.testing.assert_allclose((ordered - 1) / rate, report.flow, atol=1e-4)
    assert report.abscissa == pytest.approx(report.flow.real.max())


@pytest.mark.parametrize("updates", ["simultaneous", "alternating"])
def test_products_alone_find_the_outermost_eigenvalues(updates: str) -> None:
    networks = players(width=8)
    whole = stability(networks, LOSSES, RATES, updates=updates, method="dense")
    some = stability(networks, LOSSES, RATES, updates=updates, method="arnoldi", count=4)
    assert not some.complete and len(some.map) >= 4 and some.error < 1e-10
    np.testing.assert_allclose(some.flow.real[:4], whole.flow.real[:4], atol=1e-9)
    np.testing.assert_allclose(np.abs(some.map[:4]), np.abs(whole.map[:4]), atol=1e-9)
    again = stability(networks, LOSSES, RATES, updates=updates, method="arnoldi", count=4)
    np.testing.assert_array_equal(again.map, some.map)


def test_a_report_says_how_fast_a_game_turns() -> None:
    flow = np.array([-0.15 + 0.45j, -0.15 - 0.45j, -1.0, 0.0, 2.0j])
    report = pk.dynamics.Stability(flow, np.array([0.5j, -0.25]), 0.0, (("D",), ("G",)), True)
    np.testing.assert_allclose(report.rotation, [3, 3, 0, 0, np.inf])
    assert report.abscissa == 0 and report.radius == 0.5
    assert "flow up to +0 in the real part, map of the steps (D, G) up to 0.5 in size" in repr(report)


def test_networks_and_random_numbers_stay_as_they_were() -> None:
    networks = players()
    before = {name: {k: v.clone() for k, v in network.state_dict().items()} for name, network in networks.items()}
    drawn = torch.get_rng_state()
    losses = {
        "D": lambda D, G: softplus(D(G(torch.randn(6, 2).double()))).mean() - D(REAL).mean(),
        "G": lambda D, G: -D(G(torch.randn(6, 2).double())).mean(),
    }
    first, second = (stability(networks, losses, RATES, updates="alternating") for _ in range(2))
    np.testing.assert_array_equal(first.map, second.map)
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, network in networks.items():
        assert all(map(torch.equal, network.state_dict().values(), before[name].values()))
        assert all(p.grad is None for p in network.parameters())


def test_gradients_that_are_constants_do_not_move_each_other() -> None:
    D, G = (nn.Linear(2, 1, bias=False).double() for _ in range(2))
    losses = {"D": lambda D, G: D(REAL).sum(), "G": lambda D, G: G(REAL).sum()}
    report = stability({"D": D, "G": G}, losses, 0.1)
    expected = 2**0.5 * float(REAL.sum(dim=0).norm())
    assert report.speed == pytest.approx(expected) and not report.flow.any() and (report.map == 1).all()


def test_losses_that_hide_derivatives_are_said_to() -> None:
    """`detach` leaves the gradients as they are, and takes the block of the other player out of the Jacobian."""
    networks = players()
    hidden = {**LOSSES, "D": lambda D, G: softplus(-D(REAL)).mean() + softplus(D(G(LATENT).detach())).mean()}
    with pytest.warns(
        pk.errors.CertificateWarning, match=r"Backward passes lack \d+% of how the gradient of a loss"
    ) as said:
        stability(networks, hidden, RATES)
    assert said[0].filename == __file__
    for dtype in (torch.float32, torch.float64):
        converted = {name: network.to(dtype) for name, network in networks.items()}
        real, latent = REAL.to(dtype), LATENT.to(dtype)
        losses = {
            "D": lambda D, G, real=real, latent=latent: (softplus(-D(real)) + softplus(D(G(latent)))).mean(),
            "G": lambda D, G, latent=latent: softplus(-D(G(latent))).mean(),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = stability(converted, losses, RATES)
        assert 0 < report.rounding < 1e-4


def test_eigenvalues_that_are_not_found_are_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.sparse.linalg as linalg

    def stops(operator: Any, k: int, **options: Any) -> Any:
        raise linalg.ArpackNoConvergence("no convergence", np.array([1.5]), np.eye(operator.shape[0])[:, :1])

    monkeypatch.setattr(linalg, "eigs", stops)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = stability(players(), LOSSES, RATES, method="arnoldi", count=2)
    assert report.map.tolist() == [1.5]
    assert "found 1 of the 2 outermost eigenvalues" in str(said[0].message)
    assert said[0].category is pk.errors.CertificateWarning and said[0].filename == __file__


def test_what_is_no_game_is_refused() -> None:
    networks = players()
    D, G = networks.values()

    def of_d(loss: Any) -> dict[str, Any]:
        return {"losses": {**LOSSES, "D": loss}}

    def of_players(**changed: Any) -> dict[str, Any]:
        return {"players": {**networks, **changed}}

    shared = nn.Sequential(D[0], nn.Tanh(), nn.Linear(3, 2).double())
    infinite = {**LOSSES, "D": lambda D, G: D(REAL).mean() * float("inf")}
    for said, options in [
        ("`losses` are of 'D'", {"losses": {"D": LOSSES["D"]}}),
        ("`rates` are of 'G'", {"rates": {"G": 0.1}}),
        ("`method='lanczos'`", {"method": "lanczos"}),
        ("`updates='D'`", {"updates": "D"}),
        (r"`updates=\('D', 'H'\)`", {"updates": ("D", "H")}),
        (r"`updates=\(\)`", {"updates": ()}),
        ("`updates=5`", {"updates": 5}),
        ("The gradient of the loss of 'D' is not finite", {"losses": infinite}),
        ("The loss of 'D' does not depend on the parameters", of_d(lambda d, g: LOSSES["D"](D, G))),
        ("The loss of 'D' does not depend on the parameters", of_d(lambda D, G: LOSSES["D"](D, G).detach())),
        ("The loss of 'D' does not depend on the parameters", of_d(lambda D, G: torch.zeros(()))),
        ("The loss of 'D' depends on the network of a player", of_d(lambda D, g: LOSSES["D"](D, G))),
        ("The loss of 'D' is a float", of_d(lambda D, G: LOSSES["D"](D, G).item())),
        (r"The loss of 'D' is a tensor \(6, 1\)", of_d(lambda D, G: D(REAL))),
        ("The loss of 'D' is a int", of_d(1)),
        ("The players 'D' and 'G' share the parameter `0.weight`", of_players(G=shared)),
        ("The player 'G' is a Tanh without parameters", of_players(G=nn.Tanh())),
        (r"torch.float64 on cpu \('D'\), torch.float32 on cpu \('G'\)", of_players(G=nn.Linear(2, 2))),
        ("`players` is a list, `losses` a dict", {"players": [D, G]}),
        (r"`players` is \{\}", {"players": {}}),
        ("`players` is None", {"players": None}),
        ("`players` is a dict, `losses` a tuple", {"losses": tuple(LOSSES.values())}),
        ("The rate of 'G' is -0.1", {"rates": {"D": 0.1, "G": -0.1}}),
        ("The rate of 'D' is nan", {"rates": float("nan")}),
        ("The rate of 'D' is 'x'", {"rates": "x"}),
        ("The rate of 'D' is None", {"rates": None}),
        ("`count=0`", {"count": 0}),
        ("`count=True`", {"count": True}),
    ]:
        given: Any = {"players": networks, "losses": LOSSES, **options}
        with pytest.raises(pk.errors.InputError, match=said) as found:
            stability(**given)
        assert found.value.expected and found.value.write


def test_small_games_are_dense_and_large_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = players()
    size = len(nn.utils.parameters_to_vector(trained(networks)))
    monkeypatch.setattr(local_stability, "DENSE", size)
    assert stability(networks, LOSSES, RATES).complete
    monkeypatch.setattr(local_stability, "DENSE", size - 1)
    assert not stability(networks, LOSSES, RATES, count=2).complete
