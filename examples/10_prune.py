"""
Prune a training set: which samples can be left out
===================================================

Many training samples teach a network what others have taught it already. `pathkernel.influence.prune` chooses, from one
recorded run, a part of them whose gradients have nearly the same mean along the path as those of all, and training
again on that part alone shows what was lost.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import pathkernel as pk

# %%
# One run on everything, on record
# --------------------------------
# 400 handwritten digits to train on; the others are for testing alone.

X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y), train_size=400, random_state=0
)
loss = nn.CrossEntropyLoss()


def network_and_optimizer(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


model, optimizer = network_and_optimizer(0)
with pk.KernelRecorder(model, optimizer, loss, data=(X_train, y_train)) as recorder:
    for _ in range(30):
        for x, target in recorder.batches(batch_size=50, shuffle=True):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()

# %%
# A fifth of it
# -------------
# ``ids`` are in the order in which they were chosen; ``left_out`` begins with those that are least missed.

kept = pk.influence.prune(recorder.trajectory, keep=0.2)
print(kept)
print("of each digit:", np.bincount(y_train[kept.ids], minlength=10))

# %%
# Train again
# -----------
# Three networks from fresh starts on what was kept, three on as many digits at random, each for as many steps as the
# run above took. Nothing is recorded here.


def accuracy(ids, seed):
    model, optimizer = network_and_optimizer(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(240):
        batch = ids[torch.randperm(len(ids), generator=generator)[:50]]
        optimizer.zero_grad()
        loss(model(X_train[batch]), y_train[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(X_test).argmax(dim=1) == y_test).double().mean().item()


chosen, drawn = [], []
for seed in range(1, 4):
    chosen.append(accuracy(torch.from_numpy(kept.ids), seed))
    drawn.append(accuracy(torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:80], seed))
whole = accuracy(torch.arange(400), 1)
print(f"accuracy with all 400 digits {whole:.3f}, with the 80 that were kept {np.mean(chosen):.3f}")
print(f"with 80 at random {np.mean(drawn):.3f}, from {min(drawn):.3f} to {max(drawn):.3f}")

# %%
# A harder question
# -----------------
# What would *this* run have become without the others, from its own start and in its own order? `Trajectory.retrain`
# trains it again with the weight 0 for what is left out.

theta = recorder.trajectory.retrain(torch.from_numpy(kept.weights)[None])[0]
without, _ = network_and_optimizer(0)
torch.nn.utils.vector_to_parameters(theta, without.parameters())
with torch.no_grad():
    in_place = (without(X_test).argmax(dim=1) == y_test).double().mean().item()
print(f"the recorded run with those 80 alone: {in_place:.3f}")

# %%
# Checks
# ------

assert len(kept) == 80 and len(set(kept.ids) | set(kept.left_out)) == 400
assert (np.bincount(y_train[kept.ids], minlength=10) > 0).all()
assert np.mean(chosen) > np.mean(drawn) + 0.02
