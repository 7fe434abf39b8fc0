"""
Optimizers as dynamics: flows, finite steps and ledgers
=======================================================

Gradient descent is Euler's method for gradient flow. Here a small network on handwritten digits follows that flow
itself, and a recorded run beside it; then finite steps, momentum and other norms each get what they follow, and the
run's ledgers say what its loss owes to them.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import pathkernel as pk
from pathkernel import dynamics
from pathkernel.optimizers import leapfrog
from pathkernel.plotting import EnergyDisplay, FlowDisplay, LossLedgerDisplay, RegularizationDisplay

X, y = load_digits(return_X_y=True)
X, y = torch.tensor(X[:150] / 16.0), torch.tensor(y[:150])
loss = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()


def record(make, steps, batch_size=150):
    model = network()
    optimizer = make(model.parameters())
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(steps):
            for x, target in recorder.batches(batch_size=batch_size):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    return recorder.trajectory


# %%
# The flow, and runs beside it
# ----------------------------
# ``gradient_flow`` starts where the model stands and leaves it there. The runs come nearer in proportion to their
# rate: order 1, and so does their path kernel, whose limit is Domingos' object.

flow = dynamics.gradient_flow(network(), loss, (X, y), time=10.0, points=33)
print(flow)
K = flow.path_kernel(X[:20])
runs, distances, kernels = {}, [], []
for rate in (1.0, 0.5):
    run = runs[rate] = record(lambda p, rate=rate: torch.optim.SGD(p, lr=rate), steps=round(10 / rate))
    distances.append(flow.distance(run).relative)
    kernels.append(np.linalg.norm(pk.PathKernel(run)(X[:20]) - K) / np.linalg.norm(K))
    print(f"rate {rate}: at most {distances[-1]:.2%} of the way off the flow, path kernel {kernels[-1]:.2%} off")
FlowDisplay.from_flow(flow, run).plot()

# %%
# Momentum is a body with friction
# --------------------------------
# Its energy, the loss included, goes to friction. ``leapfrog`` gives the rate and momentum that follow it.

rolling = dynamics.momentum_flow(network(), loss, (X, y), time=8.0, friction=0.5, points=33)
energies = dynamics.energy_ledger(rolling)
ball = record(lambda p: torch.optim.SGD(p, **leapfrog(time_step=0.2, friction=0.5)), steps=40)
print(f"energy is kept to {energies.residual:.0e}; a heavy ball is {rolling.distance(ball).relative:.2%} off its flow")
EnergyDisplay(energies).plot()

# %%
# Other norms
# -----------
# Steepest descent in a norm lowers the loss at the rate of the dual norm of its gradient. In the spectral norm it is
# Muon without momentum.

for norm in ("l2", "linf", "l1", "spectral"):
    own = dynamics.steepest_flow(network(), loss, (X, y), norm=norm, times=[0, 1e-4, 2e-4], method="rk4")
    measured, expected = (own.losses[2] - own.losses[0]) / 2e-4, own.system.slope(own.theta[1])
    print(f"{norm:8}: dL/dt = {measured:.6f}, minus the dual norm of the gradient {expected:.6f}")
    assert abs(measured / expected - 1) < 1e-6

# %%
# Finite steps
# ------------
# A run follows, to second order, the flow of the loss plus (γ/4) times its squared gradient.

rate = 0.5
modified = dynamics.modified_flow(network(), loss, (X, y), time=10.0, lr=rate, points=33)
off_plain, off_modified = flow.distance(run).relative, modified.distance(run).relative
print(f"the run at rate {rate}: {off_plain:.2%} off gradient flow, {off_modified:.3%} off the modified flow")

# %%
# In a recorded run that is a ledger: what the gradient of the loss did to loss and outputs, and what finite steps
# added. What is left is of third order in a step, so that it falls by four when the rate is halved.

ledgers = {rate: dynamics.regularization_ledger(run, X[:3]) for rate, run in runs.items()}
for rate, ledger in ledgers.items():
    print(f"rate {rate}: {ledger}; of the outputs {ledger.outputs.relative_remainder:.2%} are left")
RegularizationDisplay(ledgers[1.0]).plot()

# %%
# Who lowered the loss?
# ---------------------
# The kernel machine's shares of all samples in all losses, added up: exact for every optimizer.

account = dynamics.loss_ledger(record(lambda p: torch.optim.Adam(p, lr=0.01), steps=3, batch_size=30))
print(account)
LossLedgerDisplay(account).plot()

# %%
# Checks
# ------

assert 1.5 < distances[0] / distances[1] < 2.8  # order 1
assert 1.5 < kernels[0] / kernels[1] < 2.8
assert energies.residual < 1e-6
assert off_modified < off_plain / 5
for ledger in ledgers.values():
    assert abs(float(ledger.loss.remainder)) < abs(float(ledger.loss.parts["regularization"]))
left = {rate: np.linalg.norm(ledger.outputs.remainder) for rate, ledger in ledgers.items()}
assert 3 < left[1.0] / left[0.5] < 7  # order 2 over a run
assert account.residual < 1e-10
