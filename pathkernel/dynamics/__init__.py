"""Older name of `pathkernel.optimizers`, whose optimizers are forwarded."""

from typing import TYPE_CHECKING, Any

import pathkernel.optimizers as optimizers  # which imports nothing of the package's own face

if TYPE_CHECKING:
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

__all__ = optimizers.__all__

if not TYPE_CHECKING:  # to which it would say that there is every name

    def __getattr__(name: str) -> Any:
        return getattr(optimizers, name)

    def __dir__() -> list[str]:
        return dir(optimizers)
