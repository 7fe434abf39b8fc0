"""Optimizers read as dynamical systems: discretised flows and the motion of a body, each with its update rule.

Every optimizer names its rule, which the recorder is given: ``KernelRecorder(..., optimizer, ..., rule=Lion.rule())``.
"""

from typing import TYPE_CHECKING

from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.optimizers.momentum import Momentum as Momentum
    from pathkernel.optimizers.momentum import MomentumRule as MomentumRule
    from pathkernel.optimizers.momentum import leapfrog as leapfrog
    from pathkernel.optimizers.runge_kutta import Heun as Heun
    from pathkernel.optimizers.runge_kutta import HeunRule as HeunRule
    from pathkernel.optimizers.runge_kutta import RungeKutta as RungeKutta
    from pathkernel.optimizers.runge_kutta import RungeKutta4 as RungeKutta4
    from pathkernel.optimizers.runge_kutta import RungeKutta4Rule as RungeKutta4Rule
    from pathkernel.optimizers.runge_kutta import RungeKuttaRule as RungeKuttaRule
    from pathkernel.optimizers.scaled import Lion as Lion
    from pathkernel.optimizers.scaled import LionRule as LionRule
    from pathkernel.optimizers.scaled import NormalizedDescent as NormalizedDescent
    from pathkernel.optimizers.scaled import PolyakStep as PolyakStep
    from pathkernel.optimizers.scaled import ScalarRMSprop as ScalarRMSprop
    from pathkernel.optimizers.scaled import ScalarRule as ScalarRule
    from pathkernel.optimizers.scaled import SignDescent as SignDescent
    from pathkernel.optimizers.scaled import SignDescentRule as SignDescentRule
    from pathkernel.optimizers.steepest import CoordinateDescent as CoordinateDescent
    from pathkernel.optimizers.steepest import CoordinateDescentRule as CoordinateDescentRule
    from pathkernel.optimizers.steepest import SpectralDescent as SpectralDescent
    from pathkernel.optimizers.steepest import SpectralDescentRule as SpectralDescentRule

_HOMES = {
    "CoordinateDescent": "optimizers.steepest",
    "CoordinateDescentRule": "optimizers.steepest",
    "Heun": "optimizers.runge_kutta",
    "HeunRule": "optimizers.runge_kutta",
    "Lion": "optimizers.scaled",
    "LionRule": "optimizers.scaled",
    "Momentum": "optimizers.momentum",
    "MomentumRule": "optimizers.momentum",
    "NormalizedDescent": "optimizers.scaled",
    "PolyakStep": "optimizers.scaled",
    "RungeKutta": "optimizers.runge_kutta",
    "RungeKutta4": "optimizers.runge_kutta",
    "RungeKutta4Rule": "optimizers.runge_kutta",
    "RungeKuttaRule": "optimizers.runge_kutta",
    "ScalarRMSprop": "optimizers.scaled",
    "ScalarRule": "optimizers.scaled",
    "SignDescent": "optimizers.scaled",
    "SignDescentRule": "optimizers.scaled",
    "SpectralDescent": "optimizers.steepest",
    "SpectralDescentRule": "optimizers.steepest",
    "leapfrog": "optimizers.momentum",
}

__all__ = sorted(_HOMES)
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, _HOMES)
