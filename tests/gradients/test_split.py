"""Every row belongs to its sample: networks that rearrange, merge or mask their samples; rows that are made wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pathkernel as pk
from pathkernel.errors import InputError, PathKernelError, UnsupportedModelError
from pathkernel.gradients.factored import FactoredGradients
from pathkernel.gradients.gradient_source import GradientSource

T = torch.float64


def jacobian(model: nn.Module, X: Tensor) -> Tensor:
    """(n, C, P), by a loop of autograd over samples, on a copy."""
    model = copy.deepcopy(model)
    parameters, found = list(model.parameters()), []
    for i in range(len(X)):
        outputs = model(X[i : i + 1]).reshape(-1)
        rows = []
        for z in outputs:
            model.zero_grad()
            z.backward(retain_graph=True)
            own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            rows.append(torch.cat([gradient.reshape(-1) for gradient in own]))
        found.append(torch.stack(rows))
    return torch.stack(found)


def trace(model: nn.Module, X: Tensor) -> np.ndarray:
    J = jacobian(model, X)
    return torch.einsum("icp,jcp->ij", J, J).numpy()


# -- networks ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers with something between samples in the middle that is undone at the end."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.p, self.q = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(2, 6, 3))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def through(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.tanh(net.a(x)) * net.p)


def sorts(net: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return through(net, x[order])[order.argsort()]


def flips(net: Any, x: Tensor) -> Tensor:
    return through(net, x.flip(0)).flip(0)


def rolls(net: Any, x: Tensor) -> Tensor:
    return through(net, x.roll(1, 0)).roll(-1, 0)


def buckets(net: Any, x: Tensor) -> Tensor:
    low = x[:, 0] < 0
    result = x.new_zeros(len(x), 3)
    result[low] = through(net, x[low])
    result[~low] = -through(net, x[~low])
    return result


def merges(net: Any, x: Tensor) -> Tensor:
    unique, place = torch.unique(x, dim=0, return_inverse=True)
    return through(net, unique)[place]


def routes(net: Any, x: Tensor) -> Tensor:
    h, expert = torch.tanh(net.a(x)) * net.p, (x[:, 1] > 0).long()
    result = x.new_zeros(len(x), 3)
    for e in range(2):
        own = (expert == e).nonzero()[:, 0]
        result = result.index_add(0, own, h[own] @ net.q[e])
    return result


def chunks(net: Any, x: Tensor) -> Tensor:
    return torch.cat([through(net, part) for part in x.split(4)])


def halves(net: Any, x: Tensor) -> Tensor:
    middle = (len(x) + 1) // 2
    return torch.cat([through(net, x[middle:]), through(net, x[:middle])]).roll(middle, 0)


def asks(net: Any, x: Tensor) -> Tensor:
    return through(net, x) if x.abs().sum().item() > 0 else net.b(net.a(x))


REARRANGING = {f.__name__: f for f in (sorts, flips, rolls, buckets, merges, routes, chunks, halves, asks)}


@pytest.mark.parametrize("engine", ["auto", "layerwise", "jacobian", "products"])
@pytest.mark.parametrize("name", REARRANGING)
def test_kernels_of_networks_that_rearrange_their_samples(name: str, engine: str) -> None:
    torch.manual_seed(0)
    model, X = Net(REARRANGING[name]).to(T), torch.randn(12, 4, dtype=T)
    expected = trace(model, X)
    kernel = pk.TangentKernel(model, engine=engine)
    for rows in (X, X[:5], X.flip(0)[:7]):
        if len(rows) < 12:
            expected = trace(model, rows)
        np.testing.assert_allclose(kernel(rows), expected, rtol=1e-9, atol=1e-10 * abs(expected).max())


@pytest.mark.parametrize("engine", ["auto", "jacobian"])
@pytest.mark.parametrize("name", REARRANGING)
def test_shares_of_networks_that_rearrange_their_samples(name: str, engine: str) -> None:
    torch.manual_seed(0)
    model, g = Net(REARRANGING[name]).to(T), torch.Generator().manual_seed(1)
    X, y = torch.randn(24, 4, dtype=T, generator=g), torch.randint(3, (24,), generator=g)
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.2), nn.CrossEntropyLoss()
    parameters, expected, query = list(model.parameters()), torch.zeros(24, dtype=T), torch.randn(1, 4, dtype=T)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for ids in (torch.randperm(24, generator=g)[:8] for _ in range(5)):
            x, target = recorder.batch(ids)
            optimizer.zero_grad()
            loss(model(x), target).backward()
            rows = torch.stack(
                [
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).reshape(-1)
                            for p, g in zip(
                                parameters,
                                torch.autograd.grad(
                                    loss(model(X[i : i + 1]), y[i : i + 1]), parameters, allow_unused=True
                                ),
                                strict=True,
                            )
                        ]
                    )
                    for i in ids
                ]
            )
            before = [p.detach().clone() for p in parameters]
            optimizer.step()
            after, average = [p.detach().clone() for p in parameters], torch.zeros(rows.shape[1], dtype=T)
            for time, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                with torch.no_grad():
                    for p, start, end in zip(parameters, before, after, strict=True):
                        p.copy_(start + time * (end - start))
                average += weight * jacobian(model, query)[0, 1]
            with torch.no_grad():
                for p, end in zip(parameters, after, strict=True):
                    p.copy_(end)
            expected.index_add_(0, ids, -0.2 / 8 * (rows @ average))
    why = pk.KernelMachine(recorder.trajectory, quadrature=pk.GaussLegendre(8), engine=engine).explain(query, outputs=1)
    np.testing.assert_allclose(why.shares[0], expected.numpy(), rtol=0, atol=1e-9 * expected.abs().max().item())
    assert why.split_error < 1e-10 and why.engine


# -- lengths that coincide with the number of samples ------------------------------------------------------------------


class MaskToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.m, self.o = nn.Linear(2, 5), nn.Parameter(torch.randn(5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = (torch.arange(x.shape[1]) % 3 == 0)[:, None]
        return self.o(torch.where(mask, self.m, self.f(x)).tanh().mean(1))


class Ramp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.p = nn.Linear(2, 7), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(self.a(x.mean(1)).tanh(), self.p, torch.linspace(0, 1, 7, dtype=x.dtype))


class Frequencies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(7)), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(7, dtype=x.dtype)
        return self.o(torch.addcmul(x[:, 0, :1] * t, self.w, t).sin())


class Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.q, self.o = nn.Linear(2, 4), nn.Parameter(torch.randn(1, 7, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        k, t = self.f(x), x.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        return self.o(F.scaled_dot_product_attention(self.q.expand(len(x), -1, -1), k, k, attn_mask=causal).mean(1))


class Places(nn.Module):
    """A layer on positions made in `forward`, the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.places, self.o = nn.Linear(2, 5), nn.Linear(1, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        return self.o((self.f(x) + self.places(t)).tanh().mean(1))


class Mixing(nn.Module):
    """A matrix over positions, made of a parameter and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.m, self.o = nn.Linear(2, 5), nn.Parameter(torch.randn(7, 7)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(7, 7, dtype=torch.bool).tril()
        return self.o(torch.einsum("st,ntd->nsd", self.m.masked_fill(~mask, 0.0), self.f(x)).tanh().mean(1))


@pytest.mark.parametrize("n", [7, 6, 5, 4, 3, 2, 1])
@pytest.mark.parametrize("engine", ["auto", "layerwise", "jacobian"])
@pytest.mark.parametrize("kind", [MaskToken, Ramp, Frequencies, Queries, Places, Mixing])
def test_lengths_that_are_the_number_of_samples(kind: type[nn.Module], engine: str, n: int) -> None:
    torch.manual_seed(0)
    model, X = kind().to(T), torch.randn(n, 7, 2, dtype=T)
    expected = trace(model, X)
    np.testing.assert_allclose(pk.TangentKernel(model, engine=engine)(X), expected, rtol=1e-9)


@pytest.mark.parametrize("engine", ["auto", "layerwise"])
def test_a_proof_for_one_length_is_none_for_another(engine: str) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.o = nn.Linear(2, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            n, t, d = x.shape
            return self.o(self.f(x.reshape(n * t, d)).tanh().reshape(n, t, -1).mean(1))

    torch.manual_seed(0)
    model = Tokens().to(T)
    kernel = pk.TangentKernel(model, engine=engine)
    for length in (1, 6, 2, 12):
        X = torch.randn(5, length, 2, dtype=T)
        np.testing.assert_allclose(kernel(X), trace(model, X), rtol=1e-10)


# -- the certificate of the rows ---------------------------------------------------------------------------------------


def recorded(dtype: torch.dtype = T, batch_norm: bool = False) -> tuple[pk.Trajectory, Tensor]:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(6)] if batch_norm else []
    model = nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    X, y = torch.randn(24, 4, dtype=dtype), torch.randint(3, (24,))
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.2), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for x, target in recorder.batches(8):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    return recorder.trajectory, X[:3]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_right_rows_have_a_split_error_at_rounding(dtype: torch.dtype, limit: float, batch_norm: bool) -> None:
    trajectory, X = recorded(dtype, batch_norm)
    for engine in ("auto", "jacobian", "autograd"):
        why = pk.KernelMachine(trajectory, engine=engine).explain(X, outputs=0)
        assert why.split_error < limit
        assert why.engine == ("autograd" if batch_norm else {"auto": "layerwise"}.get(engine, engine))
        assert "split error" in repr(why)


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "rolled": lambda rows: rows.roll(1, 0),
    "two changed places": lambda rows: rows[[1, 0, *range(2, len(rows))]],
    "averaged": lambda rows: rows.mean(0).expand_as(rows),
    "a part of one given to the next": lambda rows: rows + 0.01 * (rows.roll(1, 0) - rows),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_rows_with_the_right_sum_are_found_and_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded()
    right = pk.KernelMachine(trajectory).explain(X, outputs=0)
    pulled_back = GradientSource.pulled_back

    def broken(self: GradientSource, *arguments: Any) -> FactoredGradients:
        found = pulled_back(self, *arguments)
        whole = torch.cat([found.columns(where, T) for where in found.layout.slices.values()], dim=1)
        return FactoredGradients.dense(BROKEN[name](whole).contiguous(), found.layout)

    monkeypatch.setattr(GradientSource, "pulled_back", broken)
    why = pk.KernelMachine(trajectory).explain(X, outputs=0)
    assert why.engine == "autograd" and why.split_error < 1e-12
    np.testing.assert_allclose(why.shares, right.shares, rtol=0, atol=1e-12)


def test_samples_that_training_couples_unseen() -> None:
    """A layer that centres the batch in training, which no class of torch's says."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.tanh(h - h.mean(0) if self.training else h))

    torch.manual_seed(0)
    model, X, y = Centred().to(T), torch.randn(8, 4, dtype=T), torch.randint(3, (8,))
    loss, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for x, target in recorder.batches(8):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            before = [p.detach().clone() for p in parameters]
            optimizer.step()
    live = [p.clone().requires_grad_() for p in before]
    z = torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), live, strict=True)), (X,))
    leaf = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf, y), leaf)
    own = [torch.autograd.grad(z[i] @ slope[i], live, retain_graph=True) for i in range(8)]
    rows = [torch.cat([g.reshape(-1) for g in gradients]) for gradients in own]
    model.eval()
    delta = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    query, average = X[:1], torch.zeros(len(rows[0]), dtype=T)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    end = [p.detach().clone() for p in parameters]
    for time, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        with torch.no_grad():
            for p, b, d in zip(parameters, before, delta, strict=True):
                p.copy_(b + time * d)
        average += weight * jacobian(model, query)[0, 0]
    with torch.no_grad():
        for p, e in zip(parameters, end, strict=True):
            p.copy_(e)
    why = pk.KernelMachine(recorder.trajectory, quadrature=pk.GaussLegendre(8)).explain(query, outputs=0)
    np.testing.assert_allclose(why.shares[0], (-0.1 * torch.stack(rows) @ average).numpy(), rtol=0, atol=1e-12)
    assert why.engine == "autograd" and why.split_error < 1e-12


@pytest.mark.parametrize("outputs", ["trace", "mean", "sum", "full", 1, lambda z: z[:2] ** 2])
@pytest.mark.parametrize("engine", ["auto", "jacobian", "products", "autograd"])
def test_check_of_a_kernel(engine: str, outputs: Any) -> None:
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(T), torch.randn(9, 4, dtype=T)
    assert pk.TangentKernel(model, engine=engine, outputs=outputs).check(X) < 1e-12


def test_check_of_a_path_kernel_and_of_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory, X = recorded()
    kernel = pk.PathKernel(trajectory, preconditioner="optimizer")
    assert kernel.check(X) < 1e-12
    gram = type(kernel.engine).gram
    monkeypatch.setattr(type(kernel.engine), "gram", lambda self, *a: gram(self, *a).roll(1, 0))
    assert kernel.check(X) > 0.1


# -- networks that torch.func refuses ----------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """A custom function without rules for `vmap` or forward differentiation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(2 * np.tanh(x.detach().numpy()))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 * (1 - torch.tanh(x) ** 2)


def custom(net: Any, x: Tensor) -> Tensor:
    return net.b(Doubled.apply(net.a(x)) * net.p)


def checkpointed(net: Any, x: Tensor) -> Tensor:
    return net.b(checkpoint(lambda z: torch.tanh(net.a(z)) * net.p, x, use_reentrant=False))


def checkpointed_reentrant(net: Any, x: Tensor) -> Tensor:
    return net.b(checkpoint(lambda z: torch.tanh(net.a(z)) * net.p, x.requires_grad_(True), use_reentrant=True))


def transformed(net: Any, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(lambda z: through(net, z).sum()))(x)[:, :3] * net.p[:3]


def differentiated(net: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.clone().requires_grad_(True)
        u = through(net, x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return torch.cat([u, slope[:, :1]], dim=1)


REFUSED_BY_TORCH = {
    f.__name__: f for f in (custom, checkpointed, checkpointed_reentrant, transformed, differentiated, asks, routes)
}


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("engine", ["auto", "layerwise", "jacobian", "products", "autograd"])
@pytest.mark.parametrize("name", REFUSED_BY_TORCH)
def test_kernels_of_networks_that_torch_func_refuses(name: str, engine: str) -> None:
    torch.manual_seed(0)
    model, X = Net(REFUSED_BY_TORCH[name]).to(T), torch.randn(5, 4, dtype=T)
    expected = trace(model, X.clone())
    np.testing.assert_allclose(pk.TangentKernel(model, engine=engine)(X), expected, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("name", REFUSED_BY_TORCH)
def test_machines_of_networks_that_torch_func_refuses(name: str) -> None:
    torch.manual_seed(0)
    model, X = Net(REFUSED_BY_TORCH[name]).to(T), torch.randn(12, 4, dtype=T)
    c = model(X[:1].clone()).shape[1]
    y, loss = torch.randint(c, (12,)), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y), audit_every=1) as recorder:
        for x, target in recorder.batches(4):
            optimizer.zero_grad()
            loss(model(x.clone()), target).backward()
            optimizer.step()
    machine = pk.KernelMachine(recorder.trajectory)
    why = machine.explain(X[:3], outputs=0)
    expected = model(X[:3].clone()).detach().numpy()
    assert why.residual.max() < 1e-10
    np.testing.assert_allclose(machine.decision_function(X[:3]), expected, rtol=1e-8, atol=1e-9)
    reference = pk.KernelMachine(recorder.trajectory, engine="autograd").explain(X[:3], outputs=0)
    np.testing.assert_allclose(why.shares, reference.shares, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", [nn.PReLU, lambda: nn.PReLU(7)])
@pytest.mark.parametrize("n", [8, 7, 3])
def test_rows_by_vmap_are_not_believed(n: int, kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, X = nn.Sequential(nn.Linear(6, 7), kind(), nn.Linear(7, 8)).to(T), torch.randn(n, 6, dtype=T)
    for engine in ("jacobian", "auto", "layerwise", "products"):
        np.testing.assert_allclose(pk.TangentKernel(model, engine=engine)(X), trace(model, X), rtol=1e-10)
    J = jacobian(model, X)
    np.testing.assert_allclose(
        pk.TangentKernel(model, engine="jacobian", outputs="full")(X),
        torch.einsum("icp,jdp->ijcd", J, J),
        rtol=1e-9,
        atol=1e-12,
    )


# -- no function of one sample -----------------------------------------------------------------------------------------


class InEvaluation(nn.Module):
    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change, self.passes = nn.Linear(4, 3), change, 0
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.layer(x))


def counted(net: Any, h: Tensor) -> Tensor:
    net.passes += 1
    return h * 0.9**net.passes


NOT_SAMPLE_WISE: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "noise": (lambda net, h: h + torch.randn_like(h), "draws random numbers in evaluation"),
    "dropout": (lambda net, h: F.dropout(h, 0.5), "draws random numbers in evaluation"),
    "numpy": (lambda net, h: h * float(np.random.rand()), "differ from one pass to the next"),
    "state": (counted, "differ from one pass to the next"),
    "batch statistics": (lambda net, h: net.norm(h), "not one alone"),
    "batch statistics of images": (lambda net, h: net.norm(h[..., None].expand(-1, -1, 2)), "depends on the samples"),
    "centred": (lambda net, h: h - h.mean(0), "depends on the samples"),
    "softmax over samples": (lambda net, h: h.softmax(0), "depends on the samples"),
    "samples second": (lambda net, h: h.T.contiguous().reshape(len(h), -1), "depends on the samples"),
    "pairs": (lambda net, h: h @ h.T, "For one sample the network returned 1 numbers"),
}


@pytest.mark.parametrize("name", NOT_SAMPLE_WISE)
def test_what_is_no_function_of_one_sample_is_refused(name: str) -> None:
    change, message = NOT_SAMPLE_WISE[name]
    torch.manual_seed(0)
    model, X = InEvaluation(change), torch.randn(6, 4)
    numbers, python = torch.get_rng_state(), np.random.get_state()[1].copy()
    for engine in ("auto", "jacobian", "products"):
        with pytest.raises(UnsupportedModelError, match=message):
            pk.TangentKernel(model, engine=engine)(X)
    assert torch.equal(torch.get_rng_state(), numbers) and (np.random.get_state()[1] == python).all()
    if name == "pairs":  # recorded with a warning: tests/recording/test_compared_samples.py
        return
    optimizer, start = torch.optim.SGD(model.parameters(), lr=0.1), model.layer.weight.detach().clone()
    with (
        pytest.raises(UnsupportedModelError, match=message),
        pk.KernelRecorder(model, optimizer, nn.MSELoss(), data=(X, X[:, :3])) as recorder,
    ):
        next(iter(recorder.batches(3)))
    assert torch.equal(model.layer.weight, start) and model.passes == 0


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_squeezed_output_is_the_samples_own(outputs: int) -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze()

    torch.manual_seed(0)
    model, X = Squeezed().to(T), torch.randn(7, 4, dtype=T)
    for engine in ("auto", "jacobian", "products", "autograd"):
        kernel, right = pk.TangentKernel(model, engine=engine), pk.TangentKernel(model.net)(X)
        np.testing.assert_allclose(kernel(X), right, rtol=1e-12)
        np.testing.assert_allclose(kernel(X[:1]), right[:1, :1], rtol=1e-12)
        np.testing.assert_allclose(kernel(X[:1], X), right[:1], rtol=1e-12)
        np.testing.assert_allclose(kernel.diagonal(X[:1]), right[0, 0], rtol=1e-12)


@pytest.mark.parametrize("function", [lambda z: z.argmax(), lambda z: z.detach(), lambda z: (z > 0).double()])
@pytest.mark.parametrize("engine", ["auto", "jacobian", "products", "autograd"])
def test_a_function_of_the_outputs_without_gradient_is_an_error(engine: str, function: Any) -> None:
    model, X = nn.Linear(4, 3).to(T), torch.randn(4, 4, dtype=T)
    with pytest.raises(InputError, match="without a gradient"):
        pk.TangentKernel(model, outputs=function, engine=engine)(X)


def test_complex_outputs_are_refused() -> None:
    class Complex(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(super().forward(x))

    with pytest.raises(PathKernelError, match="complex"):
        pk.TangentKernel(Complex(4, 3))(torch.randn(3, 4))


def test_layers_that_have_no_gradient_of_one_sample_are_refused_at_construction() -> None:
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        model = nn.Sequential(nn.Embedding(5, 4, **options), nn.Flatten(), nn.Linear(8, 2))
        with pytest.raises(UnsupportedModelError, match=f"`0` was made with `{next(iter(options))}"):
            pk.TangentKernel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(UnsupportedModelError, match="`0` was made with"):
            data = torch.ones(3, 2).long(), torch.ones(3).long()
            pk.KernelRecorder(model, optimizer, nn.CrossEntropyLoss(), data=data)
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(UnsupportedModelError, match="has no shape yet"):
        pk.TangentKernel(lazy)
    with torch.device("meta"):
        meta = nn.Linear(3, 2)
    with pytest.raises(UnsupportedModelError, match="device `meta`"):
        pk.TangentKernel(meta)
