"""Idioms between layers, one network each: every parameter is covered, and the kernel is that of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.gradients.layers import rules
from pathkernel.gradients.layers.factors import Dense, Outer
from pathkernel.gradients.layers.functions import draws

WIDTH, LENGTH, VOCABULARY = 8, 6, 13

Forward = Callable[[Any, Tensor], Tensor]


class Network(nn.Module):
    """Parts by name, and how they are called."""

    def __init__(self, parts: dict[str, Any], forward: Forward) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(*shape))


def addmm(net: Any, x: Tensor) -> Tensor:
    y = torch.addmm(net.bias, x.view(-1, WIDTH), net.weight).view(*x.shape[:-1], 12)
    return net.head(F.gelu(y)).mean(1) + torch.mm(x[:, 0], net.other)


def sums_of_products(net: Any, x: Tensor) -> Tensor:
    y = torch.einsum("btd,dhk->bthk", x, net.inward).tanh()
    y = torch.einsum("bthk,hkl->bthl", y, net.heads)
    return net.head(torch.einsum("bthk,hkd->btd", y, net.outward)).mean(1)


def weight_first(net: Any, x: Tensor) -> Tensor:
    y = net.mix @ x
    z = (y[:, None] @ net.heads).tanh()
    return net.head(torch.cat([z[:, 0], z[:, 1]], -1)).mean(1)


def object_queries(net: Any, x: Tensor) -> Tensor:
    b, h, w = len(x), 2, 3
    across, down = net.columns(torch.arange(w)), net.rows(torch.arange(h))
    places = torch.cat([across.unsqueeze(0).repeat(h, 1, 1), down.unsqueeze(1).repeat(1, w, 1)], -1)
    places = places.permute(2, 0, 1).unsqueeze(0).repeat(b, 1, 1, 1).flatten(2).permute(2, 0, 1)
    queries = net.queries.weight.unsqueeze(1).repeat(1, b, 1)
    return net.head(net.decoder(torch.zeros_like(queries) + queries, x.transpose(0, 1) + places)).transpose(0, 1)


def text_tower(net: Any, tokens: Tensor) -> Tensor:
    x = (net.embedding(tokens) + net.places).permute(1, 0, 2)
    mask = torch.empty(LENGTH, LENGTH, dtype=x.dtype).fill_(float("-inf")).triu_(1)
    x = net.norm(net.layer(x, src_mask=mask).permute(1, 0, 2))
    x = x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ net.projection
    return net.scale.exp() * x / x.norm(dim=1, keepdim=True)


def prototypes(net: Any, x: Tensor) -> Tensor:
    z = net.layer(x.flatten(1))
    cosines = F.linear(F.normalize(z), F.normalize(net.weight))
    return torch.cat([cosines, torch.cdist(z, net.points), -((z[:, None] - net.points) ** 2).sum(-1)], 1)


def masked_weights(net: Any, x: Tensor) -> Tensor:
    y = F.linear(x, net.mask * net.weight, net.bias)
    basis = torch.exp(-((y.unsqueeze(-1) - net.grid) ** 2))
    return torch.einsum("btig,oig->bto", basis, net.coefficients).mean(1)


def made_weights(net: Any, x: Tensor) -> Tensor:
    weight = net.generator(net.code).view(4, WIDTH)
    places = net.positions(torch.arange(x.shape[1]).to(x).unsqueeze(1) / LENGTH)
    return net.head(torch.tanh(F.linear(x, weight) + places)).mean(1)


def spectral(net: Any, x: Tensor) -> Tensor:
    x = net.lift(x.transpose(1, 2))
    found = torch.fft.rfft(x)
    kept = torch.zeros(len(x), 4, found.shape[-1], dtype=found.dtype)
    kept[:, :, :3] = torch.einsum("bix,iox->box", found[:, :, :3], torch.view_as_complex(net.modes))
    return net.head(F.gelu(torch.fft.irfft(kept, n=LENGTH) + net.skip(x)).mean(-1))


def packed(net: Any, tokens: Tensor) -> Tensor:
    lengths = (tokens != 0).sum(1).cpu()
    x = nn.utils.rnn.pack_padded_sequence(net.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
    x, _ = net.first(x)
    outputs, states = net.second(x)
    states = states[0] if isinstance(states, tuple) else states
    padded, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
    return net.head(torch.cat([states[-1], padded.sum(1)], 1))


def mask_tokens(net: Any, x: Tensor) -> Tensor:
    b = len(x)
    y = torch.cat([net.layer(x), net.token.repeat(b, 3, 1)], 1) + net.places
    y[x[:, :1, 0].expand(b, LENGTH + 3) > 0] = net.mask
    z = y.clone()
    z[:, 0] = net.mask
    hidden = torch.zeros(b, LENGTH + 3, 1, dtype=torch.bool)
    hidden[:, 2] = True
    return net.head(torch.tanh(torch.where(hidden, net.mask, y) + z)).mean(1)


def in_place(net: Any, x: Tensor) -> Tensor:
    y = net.layer(x)
    y = y.mul_(net.gain).add_(net.shift)
    y /= net.gain.exp()
    y -= 0.1
    found = torch.empty(len(x), WIDTH, dtype=x.dtype)
    found[:] = net.start
    found += y.mean(1)
    return net.head(found.tanh() + torch.zeros_like(found).copy_(net.start))


def relative_positions(net: Any, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q, k, v = (layer(x).view(b, t, 2, 4) for layer in (net.q, net.k, net.v))
    apart = torch.arange(t)[None] - torch.arange(t)[:, None] + t - 1
    content = torch.einsum("bihd,bjhd->bhij", q + net.u, k)
    place = torch.einsum("bihd,ijd->bhij", q, net.key(net.relative)[apart])
    weights = ((content + place) / 2).softmax(-1)
    return net.head(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, t, WIDTH)).mean(1)


def normalised_in_single(net: Any, x: Tensor) -> Tensor:
    """Parts in float32 whatever the rest is in, as much of published code has them."""
    y = x.to(torch.float32)
    y = net.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return net.head(F.softmax(net.layer(y).float(), dim=-1).type_as(x)).mean(1)


def _queries() -> dict[str, Any]:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 16), 1)
    tables = {"columns": nn.Embedding(9, 4), "rows": nn.Embedding(9, 4), "queries": nn.Embedding(4, WIDTH)}
    return {**tables, "decoder": decoder, "head": nn.Linear(WIDTH, 2)}


def _text() -> dict[str, Any]:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0)
    tower = {"embedding": nn.Embedding(VOCABULARY, WIDTH), "places": parameter(LENGTH, WIDTH), "layer": layer}
    scale = nn.Parameter(torch.tensor(1.0))
    return {**tower, "norm": nn.LayerNorm(WIDTH), "projection": parameter(WIDTH, 5), "scale": scale}


def _packed(kind: Any, **options: Any) -> dict[str, Any]:
    size = options.get("proj_size", 4)
    layers = {"first": kind(5, 4, **options), "second": kind(size, 4, bidirectional=True, **options)}
    return {"embedding": nn.Embedding(VOCABULARY, 5), **layers, "head": nn.Linear(3 * size, 3)}


def _masked() -> dict[str, Any]:
    fixed = {"mask": nn.Parameter((torch.rand(5, WIDTH) > 0.3).float(), requires_grad=False)}
    grid = nn.Parameter(torch.linspace(-1, 1, 4), requires_grad=False)
    return {
        **fixed,
        "weight": parameter(5, WIDTH),
        "bias": parameter(5),
        "grid": grid,
        "coefficients": parameter(3, 5, 4),
    }


def _made() -> dict[str, Any]:
    positions = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 4))
    return {
        **{"code": parameter(3), "generator": nn.Linear(3, 4 * WIDTH), "positions": positions},
        "head": nn.Linear(4, 3),
    }


def _relative() -> dict[str, Any]:
    layers = {name: nn.Linear(WIDTH, WIDTH) for name in "qkv"}
    return {
        **layers,
        **{"relative": parameter(11, 4), "u": parameter(2, 4), "key": nn.Linear(4, 4, bias=False)},
        "head": nn.Linear(WIDTH, 3),
    }


def _tokens() -> dict[str, Any]:
    return {
        **{"token": parameter(1, 1, WIDTH), "places": parameter(1, LENGTH + 3, WIDTH), "mask": parameter(WIDTH)},
        **{"layer": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, 3)},
    }


IDIOMS: dict[str, tuple[Callable[[], dict[str, Any]], Forward, str]] = {
    "GPT-2's linear layer": (
        lambda: {
            **{"weight": parameter(WIDTH, 12), "bias": parameter(12), "other": parameter(WIDTH, 3)},
            "head": nn.Linear(12, 3),
        },
        addmm,
        "sequences",
    ),
    "einsum": (
        lambda: {
            **{"inward": parameter(WIDTH, 2, 4), "heads": parameter(2, 4, 4), "outward": parameter(2, 4, WIDTH)},
            "head": nn.Linear(WIDTH, 3),
        },
        sums_of_products,
        "sequences",
    ),
    "weight first": (
        lambda: {"mix": parameter(5, LENGTH), "heads": parameter(2, WIDTH, 4), "head": nn.Linear(WIDTH, 3)},
        weight_first,
        "sequences",
    ),
    "object queries": (_queries, object_queries, "sequences"),
    "text tower": (_text, text_tower, "tokens"),
    "prototypes": (
        lambda: {"layer": nn.Linear(LENGTH * WIDTH, 5), "weight": parameter(4, 5), "points": parameter(3, 5)},
        prototypes,
        "sequences",
    ),
    "masked weights": (_masked, masked_weights, "sequences"),
    "made weights": (_made, made_weights, "sequences"),
    "Fourier modes": (
        lambda: {
            **{"lift": nn.Conv1d(WIDTH, 4, 1), "modes": parameter(4, 4, 3, 2), "skip": nn.Conv1d(4, 4, 1)},
            "head": nn.Linear(4, 2),
        },
        spectral,
        "sequences",
    ),
    "packed LSTM": (lambda: _packed(nn.LSTM, batch_first=True), packed, "tokens"),
    "packed LSTM, projections": (lambda: _packed(nn.LSTM, proj_size=3, num_layers=2), packed, "tokens"),
    "packed GRU": (lambda: _packed(nn.GRU, num_layers=1), packed, "tokens"),
    "mask tokens": (_tokens, mask_tokens, "sequences"),
    "in place": (
        lambda: {
            **{"layer": nn.Linear(WIDTH, WIDTH), "gain": parameter(WIDTH), "shift": parameter(WIDTH)},
            **{"start": parameter(WIDTH), "head": nn.Linear(WIDTH, 3)},
        },
        in_place,
        "sequences",
    ),
    "relative positions": (_relative, relative_positions, "sequences"),
    "parts in float32": (
        lambda: {"weight": parameter(WIDTH), "layer": nn.Linear(WIDTH, 5), "head": nn.Linear(5, 3)},
        normalised_in_single,
        "sequences",
    ),
}
"""Name → parts, how they are called, and kind of input."""

SINGLE = {"parts in float32": 1e-6}
"""Networks that round to float32 themselves, and how far two ways of summing are apart then."""


def network(name: str) -> tuple[nn.Module, Tensor]:
    parts, forward, kind = IDIOMS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network(parts(), forward).double().eval()
        if kind == "sequences":
            return model, torch.randn(7, LENGTH, WIDTH, dtype=torch.float64)
        tokens = torch.randint(1, VOCABULARY, (7, LENGTH))
        tokens[1::3, -2:] = 0
        tokens[2, -4:] = 0
        return model, tokens


@pytest.mark.parametrize("name", IDIOMS)
def test_every_parameter_is_covered_and_the_kernel_is_that_of_plain_autograd(name: str) -> None:
    model, X = network(name)
    kernel = pk.TangentKernel(model, engine="layerwise")
    expected = pk.TangentKernel(model, engine="autograd")(X)
    limit = SINGLE.get(name, 1e-10) * abs(expected).max()
    assert abs(kernel(X) - expected).max() <= limit
    assert abs(kernel(X[:3]) - expected[:3, :3]).max() <= limit
    assert not kernel.engine.tapes.coverage.plain


def test_a_rule_that_is_right_of_one_component_only_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(6, 4).double()
    expected = pk.TangentKernel(model, engine="jacobian")(X)

    def of_the_first(samples: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        def gradient(signal: Tensor) -> Dense:
            rows = Outer(signal[:, :1].unsqueeze(2), samples(input).unsqueeze(1)).rows()
            return Dense(rows.expand(-1, signal.shape[1], -1))

        return {"weight": gradient, "bias": lambda signal: Dense(signal)}

    monkeypatch.setitem(rules.RULES, F.linear, of_the_first)
    kernel = pk.TangentKernel(model, engine="layerwise")
    assert abs(kernel(X) - expected).max() <= 1e-10 * abs(expected).max()
    assert set(kernel.engine.tapes.coverage.plain) == {"0.weight", "2.weight"}


EQUATIONS = {
    "btd,dh->bth": ((WIDTH, 5), Outer),
    "btd,hd->bth": ((5, WIDTH), Outer),
    "...d,dhk->...hk": ((WIDTH, 2, 3), Outer),
    "btd,dht->bh": ((WIDTH, 5, LENGTH), Dense),
    "btd,tdh->bth": ((LENGTH, WIDTH, 5), Dense),
    "btd,st->bsd": ((5, LENGTH), Outer),
    "tbd,dh->tbh": ((WIDTH, 5), Outer),
    "btd,d->bt": ((WIDTH,), Dense),
    "btd,h->bh": ((5,), Dense),
    "btd,td->b": ((LENGTH, WIDTH), Dense),
    "btd,e->btde": ((3,), Dense),
    "nd,hd->nh": ((5, WIDTH), Outer),
}
"""Equation → shape of the weight, and the form of its gradients."""


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation: str, swapped: bool) -> None:
    torch.manual_seed(0)
    shape, form = EQUATIONS[equation]

    def forward(net: Any, x: Tensor) -> Tensor:
        b, *_ = x.shape
        y = net.layer(x).tanh()
        y = y.transpose(0, 1) if equation.startswith("tb") else y.reshape(-1, WIDTH) if equation[0] == "n" else y
        (one, two), arrow, out = equation.partition("->")[0].split(","), *equation.partition("->")[1:]
        given = (f"{two},{one}{arrow}{out}", net.weight, y) if swapped else (equation, y, net.weight)
        z = torch.einsum(*given).tanh()
        return (z.transpose(0, 1) if equation.startswith("tb") else z).reshape(b, -1).square()

    model = Network({"layer": nn.Linear(WIDTH, WIDTH), "weight": parameter(*shape)}, forward).double()
    X = torch.randn(4, LENGTH, WIDTH, dtype=torch.float64)
    kernel = pk.TangentKernel(model, engine="layerwise")
    expected = pk.TangentKernel(model, engine="jacobian")(X)
    assert abs(kernel(X) - expected).max() <= 1e-10 * abs(expected).max()
    assert not kernel.engine.tapes.coverage.plain
    pieces, _ = kernel.engine.pieces(kernel.theta, X, torch.zeros(4, 0))
    where = kernel.function.layout.slices["weight"]
    assert {type(piece.factor) for piece in pieces if piece.where == where} == {form}


class Dropped(nn.Module):
    """Dropout of positions, of which no sample has a part."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.dropout = parameter(5, 4), nn.Dropout(0.5)
        self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x + self.dropout(self.places)))).mean(1)


def test_random_functions_of_parameters_are_not_called_again() -> None:
    torch.manual_seed(0)
    model, X, y = Dropped().double().train(), torch.randn(6, 5, 4).double(), torch.randn(6, 2).double()
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.05), nn.MSELoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(2):
            x, target = recorder.batch(torch.arange(6))
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    found, expected = (
        pk.KernelMachine(recorder.trajectory, engine=engine).explain(X[:2], outputs=0).shares
        for engine in ("layerwise", "autograd")
    )
    assert abs(found - expected).max() <= 1e-10 * abs(expected).max()
    assert not draws(F.relu, (model.places,)) and not draws(torch.dropout, (model.places, 0.5, False))
    assert draws(torch.dropout, (model.places, 0.5, True))


class Experts(nn.Module):
    """Each token goes to one expert, with tokens of any samples."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights = self.gate(tokens).softmax(-1)
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            own = weights.argmax(-1) == i
            y[own] = expert(tokens[own]) * weights[own, i : i + 1]
        return self.head(y.view(x.shape)).mean(1)


def test_what_cannot_be_cut_into_samples_is_plain_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, X = Experts().double(), torch.randn(5, LENGTH, WIDTH, dtype=torch.float64)
    kernel = pk.TangentKernel(model, engine="layerwise")
    expected = pk.TangentKernel(model, engine="autograd")(X)
    assert abs(kernel(X) - expected).max() <= 1e-10 * abs(expected).max()
    plain = kernel.engine.tapes.coverage.plain
    assert set(plain) == {f"experts.{i}.{name}" for i in range(2) for name in ("weight", "bias")}
    assert "holds no part for each sample" in plain["experts.0.weight"]


class Specialists(nn.Module):
    """Samples go to one of two layers by their sign."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y, out = self.inward(x).tanh(), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            own = ((x[:, 0] > 0) == bool(i)).nonzero().flatten()
            out = out.index_add(0, own, expert(y[own]))
        return self.head(out)


def test_an_expert_that_nothing_is_sent_to_has_gradients_of_zero() -> None:
    torch.manual_seed(0)
    model, X, y = Specialists().double(), torch.randn(6, WIDTH, dtype=torch.float64), torch.randint(2, (6,))
    X[:, 0] = X[:, 0].abs()
    optimizer, loss = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for x, target in recorder.batches(batch_size=3):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    found, expected = (
        pk.KernelMachine(recorder.trajectory, engine=engine).explain(X[:2], outputs=0).shares
        for engine in ("layerwise", "autograd")
    )
    assert abs(found - expected).max() <= 1e-10 * abs(expected).max()


class Cached(nn.Module):
    """A table that is made of numbers when it is first needed, and again where more positions come."""

    def __init__(self) -> None:
        super().__init__()
        self.angles: Tensor | None = None
        self.layer, self.places, self.head = nn.Linear(4, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        if self.angles is None or len(self.angles) < t:
            self.angles = torch.outer(torch.arange(t, dtype=x.dtype), torch.ones(4, dtype=x.dtype)).cos()
        y = self.layer(x) * self.angles[:t].to(x) + self.places(torch.arange(t))
        return self.head(y.tanh()).mean(1)


def test_what_a_first_pass_computes_and_later_ones_have_at_hand_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Cached().double()
    kernel = pk.TangentKernel(model, engine="layerwise")
    rows = pk.TangentKernel(model, engine="jacobian")
    for t in (3, 5, 4, 3, 5):
        X = torch.randn(4, t, 4, dtype=torch.float64)
        expected = rows(X)
        assert abs(kernel(X) - expected).max() <= 1e-10 * abs(expected).max()
        assert not kernel.engine.tapes.coverage.plain
