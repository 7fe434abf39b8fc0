r"""Norms on parameters, their duals, and the direction in which each is steepest.

.. math:: \lVert g\rVert_* = \max_{\lVert d\rVert \le 1} \langle g, d\rangle,\qquad
          d(g) = -\operatorname*{arg\,max}_{\lVert d\rVert \le 1} \langle g, d\rangle,\qquad
          \dot\theta = d(\nabla L) \;\Rightarrow\; \dot L = -\lVert\nabla L\rVert_*

==============  ========================================  =====================================  =================
norm            of θ                                      direction −d(g)                        dual
==============  ========================================  =====================================  =================
``"l2"``        √Σ θ²                                     g / ‖g‖₂                               ‖g‖₂
``"linf"``      largest entry                             sign g                                 ‖g‖₁
``"l1"``        Σ abs(θ)                                  sign g at its largest entry, else 0    ‖g‖_∞
``"spectral"``  largest singular value of any parameter   U Vᵀ of g = U Σ Vᵀ, matrix by matrix   Σ singular values
==============  ========================================  =====================================  =================

A parameter of more than two axes is a matrix with the first as its rows, and a vector is a matrix of one column: its
direction is the vector over its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathkernel.errors import InputError


@dataclass(frozen=True)
class Norm:
    """A norm by what descent needs of it; gradients come parameter by parameter, in their shapes.

    Attributes
    ----------
    dual
        ‖g‖_*, a tensor of no axes.
    ascent
        −d(g), of norm 1 (0 where g is 0), so that ⟨g, −d⟩ = ‖g‖_*.
    """

    dual: Callable[[Sequence[Tensor]], Tensor]
    ascent: Callable[[Sequence[Tensor]], list[Tensor]]


def norm_of(name: str) -> Norm:
    """The norm of this name.

    Raises
    ------
    InputError
        For any other.
    """
    if not isinstance(name, str) or name not in NORMS:
        raise InputError(
            f"`norm={name!r}` was given", f"Norms are {', '.join(map(repr, NORMS))}", 'Write `norm="spectral"`'
        )
    return NORMS[name]


def polar_factor(gradient: Tensor) -> Tensor:
    """U Vᵀ of g = U Σ Vᵀ, in the shape and type of g; computed in float64."""
    u, _, vh = singular_directions(gradient)
    return (u @ vh).reshape(gradient.shape).to(gradient)


def singular_directions(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the singular values and Vᵀ of a gradient as a matrix, float64, of all singular values above its rounding."""
    matrix = as_matrix(gradient)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    above = s > torch.finfo(gradient.dtype).eps * max(matrix.shape) * s.max()
    return u[:, above], s[above], vh[above]


def as_matrix(gradient: Tensor) -> Tensor:
    """A parameter as a matrix, its first axis as the rows; vectors and numbers as one column."""
    return gradient.reshape(len(gradient), -1) if gradient.dim() > 1 else gradient.reshape(-1, 1)


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _over_length(gradients: Sequence[Tensor]) -> list[Tensor]:
    length = _flat(gradients).norm()
    return [g / length if length > 0 else torch.zeros_like(g) for g in gradients]


def _largest_entry(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Sign of the largest entry of all, the first of several equal ones."""
    flat = _flat(gradients)
    chosen = torch.zeros_like(flat)
    if len(flat):
        place = flat.abs().argmax()
        chosen[place] = flat[place].sign()
    pieces = chosen.split([g.numel() for g in gradients])
    return [piece.reshape(g.shape) for piece, g in zip(pieces, gradients, strict=True)]


NORMS = {
    "l2": Norm(lambda g: _flat(g).norm(), _over_length),
    "linf": Norm(lambda g: _flat(g).abs().sum(), lambda g: [one.sign() for one in g]),
    "l1": Norm(lambda g: _flat(g).abs().max(), _largest_entry),
    "spectral": Norm(
        lambda g: torch.stack([torch.linalg.matrix_norm(as_matrix(one), "nuc") for one in g]).sum(),
        lambda g: [polar_factor(one) for one in g],
    ),
}
