"""Training as a dynamical system: games of several players, their stability, the Dirac GAN.

It is also the older name of `pathkernel.optimizers`, whose optimizers are forwarded.
"""

from typing import TYPE_CHECKING

import pathkernel.optimizers as optimizers  # which imports nothing of the package's own face
from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.dynamics import dirac_gan as dirac_gan
    from pathkernel.dynamics.clock import Clock as Clock
    from pathkernel.dynamics.game import GameRecorder as GameRecorder
    from pathkernel.dynamics.local_stability import Stability as Stability
    from pathkernel.dynamics.local_stability import stability as stability
    from pathkernel.dynamics.origins import Origins as Origins
    from pathkernel.optimizers import Heun as Heun
    from pathkernel.optimizers import HeunRule as HeunRule
    from pathkernel.optimizers import Lion as Lion
    from pathkernel.optimizers import LionRule as LionRule
    from pathkernel.optimizers import Momentum as Momentum
    from pathkernel.optimizers import MomentumRule as MomentumRule
    from pathkernel.optimizers import NormalizedDescent as NormalizedDescent
    from pathkernel.optimizers import PolyakStep as PolyakStep
    from pathkernel.optimizers import RungeKutta as RungeKutta
    from pathkernel.optimizers import RungeKutta4 as RungeKutta4
    from pathkernel.optimizers import RungeKutta4Rule as RungeKutta4Rule
    from pathkernel.optimizers import RungeKuttaRule as RungeKuttaRule
    from pathkernel.optimizers import ScalarRMSprop as ScalarRMSprop
    from pathkernel.optimizers import ScalarRule as ScalarRule
    from pathkernel.optimizers import SignDescent as SignDescent
    from pathkernel.optimizers import SignDescentRule as SignDescentRule
    from pathkernel.optimizers import leapfrog as leapfrog

_HOMES = {
    "Clock": "dynamics.clock",
    "GameRecorder": "dynamics.game",
    "Origins": "dynamics.origins",
    "Stability": "dynamics.local_stability",
    "dirac_gan": "dynamics.dirac_gan:",
    "stability": "dynamics.local_stability",
}

__all__ = sorted([*_HOMES, *optimizers.__all__])
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, {**optimizers._HOMES, **_HOMES})
