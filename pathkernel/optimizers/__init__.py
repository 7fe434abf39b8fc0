"""Optimizers read as dynamical systems: discretised flows and the motion of a body, each with its update rule.

Every optimizer names its rule, which the recorder is given: ``KernelRecorder(..., optimizer, ..., rule=Lion.rule())``.
"""

from pathkernel.runtime.lazy import lazy_names

_HOMES = {
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
    "leapfrog": "optimizers.momentum",
}

__all__ = sorted(_HOMES)
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
