r"""Closed forms of the Dirac GAN: two numbers that play against each other, a discriminator φ x and a fake sample θ.

Linearised where both are zero, every variant with an equilibrium there is a damped rotation

.. math:: \begin{pmatrix} \dot\varphi \\ \dot\theta \end{pmatrix}
          = \begin{pmatrix} -\gamma & -\omega \\ \omega & -\delta \end{pmatrix}
            \begin{pmatrix} \varphi \\ \theta \end{pmatrix} .
"""

import cmath


def flow_eigenvalues(damping: float, frequency: float, of_generator: float = 0.0) -> tuple[complex, complex]:
    r"""Eigenvalues of the damped rotation, :math:`-(\gamma+\delta)/2 \pm \sqrt{(\gamma-\delta)^2/4 - \omega^2}`.

    Parameters
    ----------
    damping, frequency, of_generator
        γ, ω and δ.

    Returns
    -------
    The two, the one with the larger imaginary part, or else the larger real part, first.
    """
    middle = -(damping + of_generator) / 2
    root = cmath.sqrt((damping - of_generator) ** 2 / 4 - frequency**2)
    return middle + root, middle - root


def simultaneous_eigenvalues(
    rate: float, damping: float, frequency: float, of_generator: float = 0.0
) -> tuple[complex, complex]:
    """Eigenvalues 1 + h λ of a step of both players at once."""
    first, second = flow_eigenvalues(damping, frequency, of_generator)
    return 1 + rate * first, 1 + rate * second


def alternating_eigenvalues(
    rate: float, damping: float, frequency: float, of_generator: float = 0.0, repeats: int = 1
) -> tuple[complex, complex]:
    r"""Eigenvalues of n steps of the discriminator, and one of the generator after them.

    With a = 1 − hγ, b = 1 − hδ and :math:`s = h\omega\,(1 + a + \dots + a^{n-1})`, the matrix

    .. math:: \begin{pmatrix} 1 & 0 \\ h\omega & b \end{pmatrix} \begin{pmatrix} a^n & -s \\ 0 & 1 \end{pmatrix}

    has the trace :math:`a^n + b - h\omega s` and the determinant :math:`a^n b`.
    """
    a = 1 - rate * damping
    b = 1 - rate * of_generator
    s = rate * frequency * sum(a**k for k in range(repeats))
    trace = a**repeats + b - rate * frequency * s
    determinant = a**repeats * b
    root = cmath.sqrt(trace**2 / 4 - determinant)
    return trace / 2 + root, trace / 2 - root
