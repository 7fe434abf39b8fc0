"""Optimizers as dynamics: flows, finite steps and ledgers of recorded runs, games of several players, their stability.

The optimizers themselves are in `pathkernel.optimizers`; their names are forwarded, as this was their home once.
"""

from typing import TYPE_CHECKING

import pathkernel.optimizers as optimizers  # not from the face, which imports this
from pathkernel.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from pathkernel.dynamics import dirac_gan as dirac_gan
    from pathkernel.dynamics.adaptive_flows import adam_flow as adam_flow
    from pathkernel.dynamics.adaptive_flows import adam_settings as adam_settings
    from pathkernel.dynamics.adaptive_flows import rmsprop_flow as rmsprop_flow
    from pathkernel.dynamics.adaptive_flows import rmsprop_settings as rmsprop_settings
    from pathkernel.dynamics.clock import Clock as Clock
    from pathkernel.dynamics.finite_steps import Ledger as Ledger
    from pathkernel.dynamics.finite_steps import RegularizationLedger as RegularizationLedger
    from pathkernel.dynamics.finite_steps import regularization_ledger as regularization_ledger
    from pathkernel.dynamics.flow import Flow as Flow
    from pathkernel.dynamics.flow import FlowDistance as FlowDistance
    from pathkernel.dynamics.game import GameRecorder as GameRecorder
    from pathkernel.dynamics.gradient_flows import gradient_flow as gradient_flow
    from pathkernel.dynamics.gradient_flows import polyak_flow as polyak_flow
    from pathkernel.dynamics.gradient_flows import sign_flow as sign_flow
    from pathkernel.dynamics.gradient_flows import steepest_flow as steepest_flow
    from pathkernel.dynamics.local_stability import Stability as Stability
    from pathkernel.dynamics.local_stability import stability as stability
    from pathkernel.dynamics.loss_shares import LossLedger as LossLedger
    from pathkernel.dynamics.loss_shares import loss_ledger as loss_ledger
    from pathkernel.dynamics.modified_flows import modified_flow as modified_flow
    from pathkernel.dynamics.momentum_flows import EnergyLedger as EnergyLedger
    from pathkernel.dynamics.momentum_flows import body_of as body_of
    from pathkernel.dynamics.momentum_flows import energy_ledger as energy_ledger
    from pathkernel.dynamics.momentum_flows import momentum_at_rate as momentum_at_rate
    from pathkernel.dynamics.momentum_flows import momentum_flow as momentum_flow
    from pathkernel.dynamics.momentum_flows import nesterov_flow as nesterov_flow
    from pathkernel.dynamics.momentum_flows import nesterov_momentum as nesterov_momentum
    from pathkernel.dynamics.origins import Origins as Origins
    from pathkernel.dynamics.stochastic_flows import kramers as kramers
    from pathkernel.dynamics.stochastic_flows import langevin as langevin
    from pathkernel.optimizers import CoordinateDescent as CoordinateDescent
    from pathkernel.optimizers import CoordinateDescentRule as CoordinateDescentRule
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
    from pathkernel.optimizers import SpectralDescent as SpectralDescent
    from pathkernel.optimizers import SpectralDescentRule as SpectralDescentRule
    from pathkernel.optimizers import leapfrog as leapfrog

_HOMES = {
    "Clock": "dynamics.clock",
    "EnergyLedger": "dynamics.momentum_flows",
    "Flow": "dynamics.flow",
    "FlowDistance": "dynamics.flow",
    "GameRecorder": "dynamics.game",
    "Ledger": "dynamics.finite_steps",
    "LossLedger": "dynamics.loss_shares",
    "Origins": "dynamics.origins",
    "RegularizationLedger": "dynamics.finite_steps",
    "Stability": "dynamics.local_stability",
    "adam_flow": "dynamics.adaptive_flows",
    "adam_settings": "dynamics.adaptive_flows",
    "body_of": "dynamics.momentum_flows",
    "dirac_gan": "dynamics.dirac_gan:",
    "energy_ledger": "dynamics.momentum_flows",
    "gradient_flow": "dynamics.gradient_flows",
    "kramers": "dynamics.stochastic_flows",
    "langevin": "dynamics.stochastic_flows",
    "loss_ledger": "dynamics.loss_shares",
    "modified_flow": "dynamics.modified_flows",
    "momentum_at_rate": "dynamics.momentum_flows",
    "momentum_flow": "dynamics.momentum_flows",
    "nesterov_flow": "dynamics.momentum_flows",
    "nesterov_momentum": "dynamics.momentum_flows",
    "polyak_flow": "dynamics.gradient_flows",
    "regularization_ledger": "dynamics.finite_steps",
    "rmsprop_flow": "dynamics.adaptive_flows",
    "rmsprop_settings": "dynamics.adaptive_flows",
    "sign_flow": "dynamics.gradient_flows",
    "stability": "dynamics.local_stability",
    "steepest_flow": "dynamics.gradient_flows",
}

__all__ = sorted([*_HOMES, *optimizers.__all__])
if not TYPE_CHECKING:  # to which it would say that there is every name
    __getattr__, __dir__ = lazy_names(__name__, {**dict.fromkeys(optimizers.__all__, "optimizers"), **_HOMES})
