"""
Regression: ridge, Gaussian process and the network itself
==========================================================

A network learns the progression of diabetes from ten measurements. Its path kernel then serves kernel ridge regression
and a Gaussian process with an error bar, and `pathkernel.KernelMachine` writes the network's own predictions as sums
over patients.
"""

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from torch import nn

import pathkernel as pk

# %%
# Data and network
# ----------------
# Everything in units of standard deviations of the training set.

torch.manual_seed(0)
X, y = load_diabetes(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=100, random_state=0)
center, scale = X_train.mean(axis=0), X_train.std(axis=0)
X_train, X_test = (X_train - center) / scale, (X_test - center) / scale
center, scale = y_train.mean(), y_train.std()
y_train, y_test = (y_train - center) / scale, (y_test - center) / scale

model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)
loss = nn.MSELoss()

# %%
# Training, watched
# -----------------

with pk.KernelRecorder(model, optimizer, loss, data=(X_train, y_train[:, None])) as recorder:
    for _ in range(10):
        for x, target in recorder.batches(batch_size=32, shuffle=True):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
trajectory = recorder.trajectory
kernel = pk.PathKernel(trajectory, steps=20)
print(kernel)

# %%
# Kernel ridge regression
# -----------------------
# ``KernelRidge`` would call a kernel pair by pair; `pathkernel.PathKernelTransformer` hands it whole matrices instead.
# Divided by the mean of the diagonal, the ridge is a ratio of noise to signal.

gram_scale = kernel.diagonal(X_train).mean()
ridge = make_pipeline(pk.PathKernelTransformer(kernel), KernelRidge(kernel="precomputed", alpha=0.1 * gram_scale))
ridge.fit(X_train, y_train)

# %%
# A Gaussian process
# ------------------
# The same kernel as covariance, with scale and noise found by maximum likelihood, gives an error bar for each patient.
# The kernel has already seen the training targets (the path depends on them), so this likelihood is an optimistic one:
# believe the test set.

covariance = pk.GaussianProcessKernel(kernel, scale=1 / gram_scale) + WhiteKernel(0.5)
process = GaussianProcessRegressor(covariance).fit(X_train, y_train)
mean, deviation = process.predict(X_test, return_std=True)
inside = np.mean(np.abs(y_test - mean) < 2 * deviation)
print(f"scale {process.kernel_.k1.scale:.3g}, noise variance {process.kernel_.k2.noise_level:.2f}")
print(f"{inside:.0%} of the test patients lie within two standard deviations")

# %%
# The network itself
# ------------------
# The kernel machine is no fourth model. It is the network, written as a sum over 342 patients.

machine = pk.KernelMachine(trajectory)
with torch.no_grad():
    network_says = model(torch.from_numpy(X_test))[:, 0].numpy()
machine_says = machine.predict(X_test)

scores = {
    "network": r2_score(y_test, network_says),
    "kernel machine": r2_score(y_test, machine_says),
    "kernel ridge": r2_score(y_test, ridge.predict(X_test)),
    "Gaussian process": r2_score(y_test, mean),
}
for name, score in scores.items():
    print(f"{name:<17} R² {score:.3f} on the test set")

# %%
# Which patients made this prediction?
# ------------------------------------
# The three test patients whom the network gives the strongest progression.

strongest = np.argsort(-network_says)[:3]
why = machine.explain(X_test[strongest])
print(why)
print(why.top(3))

# %%
# Checks
# ------

assert np.abs(machine_says - network_says).max() < 1e-12
assert why.residual.max() < 1e-12
assert min(scores.values()) > 0.25
assert 0.85 < inside <= 1
