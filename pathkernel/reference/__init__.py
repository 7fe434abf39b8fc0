"""The dense, slow, obviously right twin of every formula: the oracle of the tests.

Nothing here is fast and nothing here is shared with what it checks. Gradients come from plain loops of
`torch.autograd.grad` over samples and outputs, optimizers are written out as in the textbook, and the exact
decomposition is computed *forward*, with a copy of the optimizer's memory for every training sample.

Conventions
-----------
- Everything is float64: models, parameters, losses and floating-point data are copied and converted; the caller's
  own objects are never changed. Integer data (labels, token ids) stay integers.
- Parameters are ``dict[str, Tensor]`` by module parameter name. P counts the *trainable* parameters
  (``requires_grad``), flattened and joined in `named_parameters()` order, tied ones once. Frozen parameters keep the
  value that they have in the module, unless the dictionary names them.
- A parameter that the loss does not reach has gradient zero (`torch.optim` would skip it, and its weight decay).
- The model is a deterministic function of one sample at a time, in the mode (train or eval) in which it is given:
  no dropout, no batch statistics.
- Shapes: n, m samples of X and Y; N training samples; B samples of a batch; C outputs; P parameters; Q queries;
  S steps.

References
----------
P. Domingos, "Every model learned by gradient descent is approximately a kernel machine", arXiv:2012.00152, 2020.
B. Bell et al., "An exact kernel equivalence for finite classification models", arXiv:2308.00824, 2023.
O. Gonzalez, "Time integration and discrete Hamiltonian systems", J. Nonlinear Science 6, 1996.
"""

from pathkernel.reference.closed_form import linear_least_squares_path
from pathkernel.reference.decomposition import Decomposition, decompose
from pathkernel.reference.flows import flow, gradient_and_hessian
from pathkernel.reference.gradients import (
    flatten,
    margin,
    output_gradients,
    sample_gradients,
    sample_gradients_from_losses,
    unflatten,
    value_gradients,
)
from pathkernel.reference.kernels import neighbours_apart, path_kernel, tangent_kernel
from pathkernel.reference.quadrature import (
    average_gradient,
    discrete_gradient,
    gauss_legendre,
    left,
    midpoint,
    trapezoid,
)
from pathkernel.reference.selection import conditional_variances
from pathkernel.reference.training import train

__all__ = [
    "output_gradients",
    "value_gradients",
    "margin",
    "sample_gradients",
    "sample_gradients_from_losses",
    "flatten",
    "unflatten",
    "tangent_kernel",
    "path_kernel",
    "neighbours_apart",
    "conditional_variances",
    "left",
    "midpoint",
    "trapezoid",
    "gauss_legendre",
    "average_gradient",
    "discrete_gradient",
    "train",
    "Decomposition",
    "decompose",
    "linear_least_squares_path",
    "flow",
    "gradient_and_hessian",
]
