"""Games: both players are exact kernel machines, and the clock says when each sample was made, and of what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import pathkernel as pk
from pathkernel.cli.game import EXAMPLES, convolutional_discriminator, convolutional_generator

RESIDUAL = {torch.float64: 1e-10, torch.float32: 1e-4}
"""What both players of a GAN may leave, and their split errors, as the benchmark says."""
REAL, BATCH, LATENT = 32, 8, 4
OF_DIGITS = EXAMPLES["digits"].noise
"""Shape of a latent of the generator of digits."""
bce = F.binary_cross_entropy_with_logits


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def small_players(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A discriminator and a generator of points in the plane."""
    D = seeded(lambda: nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))
    G = seeded(lambda: nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh(), nn.Linear(8, 2)), 1)
    return D.to(dtype), G.to(dtype)


def points(n: int = REAL, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype) + 1


def noise(generator: torch.Generator, n: int = BATCH) -> Tensor:
    return torch.randn(n, LATENT, generator=generator, dtype=torch.float64)


def at_rounding(why: pk.Attributions, dtype: torch.dtype = torch.float64) -> bool:
    return why.relative_residual <= RESIDUAL[dtype] and why.split_error <= RESIDUAL[dtype]


# -- a deep convolutional GAN with BatchNorm, R1 and EMA -----------------------------------------------------------


def train_digits(dtype: torch.dtype, record: bool) -> dict[str, Any]:
    """The ordinary alternating loop, R1 in its channel and an average of the generator beside it."""
    images = torch.tensor(load_digits().images[:REAL] / 8 - 1, dtype=dtype)[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        D, G = convolutional_discriminator().to(dtype), convolutional_generator().to(dtype)
        opt_d, opt_g = (torch.optim.Adam(net.parameters(), 2e-3, betas=(0.5, 0.999)) for net in (D, G))
        ema = torch.optim.swa_utils.AveragedModel(
            G, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8), use_buffers=True
        )
        ones = torch.ones(BATCH, 1, dtype=dtype)
        game = pk.GameRecorder(
            {"D": (D, opt_d), "G": (G, opt_g)},
            data={"D": (images, torch.ones(REAL, 1, dtype=dtype))},
            averages={"G": {"ema": ema}},
        )
        if record:
            game.start()
        for ids in torch.arange(REAL).split(BATCH):
            x = images[ids].requires_grad_(True)
            game["D"].announce(ids)
            opt_d.zero_grad()
            z = D(x)
            bce(z, ones).backward(retain_graph=True)
            with game["D"].channel("r1"):
                (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
                (0.5 * slope.square().sum((1, 2, 3)).mean()).backward()
            with game.sources(D="generated", G="noise"):
                fake = G(torch.randn(BATCH, *OF_DIGITS, dtype=dtype))
                bce(D(fake.detach()), 0 * ones).backward()
                opt_d.step()
                opt_g.zero_grad()
                bce(D(fake), ones).backward()
                opt_g.step()
            ema.update_parameters(G)
        game.close()
        latents = torch.randn(2, *OF_DIGITS, dtype=dtype)
    return {"D": D, "G": G, "ema": ema, "game": game, "images": images, "latents": latents}


@pytest.mark.parametrize("dtype", RESIDUAL, ids=str)
def test_both_players_of_a_dcgan_are_exact_machines(dtype: torch.dtype) -> None:
    found = train_digits(dtype, record=True)
    game = found["game"]
    why = game.machine("D").explain(found["images"][:2])
    assert at_rounding(why, dtype) and why.samples_checked == 1
    assert np.abs(why.channels["r1"]).min() > 0 and why.sources == {"generated": slice(REAL, 2 * REAL)}
    np.testing.assert_allclose(why.output, found["D"].eval()(found["images"][:2])[:, 0].tolist(), atol=RESIDUAL[dtype])
    for average, network in ((None, found["G"]), ("ema", found["ema"].module)):
        made = game.machine("G", average=average).explain(found["latents"], outputs=20)
        assert at_rounding(made, dtype) and made.shares.shape == (2, REAL)
        said = network.eval()(found["latents"]).flatten(1)[:, 20]
        np.testing.assert_allclose(made.output, said.tolist(), atol=RESIDUAL[dtype])
    origins = game.origins("D")["generated"]
    assert origins.known.all() and origins.made_at.tolist() == np.repeat(range(4), BATCH).tolist()
    assert origins.latents.shape == (REAL, *OF_DIGITS)


def test_training_is_as_without() -> None:
    plain, recorded = train_digits(torch.float32, record=False), train_digits(torch.float32, record=True)
    for player in ("D", "G"):
        states = plain[player].state_dict(), recorded[player].state_dict()
        assert all(map(torch.equal, *(state.values() for state in states)))
        assert not plain["game"].clock.taken(player)


# -- clocks and origins ----------------------------------------------------------------------------------------------


def play(
    updates: str, rounds: int = 3, critic_steps: int = 1, store: Any = None, change: Any = None
) -> tuple[pk.GameRecorder, nn.Module, nn.Module, Tensor]:
    """Play a game of points in the plane by plain gradient steps, the critic with a penalty on its gradient."""
    D, G = small_players()
    opt_d, opt_g = torch.optim.SGD(D.parameters(), 0.1), torch.optim.SGD(G.parameters(), 0.1, momentum=0.5)
    real, g = points(), torch.Generator().manual_seed(5)
    data = {"D": (real, torch.ones(REAL, 1).double())}
    with pk.GameRecorder({"D": (D, opt_d), "G": (G, opt_g)}, data=data, store=store) as game:
        for k in range(rounds):
            for step in range(critic_steps):
                ids = (torch.arange(BATCH) + BATCH * (k * critic_steps + step)) % REAL
                game["D"].announce(ids)
                opt_d.zero_grad()
                with game.sources({"G": "noise"}):
                    fake = G(noise(g))
                shown = fake.detach() if change is None else change(fake.detach())
                with game["D"].source("generated"):
                    of_fake = D(torch.cat([shown[:3], shown[3:]]))
                loss = of_fake.mean() - D(real[ids]).mean()
                loss.backward()
                with game["D"].channel("penalty"):
                    between = (0.5 * real[ids] + 0.5 * fake.detach()).requires_grad_(True)
                    (slope,) = torch.autograd.grad(D(between).sum(), between, create_graph=True)
                    (slope.norm(dim=1) - 1).square().mean().backward()
                if updates == "alternating":
                    opt_d.step()
            opt_g.zero_grad()
            with game["D"].source("generated"):
                (-D(fake).mean()).backward(inputs=list(G.parameters()))
            if updates == "simultaneous":
                opt_d.step()
            opt_g.step()
    return game, D, G, real


@pytest.mark.parametrize(("updates", "critic_steps"), [("simultaneous", 1), ("alternating", 1), ("alternating", 3)])
def test_a_clock_tells_who_made_what_and_when(updates: str, critic_steps: int) -> None:
    game, _, G, real = play(updates, critic_steps=critic_steps)
    why = game.machine("D").explain(real[:2])
    made = game.machine("G").explain(noise(torch.Generator().manual_seed(9), 2), outputs=1)
    assert at_rounding(why) and at_rounding(made) and "penalty" in why.channels
    assert game.clock.order == 3 * (critic_steps * ["D"] + ["G"])
    assert game.clock.at("G", 1) == {"D": 2 * critic_steps, "G": 1}
    assert game.clock.counts.tolist()[-1] == [3 * critic_steps, 3]
    origins = game.origins("D")["generated"]
    steps = np.arange(3 * critic_steps).repeat(BATCH)
    np.testing.assert_array_equal(origins.step, steps)
    np.testing.assert_array_equal(origins.made_at, steps // critic_steps)
    # The generator as it was then makes the very sample that the discriminator saw, of this latent.
    rows = zip(game.samples("D", "generated"), origins.latents, origins.made_at, strict=True)
    for sample, latent, at in rows:
        theta = game.trajectory("G").parameters(int(at))
        torch.testing.assert_close(functional_call(G, dict(theta), (latent[None],))[0], sample, rtol=0, atol=1e-12)


def test_samples_from_a_pool_keep_their_time_and_changed_ones_have_none() -> None:
    pool: list[Tensor] = []

    def history(fake: Tensor) -> Tensor:  # the first half of the batch is of the first round
        pool.append(fake)
        return torch.cat([pool[0][:4], 1.5 * fake[4:6], fake[6:]])

    game, *_ = play("alternating", change=history)
    origins = game.origins("D")["generated"]
    np.testing.assert_array_equal(origins.made_at.reshape(3, BATCH), [[0] * 4 + [-1] * 2 + [k] * 2 for k in range(3)])
    assert bool(torch.isnan(origins.latents[~origins.known]).all())
    assert origins.maker[0] == "G" and origins.maker[4] == ""
    torch.testing.assert_close(origins.latents[:4], origins.latents[BATCH : BATCH + 4])


class Saturated(nn.Linear):
    """A generator of four different samples."""

    def forward(self, z: Tensor) -> Tensor:
        return (50 * super().forward(z)).clamp(-1, 1)


@pytest.mark.parametrize("age", [0, 1])
def test_fakes_that_are_alike_have_no_origin_or_the_right_one(age: int) -> None:
    D, G = seeded(lambda: nn.Linear(2, 1)).double(), seeded(lambda: Saturated(LATENT, 2), 1).double()
    optimizers = [torch.optim.SGD(network.parameters(), 0.01) for network in (D, G)]
    g = torch.Generator().manual_seed(5)
    latents, pool = [], []
    with pk.GameRecorder({"D": (D, optimizers[0]), "G": (G, optimizers[1])}) as game:
        for k in range(3):
            with game.sources(D="generated", G="noise"):
                latents.append(noise(g, 3))
                fake = G(latents[-1])
                pool.append(fake.detach())
                optimizers[0].zero_grad()
                D(pool[max(0, k - age)]).mean().backward()
                optimizers[0].step()
                optimizers[1].zero_grad()
                (-D(fake)).mean().backward()
                optimizers[1].step()
    with pytest.warns(pk.errors.CertificateWarning, match="may be of several latents") as said:
        origins = game.origins("D")["generated"]
    assert said[0].filename == __file__
    times = [max(0, k - age) for k in range(3)]
    assert origins.known.any() and (origins.known == ~origins.ambiguous).all()
    right = np.repeat(times, 3)[origins.known]
    np.testing.assert_array_equal(origins.made_at[origins.known], right)
    assert torch.cat([latents[k] for k in times])[origins.known].equal(origins.latents[origins.known])
    assert (origins.maker[origins.ambiguous] == "").all()


def test_fakes_may_be_any_argument_of_the_other_player() -> None:
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of_label, self.of_sample = nn.Embedding(3, 1), nn.Linear(2, 1)

        def forward(self, label: Tensor, sample: Tensor) -> Tensor:
            return self.of_label(label) + self.of_sample(sample)

    D, G = seeded(Critic).double(), small_players()[1]
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (D, G)]
    g = torch.Generator().manual_seed(5)
    latents = []
    with pk.GameRecorder({"D": (D, optimizers[0]), "G": (G, optimizers[1])}) as game:
        for _ in range(2):
            label = torch.randint(3, (BATCH,), generator=g)
            latents.append(noise(g))
            with game.sources(D="generated", G="noise"):
                fake = G(latents[-1])
                optimizers[0].zero_grad()
                D(label, fake.detach()).mean().backward()
                optimizers[0].step()
                optimizers[1].zero_grad()
                (-D(label, sample=fake)).mean().backward()
                optimizers[1].step()
    origins = game.origins("D")["generated"]
    assert origins.made_at.tolist() == [0] * BATCH + [1] * BATCH and torch.cat(latents).equal(origins.latents)
    assert not origins.ambiguous.any()


def test_a_game_is_read_back_from_disk_player_by_player(tmp_path: Any) -> None:
    game, D, _, real = play("alternating", store=tmp_path / "game")
    opened = pk.Trajectory.open(tmp_path / "game" / "D", model=D, data=(real, torch.ones(REAL, 1).double()))
    np.testing.assert_array_equal(
        pk.KernelMachine(opened).explain(real[:1]).shares, game.machine("D").explain(real[:1]).shares
    )
    assert (tmp_path / "game" / "G").is_dir()


def one_round(game: pk.GameRecorder, D: nn.Module, G: Any, optimizers: Any, real: Tensor, g: torch.Generator) -> None:
    """A step of each player by the plainest losses."""
    game["D"].announce(range(BATCH))
    optimizers[0].zero_grad()
    of_real = D(real[:BATCH]).mean()
    with game.sources(D="generated", G="noise"):
        fake = G(noise(g))
        (D(fake.detach()).mean() - of_real).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        (-D(fake).mean()).backward()
        optimizers[1].step()


@pytest.mark.parametrize("schedule", [None, pk.Keyframes(2)], ids=str)
def test_a_game_goes_on_after_a_break_and_in_another_process(schedule: Any, tmp_path: Any) -> None:
    D, G = small_players()
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (D, G)]
    real, g = points(), torch.Generator().manual_seed(5)

    def made() -> pk.GameRecorder:
        pairs = {"D": (D, optimizers[0]), "G": (G, optimizers[1])}
        data, schedules = {"D": (real, torch.ones(REAL, 1))}, {"D": schedule}
        return pk.GameRecorder(pairs, data=data, schedule=schedules, store=tmp_path)

    game = made()
    for _ in range(2):
        game.start()
        one_round(game, D, G, optimizers, real, g)
        game.close()
    assert game.origins("D")["generated"].made_at.tolist() == [0] * BATCH + [1] * BATCH
    with made() as again:
        one_round(again, D, G, optimizers, real, g)
    assert again.clock.at("G", 2) == {"D": 3, "G": 2} and at_rounding(again.machine("D").explain(real[:1]))
    origins = again.origins("D")["generated"]  # of earlier columns this process knows nothing
    assert origins.step.tolist() == [-1] * 2 * BATCH + [2] * BATCH
    assert origins.made_at.tolist() == [-1] * 2 * BATCH + [2] * BATCH
    with pytest.raises(pk.errors.InputError, match="The clock has seen steps 2 to 2 of G"):
        again.clock.at("G", 1)


@pytest.mark.parametrize("schedule", [pk.Keyframes(2), None], ids=str)
def test_a_player_may_be_several_parts_and_keep_little(schedule: Any) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(LATENT, 3), nn.Tanh()), nn.Linear(3, 2)

    D, _ = small_players()
    G = seeded(Parts).double()
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (D, G)]
    real, g = points(), torch.Generator().manual_seed(5)
    pairs = {"D": (D, optimizers[0]), "G": (G, optimizers[1])}
    options = {"data": {"D": (real, torch.ones(REAL, 1))}, "watch": {"G": ("body", "head")}}
    with pk.GameRecorder(pairs, **options, schedule={"D": schedule}) as game:
        for _ in range(3):
            one_round(game, D, lambda z: G.head(G.body(z)), optimizers, real, g)
    assert at_rounding(game.machine("D").explain(real[:1]))
    origins = game.origins("D")["generated"]
    assert origins.made_at.tolist() == np.arange(3).repeat(BATCH).tolist() and origins.latents.shape[1] == LATENT
    torch.testing.assert_close(game.samples("G", "noise"), origins.latents)


@pytest.mark.parametrize(
    "how", ["as it is", *(pytest.param(how, marks=pytest.mark.exhaustive) for how in ("wrapped", "in place"))]
)
def test_players_may_be_compiled_or_run_under_transformations(how: str) -> None:
    D, G = small_players()
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (D, G)]
    real, g = points(), torch.Generator().manual_seed(5)
    called = torch.compile(G, backend="eager") if how == "wrapped" else G
    if how == "in place":
        G.compile(backend="eager")
    pairs = {"D": (D, optimizers[0]), "G": (called, optimizers[1])}
    with pk.GameRecorder(pairs, data={"D": (real, torch.ones(REAL, 1))}) as game:
        for _ in range(2):
            one_round(game, D, called, optimizers, real, g)
            if how == "as it is":
                torch.func.vmap(G)(noise(g))  # whose outputs have no bits to read
    assert at_rounding(game.machine("G").explain(noise(g, 1), outputs=0))
    assert game.origins("D")["generated"].made_at.tolist() == [0] * BATCH + [1] * BATCH
    assert game.samples("G", "noise").equal(game.origins("D")["generated"].latents)


def test_hooks_are_gone_after_a_game() -> None:
    game, D, G, _ = play("alternating", rounds=1)
    assert not any((network._forward_hooks or network._forward_pre_hooks) for network in (D, G))
    before = len(game.clock)
    G(noise(torch.Generator()))
    assert len(game.clock) == before


# -- players that are no GAN -----------------------------------------------------------------------------------------


def test_simsiam_is_a_game_of_an_encoder_and_a_predictor() -> None:
    """Stop-gradient: each view's code is a constant target of the other's prediction."""
    encoder = seeded(lambda: nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))).double()
    predictor = seeded(lambda: nn.Linear(3, 3), 1).double()
    of_encoder = torch.optim.SGD(encoder.parameters(), 0.1, momentum=0.9)
    of_predictor = torch.optim.SGD(predictor.parameters(), 0.1)
    images, g = points(), torch.Generator().manual_seed(5)
    players = {"encoder": (encoder, of_encoder), "predictor": (predictor, of_predictor)}
    with pk.GameRecorder(players, data={"encoder": REAL}) as game:
        for ids in torch.arange(REAL).split(BATCH):
            for optimizer in (of_encoder, of_predictor):
                optimizer.zero_grad()
            views = [images[ids] + 0.1 * torch.randn(BATCH, 2, generator=g).double() for _ in range(2)]
            game["encoder"].announce(ids)
            codes = [encoder(view) for view in views]
            with game.sources(predictor="codes"):
                said = [predictor(code) for code in codes]
            pairs = ((said[0], codes[1].detach()), (said[1], codes[0].detach()))
            (-sum(F.cosine_similarity(p, z).mean() for p, z in pairs) / 2).backward()
            of_encoder.step()
            of_predictor.step()
    why = game.machine("encoder").explain(images[:2], outputs=0)
    assert at_rounding(why) and why.shares.shape == (2, REAL)
    assert at_rounding(game.machine("predictor").explain(codes[0][:2].detach(), outputs=0))
    origins = game.origins("predictor")["codes"]  # whose "latents" are the views
    assert set(origins.maker) == {"encoder"}
    np.testing.assert_array_equal(origins.made_at, np.arange(4).repeat(2 * BATCH))
    torch.testing.assert_close(origins.latents[-BATCH:], views[1])


def test_actor_and_critic_are_a_game() -> None:
    """A walk on a line that is paid at its right end: the critic learns values, the actor moves by its advantage."""
    actor, critic = seeded(lambda: nn.Linear(5, 2)).double(), seeded(lambda: nn.Linear(5, 1), 1).double()
    of_actor, of_critic = (torch.optim.Adam(network.parameters(), 0.05) for network in (actor, critic))
    g = torch.Generator().manual_seed(5)
    with pk.GameRecorder({"actor": (actor, of_actor), "critic": (critic, of_critic)}) as game:
        for _ in range(6):
            state = torch.randint(5, (BATCH,), generator=g)
            x = F.one_hot(state, 5).double()
            with game.sources(actor="states", critic="states"):
                logits, value = actor(x), critic(x)[:, 0]
            action = torch.multinomial(logits.detach().softmax(1), 1, generator=g)[:, 0]
            new = (state + 2 * action - 1).clamp(0, 4)
            with torch.no_grad():
                target = (new == 4).double() + 0.9 * critic(F.one_hot(new, 5).double())[:, 0]
            of_critic.zero_grad()
            F.mse_loss(value, target).backward()
            of_critic.step()
            of_actor.zero_grad()
            advantage = target - value.detach()
            F.cross_entropy(logits, action, reduction="none").mul(advantage).mean().backward()
            of_actor.step()
    states = torch.eye(5).double()
    for player, outputs in (("actor", 1), ("critic", 0)):
        why = game.machine(player).explain(states, outputs=outputs)
        assert at_rounding(why) and why.shares.shape == (5, 6 * BATCH)
    assert game.clock.order == 6 * ["critic", "actor"]


# -- refusals --------------------------------------------------------------------------------------------------------


class Homemade(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.1 * p.grad


def test_a_player_without_a_rule_is_named() -> None:
    D, G = small_players()
    players = {"D": (D, torch.optim.SGD(D.parameters(), 0.1)), "G": (G, Homemade(G.parameters()))}
    with pytest.raises(
        pk.errors.UnsupportedOptimizerError, match=r"Player 'G': .*Homemade` has no update rule"
    ) as found:
        pk.GameRecorder(players)
    assert "GameRecorder(..., rule={'G': ...})" in found.value.write
    pk.GameRecorder(players, rule={"G": "elementwise"})


def test_a_player_that_diverges_leaves_what_was_recorded() -> None:
    D, G = small_players()
    opt_d, opt_g = (torch.optim.SGD(network.parameters(), 0.1) for network in (D, G))
    real, g = points(), torch.Generator().manual_seed(5)
    game = pk.GameRecorder({"D": (D, opt_d), "G": (G, opt_g)}, data={"D": (real, torch.ones(REAL, 1))})
    with pytest.raises(pk.errors.NonFiniteStepError) as found, game:
        for k in range(4):
            game["D"].announce(range(BATCH))
            opt_d.zero_grad()
            of_real = D(real[:BATCH]).mean()
            with game.sources(D="generated", G="noise"):
                fake = G(noise(g))
                (D(fake.detach()).mean() - of_real).backward()
                opt_d.step()
                opt_g.zero_grad()
                (-D(fake).mean() * (float("inf") if k == 2 else 1)).backward()
                opt_g.step()
    assert any("D 3, G 2" in note for note in found.value.__notes__)
    assert at_rounding(game.machine("D").explain(real[:1]))
    assert at_rounding(game.machine("G").explain(noise(g, 1), outputs=0))
    assert not D._forward_hooks and game.clock.order == ["D", "G", "D", "G", "D"]


def test_a_player_that_has_diverged_is_told_the_step_before() -> None:
    """Steps so long that the discriminator is finite, and its outputs are not."""
    D, G = (
        seeded(lambda: nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(), nn.Linear(8, 1))),
        small_players(torch.float32)[1],
    )
    opt_d, opt_g = (torch.optim.SGD(network.parameters(), 0.1) for network in (D, G))
    g = torch.Generator().manual_seed(5)
    with pk.GameRecorder({"D": (D, opt_d), "G": (G, opt_g)}) as game:
        for rate in (0.1, 0.1, 1e30):
            opt_d.param_groups[0]["lr"] = rate
            with game.sources(D="generated", G="noise"):
                fake = G(noise(g).float())
                opt_d.zero_grad()
                D(fake.detach()).square().mean().backward()
                opt_d.step()
    assert all(bool(p.isfinite().all()) for p in D.parameters())
    query = points(2, torch.float32)
    with pytest.raises(pk.errors.TrajectoryError, match=r"training diverged\. Step 2 moved the parameters") as found:
        game.machine("D").explain(query)
    assert "`game.machine(player, at=2)`" in found.value.write and "trajectory.until(2)" in found.value.write
    assert at_rounding(game.machine("D", at=2).explain(query), torch.float32)


def test_what_is_no_game_is_refused() -> None:
    D, _ = small_players()
    pair = (D, torch.optim.SGD(D.parameters(), 0.1))
    clock = pk.GameRecorder({"D": pair}).clock
    refusals: list[tuple[str, Callable[[], Any]]] = [
        (r"`players` is \{\}", lambda: pk.GameRecorder({})),
        ("`players` is a list", lambda: pk.GameRecorder([pair])),  # type: ignore[arg-type]
        ("The player 'D' is a Sequential", lambda: pk.GameRecorder({"D": D})),  # type: ignore[dict-item]
        ("A player is called ''", lambda: pk.GameRecorder({"": pair})),
        ("A player is called 'D/G'", lambda: pk.GameRecorder({"D/G": pair})),
        ("`data=` of a game is a Tensor", lambda: pk.GameRecorder({"D": pair}, data=points())),  # type: ignore[arg-type]
        (r"`data=` of a game is \['G'\]", lambda: pk.GameRecorder({"D": pair}, data={"G": points()})),
        ("`GameRecorder` was given `dta=`", lambda: pk.GameRecorder({"D": pair}, dta={"D": points()})),
        ("The player 'G' was asked for", lambda: pk.GameRecorder({"D": pair})["G"]),
        ("The player 'G' was asked for", lambda: pk.GameRecorder({"D": pair}).origins("G")),
        ("the source 'fakes' of D", lambda: pk.GameRecorder({"D": pair}).samples("D", "fakes")),
        (r"`clock.at\('G', 0\)`", lambda: clock.at("G", 0)),
        (
            r"`clock.at\('D', 0\)` was asked for. It has seen no step",
            lambda: clock.at("D", 0),
        ),
    ]
    for said, refused in refusals:
        with pytest.raises(pk.errors.PathKernelError, match=said) as found:
            refused()
        assert found.value.expected and found.value.write


def test_a_thinned_record_has_no_samples_of_a_source() -> None:
    D, G = small_players()
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (D, G)]
    pairs = {"D": (D, optimizers[0]), "G": (G, optimizers[1])}
    real, g = points(), torch.Generator().manual_seed(5)
    with pk.GameRecorder(pairs, data={"D": (real, torch.ones(REAL, 1))}, schedule={"D": pk.Every(2)}) as game:
        for _ in range(2):
            one_round(game, D, G, optimizers, real, g)
    with pytest.raises(pk.errors.InputError, match="This record was thinned"):
        game.samples("D", "generated")
    assert game.origins("D")["generated"].known.all()


def test_where_one_player_is_refused_the_others_are_let_go_of() -> None:
    D, G = small_players()
    opt_d, opt_g = (torch.optim.SGD(network.parameters(), 0.1) for network in (D, G))
    game = pk.GameRecorder({"D": (D, opt_d), "G": (G, opt_g)})
    state = copy.deepcopy(opt_d.state_dict())

    class Refused(Exception):
        pass

    def refuse() -> None:
        raise Refused

    game["G"].start = refuse  # type: ignore[method-assign]
    for begin in (game.__enter__, game.start):
        with pytest.raises(Refused):
            begin()
        assert not opt_d._optimizer_step_pre_hooks and opt_d.state_dict() == state
