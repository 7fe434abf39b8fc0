"""Every form of per-sample gradients against its own rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pathkernel.gradients.layers.factor import Factor, side_by_side
from pathkernel.gradients.layers.factors import Dense, Lookup, Outer, joined

N, K = 4, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(seed: int = 0) -> dict[str, Factor]:
    index = torch.randint(6, (N, 5), generator=torch.Generator().manual_seed(seed))
    return {
        "dense": Dense(draw(N, K, 7, seed=seed)),
        "outer": Outer(draw(N, K, 2, 3, seed=seed), draw(N, 2, 5, seed=seed + 1)),
        "one position": Outer(draw(N, K, 1, 3, seed=seed), draw(N, 1, 5, seed=seed + 1)),
        "transposed": Outer(draw(N, K, 2, 3, seed=seed), draw(N, 2, 5, seed=seed + 1), transposed=True),
        "head": Outer(torch.eye(K).double()[:, None].expand(N, K, 1, K), draw(N, 1, 5, seed=seed), head=True),
        "lookup": Lookup(draw(N, K, 5, 2, seed=seed), index, 6),
    }


FORMS = list(factors())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_sums_of_outer_products(form: str) -> None:
    """δ aᵀ or its transpose, with unit vectors a where rows of a table are read."""
    factor = factors()[form]
    readings = factor.readings
    if not readings.is_floating_point():
        readings = torch.nn.functional.one_hot(readings, factor.reading_size).double()
    products = torch.einsum("nktp,ntq->nkqp" if factor.transposed else "nktp,ntq->nkpq", factor.signals, readings)
    close(factor.rows(), products.flatten(2))
    assert factor.rows().shape == (factor.samples, factor.components, factor.size)
    assert factor.row_numbers == factor.rows().numel() and factor.length == products.shape[2]


@pytest.mark.parametrize("form", FORMS)
def test_parts(form: str) -> None:
    factor = factors()[form]
    rows = factor.rows()
    close(factor.take(slice(1, 3)).rows(), rows[1:3])
    close(factor.component(1).rows(), rows[:, 1:2])
    unit = factor.size // factor.length
    close(factor.rows_between(1, 3).rows(), rows[:, :, unit : 3 * unit])
    for begin, end in ((0, factor.size), (1, 2), (2, factor.size - 1)):
        close(factor.columns(begin, end), rows[:, :, begin:end])


@pytest.mark.parametrize("form", FORMS)
def test_changes(form: str) -> None:
    factor = factors()[form]
    rows = factor.rows()
    close(factor.scaled(0.5).rows(), 0.5 * rows)
    close(factor.scaled(draw(N)).rows(), draw(N)[:, None, None] * rows)
    trace = factor.stacked().rows()[:, 0]
    close(trace @ trace.T, torch.einsum("nkp,mkp->nm", rows, rows))
    single = factor.to(torch.float32)
    assert single.dtype == torch.float32 and single.head == factor.head
    torch.testing.assert_close(single.rows(), rows.float(), rtol=1e-4, atol=1e-5)
    assert sum(factor.numbers) == sum(tensor.numel() for tensor in factor.tensors)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_sums_and_products(form: str, full: bool) -> None:
    factor = factors()[form]
    rows, directions, weights = factor.rows(), draw(2, factor.size, seed=3), draw(N, K, 2, seed=4)
    close(factor.total(), rows.sum(dim=(0, 1)))
    close(factor.products(directions), rows @ directions.T)
    close(factor.products_in_turn(directions), rows @ directions.T)
    close(factor.weighted_sum(weights), torch.einsum("nkd,nkp->dp", weights, rows))
    into = torch.full_like(side_by_side(rows, full), torch.nan).contiguous()
    factor.write(into, full)
    close(into, side_by_side(rows, full))


@pytest.mark.parametrize("other", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_several_uses_add_up(form: str, other: str) -> None:
    one, two = factors()[form], factors(seed=5)[other]
    if one.size == two.size:
        close(joined([one, two]).rows(), one.rows() + two.rows())
