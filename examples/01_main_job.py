"""
The main job: from a training loop to who said what
===================================================

Train a small network on handwritten digits while `pathkernel.KernelRecorder` watches. From the recorded path make a
kernel for scikit-learn's support vector machine, and write the network itself as an exact sum over its training images.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import nn

import pathkernel as pk

# %%
# A network and some data
# -----------------------
# 300 digits of 8 × 8 pixels to train on, 100 to ask about.

torch.manual_seed(0)
X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y), train_size=300, test_size=100, random_state=0
)

model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loss = nn.CrossEntropyLoss()

# %%
# Watch an ordinary training loop
# -------------------------------
# The recorder hangs on the optimizer's own hooks. All it asks of the loop is that the ids of the samples travel with
# the batch, which ``recorder.batches`` sees to.

with pk.KernelRecorder(model, optimizer, loss, data=(X_train, y_train)) as recorder:
    for _ in range(20):
        for x, target in recorder.batches(batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
trajectory = recorder.trajectory
print(trajectory)

# %%
# The path kernel in a support vector machine
# -------------------------------------------
# Symmetric and positive semi-definite, so that it fits wherever scikit-learn takes a callable kernel. ``steps=20``
# represents the path by 20 of its steps, each by its two ends.

kernel = pk.PathKernel(trajectory, steps=20)
svc = SVC(kernel=kernel).fit(X_train, y_train)
svc_accuracy = svc.score(X_test, y_test)

with torch.no_grad():
    network_says = model(X_test).argmax(dim=1)
network_accuracy = (network_says == y_test).double().mean().item()
print(f"accuracy of the network {network_accuracy:.2f}, of the SVM on its path kernel {svc_accuracy:.2f}")

# %%
# The network as a kernel machine
# -------------------------------
# Not another classifier but the same one: what it predicts is put together from what the training samples did in each
# step, and comes out as the network says it.

machine = pk.KernelMachine(trajectory)
machine_says = machine.predict(X_test)
print(f"kernel machine and network agree on {(machine_says == network_says.numpy()).mean():.0%} of the test digits")

# %%
# Who pushed?
# -----------
# For each of three test digits: how the score of the predicted class came about. A positive share raised it.

why = machine.explain(X_test[:3])
ranking = why.top(3)
for q, digit in enumerate(why.output_index):
    print(f"\ntest digit {q}: the network says {digit} (true: {y_test[q]}), score {why.output[q]:+.2f}")
    for verb, ids, shares in (
        ("raised by ", ranking.proponents[q], ranking.proponent_shares[q]),
        ("lowered by", ranking.opponents[q], ranking.opponent_shares[q]),
    ):
        pushed = ", ".join(f"#{i}, a {y_train[i]} ({share:+.2f})" for i, share in zip(ids, shares, strict=True))
        print(f"  {verb} {pushed}")

# %%
# The account, and its certificate
# --------------------------------
# What the untrained network said, plus all shares, plus weight decay, is what it says now. ``residual`` tells whether
# that sum is right, ``quadrature_error`` how well the steps were followed. How far shares may be off is measured where
# it is asked for: ``machine.explain(X, verify="shares").shares_error``.

for q in range(3):
    parts = ", ".join(f"{name.replace('_', ' ')} {value[q]:+.3f}" for name, value in why.channels.items())
    print(
        f"test digit {q}: {parts}, training samples {why.shares[q].sum():+.3f}; sum {why.reconstruction[q]:+.4f}, "
        f"network {why.output[q]:+.4f}, residual {why.residual[q]:.0e}, quadrature error {why.quadrature_error[q]:.0e}"
    )

# %%
# Checks
# ------

assert (machine_says == network_says.numpy()).all()
assert why.residual.max() < 1e-5  # float32: rounding of the recorded steps
assert network_accuracy > 0.85
assert svc_accuracy > 0.85
# The strongest push came from the same digit.
assert (y_train.numpy()[ranking.proponents[:, 0]] == why.output_index).all()
