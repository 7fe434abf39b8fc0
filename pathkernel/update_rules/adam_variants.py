"""Relatives of Adam: Adamax, NAdam and RAdam, with the denominator and the rates of each step frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pathkernel.update_rules.adam import decay_of_displacement, decay_of_gradient, decoupled_decay, step_count
from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule
from pathkernel.update_rules.sgd import coupled_decay, signed


class Adamax(UpdateRule):
    r"""`torch.optim.Adamax`: Adam with a running maximum u in place of the root of the second moment.

    .. math:: m^+ = \beta_1 m + (1 - \beta_1) g,\qquad \Delta = -\frac{\eta}{1 - \beta_1^t}\,\frac{m^+}{u^+},\qquad
              u^+ = \max(\beta_2 u,\ |g| + \epsilon)

    References
    ----------
    Kingma & Ba 2015 (1412.6980), Algorithm 2.
    """

    name = "Adamax"
    memory = ("exp_avg",)
    observes = Observes(after=("exp_inf",), numbers=("step",))

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The infinity norm u⁺ and the bias correction 1 − β₁ᵗ."""
        correction = 1 - float(settings["betas"][0]) ** step_count(observed, settings)
        return {"denominator": observed.after["exp_inf"].detach().clone(), "correction": float(correction)}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """First moment over the infinity norm."""
        beta = float(settings["betas"][0])
        moment = beta * memory[0] + (1 - beta) * signed(gradient, settings)
        return -float(settings["lr"]) / frozen["correction"] * moment / frozen["denominator"], (moment,)

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Coupled weight decay."""
        return coupled_decay(parameter, settings)


class NAdam(UpdateRule):
    r"""`torch.optim.NAdam`: Adam that looks ahead along its first moment.

    .. math:: m^+ = \beta_1 m + (1 - \beta_1) g,\qquad
              \Delta = -\eta\,\frac{1}{\sqrt{\hat v} + \epsilon}
              \Big(\frac{1 - \mu_t}{1 - \prod_{i \le t} \mu_i}\, g
              + \frac{\mu_{t+1}}{1 - \prod_{i \le t+1} \mu_i}\, m^+\Big),\qquad
              \mu_t = \beta_1 (1 - \tfrac12\, 0.96^{t \psi})

    with ψ the ``momentum_decay``.

    References
    ----------
    Dozat 2016, Incorporating Nesterov momentum into Adam.
    """

    name = "NAdam"
    memory = ("exp_avg",)
    observes = Observes(after=("exp_avg_sq",), numbers=("step", "mu_product"))

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The denominator √v̂ + ε, the weights of gradient and moment, and the decay."""
        t, decay = step_count(observed, settings), float(settings["momentum_decay"])
        beta1, beta2 = (float(beta) for beta in settings["betas"])
        now = beta1 * (1 - 0.5 * 0.96 ** (t * decay))
        following = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * decay))
        product = observed.after["mu_product"].item()
        return {
            "denominator": observed.after["exp_avg_sq"].div(float(1 - beta2**t)).sqrt_().add_(settings["eps"]),
            "gradient_weight": float((1 - now) / (1 - product)),
            "moment_weight": float(following / (1 - product * following)),
            "decay": decoupled_decay(observed, settings),
        }

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """Gradient and first moment, weighted, over the frozen denominator."""
        beta = float(settings["betas"][0])
        gradient = signed(gradient, settings)
        moment = beta * memory[0] + (1 - beta) * gradient
        direction = frozen["gradient_weight"] * gradient + frozen["moment_weight"] * moment
        return -float(settings["lr"]) * direction / frozen["denominator"], (moment,)

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Weight decay, unless it is decoupled."""
        return decay_of_gradient(parameter, settings)

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Weight decay, where it is decoupled."""
        return decay_of_displacement(parameter, frozen, settings)


class RAdam(UpdateRule):
    r"""`torch.optim.RAdam`: Adam that leaves out its denominator until the second moment can be trusted.

    .. math:: m^+ = \beta_1 m + (1 - \beta_1) g,\qquad \Delta = -\frac{\eta}{1 - \beta_1^t}\,\frac{m^+}{D},\qquad
              D = \frac{\sqrt{v} + \epsilon}{r_t \sqrt{1 - \beta_2^t}} \ \text{ if } \rho_t > 5, \text{ else } 1

    References
    ----------
    Liu et al. 2020 (1908.03265), Algorithm 2; ε as in torch.
    """

    name = "RAdam"
    memory = ("exp_avg",)
    observes = Observes(after=("exp_avg_sq",), numbers=("step",))

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """The denominator D (the number 1 in the early steps), the bias correction 1 − β₁ᵗ, and the decay."""
        t = step_count(observed, settings)
        beta1, beta2 = (float(beta) for beta in settings["betas"])
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * t * beta2**t / (1 - beta2**t)  # ρ_t, of the average that v amounts to
        denominator: Tensor | float = 1.0
        if length > 5.0:
            rectified = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            scale = float(rectified * (1 - beta2**t)) ** 0.5
            denominator = observed.after["exp_avg_sq"].sqrt().add_(settings["eps"]).div_(scale)
        correction = float(1 - beta1**t)
        return {"denominator": denominator, "correction": correction, "decay": decoupled_decay(observed, settings)}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """First moment over the frozen denominator."""
        beta = float(settings["betas"][0])
        moment = beta * memory[0] + (1 - beta) * signed(gradient, settings)
        return -float(settings["lr"]) / frozen["correction"] * moment / frozen["denominator"], (moment,)

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Weight decay, unless it is decoupled."""
        return decay_of_gradient(parameter, settings)

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Weight decay, where it is decoupled."""
        return decay_of_displacement(parameter, frozen, settings)
