"""
Which labels are wrong?
=======================

A network learns wrong labels by heart, and the better it has learnt them, the less its loss says about them. While it
learnt, it said more: `pathkernel.label_quality` averages along the recorded path. Here 50 of 500 handwritten
digits have a wrong label.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import pathkernel as pk
from pathkernel.plotting import DoubtfulLabelsDisplay

# %%
# Digits, some of them with the label of the next class
# -----------------------------------------------------

generator = torch.Generator().manual_seed(0)
X, truth = load_digits(return_X_y=True)
X, truth = torch.tensor(X[:500] / 16, dtype=torch.float32), torch.tensor(truth[:500])
wrong = torch.zeros(500, dtype=torch.bool)
wrong[torch.randperm(500, generator=generator)[:50]] = True
y = torch.where(wrong, (truth + 1) % 10, truth)

# %%
# Train as always, recorded
# -------------------------

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer, loss = torch.optim.AdamW(model.parameters(), lr=5e-3), nn.CrossEntropyLoss()
with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    for _ in range(25):
        for x, target in recorder.batches(batch_size=50, shuffle=True):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
trajectory = recorder.trajectory

# %%
# The ranking
# -----------
# Two averages along the path: the margin of each label, and the squared length of the gradient of each sample's loss.

quality = pk.label_quality(trajectory)
doubtful = quality.top(50)
found = wrong[doubtful.copy()].float().mean().item()
by_loss = wrong[np.argsort(-quality.final_loss)[:50].copy()].float().mean().item()
area, loss_area = roc_auc_score(wrong, quality.score), roc_auc_score(wrong, quality.final_loss)
learnt = (quality.predictions == quality.targets).mean()
print(f"The network reproduces {learnt:.0%} of the labels, wrong ones among them.")
print(f"Of the first 50 in the ranking {found:.0%} are wrong (area under the ROC curve {area:.3f});")
print(f"by the loss of the trained network it would be {by_loss:.0%} ({loss_area:.3f}).")

# %%
# The reasons
# -----------
# Which samples lowered the margin of a doubtful label most? The kernel machine's shares say it, exactly: mostly digits
# of the class that it really is.

first = doubtful[:3].copy()
why = pk.KernelMachine(trajectory).explain((X[first], y[first]), outputs="margin")
against = [[int(i) for i in np.argsort(row) if i != sample][:4] for sample, row in zip(first, why.shares, strict=True)]
for sample, others in zip(first, against, strict=True):
    named = ", ".join(f"#{i} (a {y[i]})" for i in others)
    print(f"#{sample} is labelled {y[sample]}, in truth {truth[sample]}; pulled the other way by {named}")
DoubtfulLabelsDisplay.from_quality(quality, X.reshape(-1, 8, 8), against=against, k=3).plot()

# %%
# From a run on disk, the same is one command: ``pathkernel labels runs/digits --model train.py:make_model
# --data train.npz --picture doubtful.png``.

# %%
# Checks
# ------

of_the_true_class = np.mean([(y[others] == truth[i]).float().mean() for i, others in zip(first, against, strict=True)])
print(f"{of_the_true_class:.0%} of these samples have the label that would be right")
assert found > 0.7 and found > by_loss
assert area > 0.95 and area > loss_area
assert wrong[first].all() and of_the_true_class > 0.5
assert np.abs(why.residual).max() < 1e-4  # float32: rounding of the recorded steps
