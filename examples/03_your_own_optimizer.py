"""
Your own optimizer: a rule in a few lines
=========================================

A kernel machine needs to know how an optimizer turns gradients into displacement. For an optimizer of your own that is
one small function. Here Lion is written from its paper, with its rule; the rule is put to the proof, and then the
network that Lion trained is written as an exact sum over its training images.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import pathkernel as pk
from pathkernel.testing import UpdateRuleError, check_update_rule

# %%
# The optimizer
# -------------
# Lion (`Chen et al. 2023 <https://arxiv.org/abs/2302.06675>`_, Algorithm 2) moves every weight by the sign of a mixture
# of gradient and momentum, with decoupled weight decay:
#
# .. math:: c = \beta_1 m + (1 - \beta_1) g,\qquad \Delta = -\eta\,(\operatorname{sign} c + \lambda\theta),\qquad
#           m^+ = \beta_2 m + (1 - \beta_2) g .


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = beta1 * m + (1 - beta1) * p.grad
                p -= group["lr"] * (c.sign() + group["weight_decay"] * p)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


# %%
# Its rule
# --------
# A rule says what a step is *linear* in and what is *frozen*. The sign is not linear, but sign c = c / \|c\|, and once
# the size \|c\| of every entry is frozen, c / \|c\| is linear in gradient and momentum. ``frozen`` reads it off each
# step; there m is wanted as it was before the step, which ``keep_before`` asks for. Weight decay comes from no sample,
# so it is a source of its own.


class LionRule(pk.UpdateRule):
    name = "Lion"
    memory = ("m",)
    keep_before = ("m",)

    def frozen(self, observed, settings):
        m = observed.before.get("m", torch.zeros_like(observed.parameter))
        size = self.mixture(observed.gradient, m, settings["betas"][0]).abs()
        return {"inverse_size": torch.where(size == 0, 0, 1 / size)}

    def step(self, gradient, memory, frozen, settings):
        (m,), (beta1, beta2) = memory, settings["betas"]
        sign = self.mixture(gradient, m, beta1) * frozen["inverse_size"]
        return -settings["lr"] * sign, (self.mixture(gradient, m, beta2),)

    def displacement_sources(self, parameter, frozen, settings):
        return {"weight_decay": -settings["lr"] * settings["weight_decay"] * parameter}

    @staticmethod
    def mixture(gradient, m, beta):
        return beta * m + (1 - beta) * gradient


# %%
# The proof
# ---------
# ``check_update_rule`` trains a small network with the optimizer and compares: is ``step`` linear, is its adjoint
# right, is every step what the optimizer did, and do shares and channels add up? It says nothing where all is well …


def make_lion(parameters):
    return Lion(parameters, lr=0.005, weight_decay=0.1)


check_update_rule(LionRule(), make_lion)

# %%
# … and where it is not, it says at which step, for which parameter, and by how much. Without the weight decay:


class Forgetful(LionRule):
    def displacement_sources(self, parameter, frozen, settings):
        return {}


try:
    check_update_rule(Forgetful(), make_lion)
    refused = ""
except UpdateRuleError as error:
    refused = str(error)
print(refused)

# %%
# A network trained by it
# -----------------------
# The rule is passed to the recorder; all else is an ordinary loop.

torch.manual_seed(0)
X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    torch.tensor(X / 16, dtype=torch.float64), torch.tensor(y), train_size=300, test_size=100, random_state=0
)
model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
optimizer, loss = Lion(model.parameters(), lr=3e-3, weight_decay=0.1), nn.CrossEntropyLoss()

with pk.KernelRecorder(model, optimizer, loss, data=(X_train, y_train), rule=LionRule()) as recorder:
    for _ in range(20):
        for x, target in recorder.batches(batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()

# %%
# The network as a kernel machine
# -------------------------------
# It reproduces the network, and tells who pushed.

machine = pk.KernelMachine(recorder.trajectory)
with torch.no_grad():
    network_says = model(X_test).numpy()
difference = abs(machine.decision_function(X_test) - network_says).max()
accuracy = (machine.predict(X_test) == y_test.numpy()).mean()
print(f"accuracy {accuracy:.2f}; kernel machine and network differ by at most {difference:.0e}")

why = machine.explain(X_test[:3])
ranking = why.top(3)
for q, digit in enumerate(why.output_index):
    pushed = ", ".join(f"#{i}, a {y_train[i]}" for i in ranking.proponents[q])
    print(
        f"test digit {q}: {digit} by {pushed}; initially {why.channels['initial'][q]:+.3f}, samples "
        f"{why.shares[q].sum():+.3f}, weight decay {why.channels['weight_decay'][q]:+.3f}, network {why.output[q]:+.3f}"
    )
print(f"left over: {why.relative_residual:.0e} of how far the scores moved")

# %%
# Checks
# ------

assert "Forgetful" in refused
assert difference < 1e-10
assert why.relative_residual < 1e-12
assert accuracy > 0.85

# %%
# Optimizers that evaluate the gradient somewhere else than at the weights themselves, such as Nesterov's true
# look-ahead, say where by ``stage_offsets``; those that evaluate it several times in a step, such as Runge–Kutta
# methods, have several ``stages``. ``pathkernel.optimizers`` holds both kinds to copy from.
