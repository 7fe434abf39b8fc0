r"""One pass of a network with its derivatives along a few directions beside every value, on the processor.

`torch.func.jvp` under `vmap` holds the tangents of all directions in one tensor, many times what a processor's cache
holds, and differentiates batch normalisation by a dozen passes over it. Here every direction has a tensor of its own,
which goes from a convolution through the normalisation to what follows before the next direction begins. What a
direction does not change is computed once, and the derivative of batch normalisation, whose Jacobian in its
input is symmetric, is one call of torch's own backward kernel:

.. math:: \dot y = \frac{\gamma}{\sigma} \bigl(\dot x - \overline{\dot x} - \hat x\, \overline{\hat x \dot x}\bigr)
                   + \dot\gamma\, \hat x + \dot\beta .

It knows the operations of convolutional networks, and refuses others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Parameters

aten = torch.ops.aten


class Tangents:
    """Tangents of a value along each direction, in its shape, each made when it is asked for.

    Parameters
    ----------
    count
        How many directions there are.
    make
        Makes one of them. Who asks for one again has all of them kept.
    """

    def __init__(self, count: int, make: Callable[[int], Tensor]) -> None:
        self._count, self._make, self._asked = count, make, 0
        self._made: Sequence[Tensor] | None = None

    @classmethod
    def of(cls, made: Sequence[Tensor]) -> Tangents:
        """Those that are there already."""
        found = cls(len(made), made.__getitem__)
        found._made = made
        return found

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, direction: int) -> Tensor:
        if self._made is None and direction < self._asked:
            self._made = [self._make(place) for place in range(self._count)]
        self._asked = direction + 1
        return self._make(direction) if self._made is None else self._made[direction]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[direction] for direction in range(self._count))


class Dual(Tensor):
    """A value of a pass, with its derivative along each direction.

    Attributes
    ----------
    value
        As it would be without derivatives.
    tangents
        See `Tangents`.
    aliased
        Whether another value lies in the same memory: then it is not to be changed in place.
    """

    value: Tensor
    tangents: Tangents
    aliased: bool

    @classmethod
    def of(cls, value: Tensor, tangents: Tangents | Sequence[Tensor]) -> Dual:
        """A value with its tangents, which may be a list."""
        found = Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), dtype=value.dtype, device=value.device
        )
        found.tangents = tangents if isinstance(tangents, Tangents) else Tangents.of(tangents)
        found.value, found.aliased = value, False
        return found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Dual({tuple(self.value.shape)}, {len(self.tangents)} directions)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():  # by the network, or by a function that has a derivative of its own
            raise NotImplementedError(f"{operation} where no gradients are taken")
        if operation is aten.detach.default:  # a constant, as autograd has it, in the same memory
            args[0].aliased = True
            return args[0].value
        if (functional := CHANGING.get(operation)) is not None:
            return _changed(args[0], functional, args, kwargs)
        return _result(operation, args, kwargs)


def dual_outputs(
    run: Callable[[Parameters], Tensor], parameters: Parameters, tangents: Sequence[Mapping[str, Tensor]]
) -> list[Tensor]:
    """Derivatives of a function of parameters along some directions, by one pass, without autograd's graph.

    Raises
    ------
    Exception
        Whatever torch raises in a network that has operations which this does not cover.
    """
    duals = {name: Dual.of(value, [own[name] for own in tangents]) for name, value in parameters.items()}
    with torch.enable_grad():  # of which no value here has any: what a network does without is told by it
        outputs = run(duals)
    return list(outputs.tangents) if isinstance(outputs, Dual) else [torch.zeros_like(outputs) for _ in tangents]


def _changed(given: Any, functional: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dual:
    """The value that an operation was to change, with what it would have returned in another place."""
    found = _result(functional, args, kwargs)
    same = isinstance(given, Dual) and isinstance(found, Dual) and not given.aliased
    if not same or found.value.shape != given.value.shape or found.value.dtype != given.value.dtype:
        raise NotImplementedError(f"{functional} in the place of a value that others see")
    given.value, given.tangents = found.value, found.tangents
    return given


def _result(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if operation in RULES:
        found = RULES[operation](*args, **kwargs)
    elif operation in LINEAR:
        found = _linear(operation, *args, **kwargs)
    elif operation in ELEMENTWISE:
        found = _elementwise(operation, *args, **kwargs)
    else:
        raise NotImplementedError(f"{operation} has no rule")
    if operation.is_view and operation is not aten.as_strided_.default:
        for leaf in pytree.tree_leaves((args, found)):
            if isinstance(leaf, Dual):
                leaf.aliased = True
    return found


# -- rules -----------------------------------------------------------------------------------------------------


def _parts(given: Any) -> tuple[Any, Tangents | None]:
    return (given.value, given.tangents) if isinstance(given, Dual) else (given, None)


def _convolution(given: Any, weight: Any, bias: Any, *how: Any) -> Dual:
    x, dx = _parts(given)
    w, dw = _parts(weight)
    b, db = _parts(bias)
    value = aten.convolution(x, w, b, *how)

    def make(k: int) -> Tensor:
        if dw is None:
            own = None if db is None else db[k].view(1, -1, *[1] * (x.dim() - 2))
        else:
            own = aten.convolution(x, dw[k].contiguous(), None if db is None else db[k], *how)
        if dx is not None:
            through = aten.convolution(dx[k], w, None, *how)
            own = through if own is None else through.add_(own)
        assert own is not None
        return own.expand_as(value)

    return Dual.of(value, Tangents(_directions(dx, dw, db), make))


def _directions(*tangents: Tangents | None) -> int:
    return next(len(own) for own in tangents if own is not None)  # or it would not have come here


def _batch_norm(
    given: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, ...]:
    x, dx = _parts(given)
    w, dw = _parts(weight)
    b, db = _parts(bias)
    if any(isinstance(own, Dual) for own in (mean, var)) or x.numel() == 0:
        raise NotImplementedError("statistics that depend on parameters")
    y, batch_mean, batch_scale = aten.native_batch_norm(x, w, b, mean, var, training, momentum, eps)
    centre, scale = (batch_mean, batch_scale) if training else (mean, (var + eps).rsqrt())
    shape = 1, -1, *[1] * (x.dim() - 2)
    normed = (x - centre.view(shape)).mul_(scale.view(shape))
    factor = scale if w is None else scale * w
    # Of what is normalised already: its mean is 0, and its deviation 1.
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)

    def make(k: int) -> Tensor:
        if dx is None:
            own = torch.zeros_like(x)
        elif training:
            of_input = [True, False, False]
            kernel = aten.native_batch_norm_backward
            own = kernel(dx[k], normed, factor, None, None, zero, one, True, eps, of_input)[0]
        else:
            own = dx[k] * factor.view(shape)
        if dw is not None:
            own.addcmul_(normed, dw[k].view(shape))
        return own if db is None else own.add_(db[k].view(shape))

    return Dual.of(y, Tangents(_directions(dx, dw, db), make)), batch_mean, batch_scale


def _add(first: Any, second: Any, *, alpha: float = 1) -> Dual:
    (a, da), (b, db) = _parts(first), _parts(second)
    value = torch.add(a, b, alpha=alpha)
    if da is not None and db is not None:
        return Dual.of(value, [torch.add(p, q, alpha=alpha).expand_as(value) for p, q in zip(da, db, strict=True)])
    if da is not None:
        return Dual.of(value, [own.expand_as(value) for own in da])
    assert db is not None
    return Dual.of(value, [(own * alpha).expand_as(value) for own in db])


def _subtract(first: Any, second: Any, *, alpha: float = 1) -> Dual:
    return _add(first, second, alpha=-alpha)


def _bilinear(operation: Any) -> Callable[..., Dual]:
    """Rule of an operation that is linear in each of its two arguments."""

    def rule(first: Any, second: Any) -> Dual:
        (a, da), (b, db) = _parts(first), _parts(second)
        left = None if da is None else [operation(own, b) for own in da]
        right = None if db is None else [operation(a, own) for own in db]
        if left is not None and right is not None:
            left = [p + q for p, q in zip(left, right, strict=True)]
        found = right if left is None else left
        assert found is not None
        return Dual.of(operation(a, b), found)

    return rule


def _addmm(added: Any, first: Any, second: Any, *, beta: float = 1, alpha: float = 1) -> Dual:
    if beta != 1 or alpha != 1:
        raise NotImplementedError("a scaled product")
    known = [own for own in (added, first, second) if isinstance(own, Dual)]
    b, db = _parts(added)
    product = PRODUCT(first, second) if len(known) > isinstance(added, Dual) else aten.mm(first, second)
    value, pushed = _parts(product)
    if pushed is None:
        found = [] if db is None else list(db)
    else:
        found = list(pushed) if db is None else [p + q for p, q in zip(pushed, db, strict=True)]
    value = b + value
    return Dual.of(value, [own.expand_as(value) for own in found])


def _divide(first: Any, second: Any) -> Dual:
    if isinstance(second, Dual):
        raise NotImplementedError("a quotient of parameters")
    return Dual.of(first.value / second, [own / second for own in first.tangents])


def _concatenate(parts: Sequence[Any], dim: int = 0) -> Dual:
    known = next(own for own in parts if isinstance(own, Dual))
    found = []
    for k in range(len(known.tangents)):
        own = [part.tangents[k] if isinstance(part, Dual) else torch.zeros_like(part) for part in parts]
        found.append(torch.cat(own, dim))
    return Dual.of(torch.cat([_parts(part)[0] for part in parts], dim), found)


def _restrided(given: Dual, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Dual:
    """Another stride of axes of one entry, by which pooling marks the order of memory: nothing is changed."""
    axes = zip(given.value.shape, given.value.stride(), size, stride, strict=True)
    if offset or any(was != now or (now > 1 and before != after) for was, before, now, after in axes):
        raise NotImplementedError("another view of the same memory")
    return given


def _padded(given: Dual, widths: Sequence[int], value: float = 0) -> Dual:
    padded = aten.constant_pad_nd
    return Dual.of(padded(given.value, widths, value), [padded(own, widths) for own in given.tangents])


def _largest(given: Dual, *how: Any) -> tuple[Any, ...]:
    y, places = aten.max_pool2d_with_indices(given.value, *how)
    flat = places.flatten(-2)
    return Dual.of(y, [own.flatten(-2).gather(-1, flat).view_as(y) for own in given.tangents]), places


def _linear(operation: Any, given: Any, *args: Any, **kwargs: Any) -> Dual:
    if not isinstance(given, Dual) or any(isinstance(own, Dual) for own in args):
        raise NotImplementedError(f"{operation} of something else than one value")
    return Dual.of(operation(given.value, *args, **kwargs), [operation(own, *args, **kwargs) for own in given.tangents])


def _elementwise(operation: Any, given: Any, *args: Any, **kwargs: Any) -> Dual:
    y = operation(given.value, *args, **kwargs)
    slope = ELEMENTWISE[operation]
    return Dual.of(y, [slope(own, given.value, y, *args, **kwargs) for own in given.tangents])


PRODUCT = _bilinear(aten.mm.default)

RULES: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.native_batch_norm.default: _batch_norm,
    aten.max_pool2d_with_indices.default: _largest,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _subtract,
    aten.mul.Tensor: _bilinear(torch.mul),
    aten.mm.default: PRODUCT,
    aten.bmm.default: _bilinear(aten.bmm.default),
    aten.addmm.default: _addmm,
    aten.div.Tensor: _divide,
    aten.cat.default: _concatenate,
    aten.as_strided_.default: _restrided,
    aten.constant_pad_nd.default: _padded,
}
"""Operations of several values."""

LINEAR = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default, aten.transpose.int,
    aten.permute.default, aten.expand.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten.slice.Tensor, aten.select.int, aten.clone.default, aten.alias.default, aten.neg.default, aten.mean.dim,
    aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
}  # fmt: skip
"""Operations that are linear in what they are given first."""

ELEMENTWISE: dict[Any, Callable[..., Tensor]] = {
    aten.relu.default: lambda t, x, y: aten.threshold_backward(t, y, 0.0),
    aten.leaky_relu.default: lambda t, x, y, slope=0.01: aten.leaky_relu_backward(t, x, slope, False),
    aten.hardtanh.default: lambda t, x, y, low=-1, high=1: aten.hardtanh_backward(t, x, low, high),
    aten.silu.default: lambda t, x, y: aten.silu_backward(t, x),
    aten.gelu.default: lambda t, x, y, **how: aten.gelu_backward(t, x, **how),
    aten.hardswish.default: lambda t, x, y: aten.hardswish_backward(t, x),
    aten.sigmoid.default: lambda t, x, y: aten.sigmoid_backward(t, y),
    aten.tanh.default: lambda t, x, y: aten.tanh_backward(t, y),
}
"""Functions of each number, and the tangent t of f(x) = y: their Jacobian is diagonal, as that of torch's backward."""

CHANGING = {
    aten.relu_.default: aten.relu.default,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.silu_.default: aten.silu.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.tanh_.default: aten.tanh.default,
}
"""Operations that change what they are given, and those that return it."""
