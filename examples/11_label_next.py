"""
What to label next: candidates without labels
=============================================

Labels are dear, and candidates are many: frames of a film, or products that were photographed several times.
`pathkernel.influence.label_next` chooses which of them to label, from one recorded run on those that have a label, so
that the network is not sure of them and none of them says what another says as well.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import pathkernel as pk

# %%
# Few labels, many candidates
# ---------------------------
# 50 digits have a label. Of another 200 there are four photographs each, which differ by a little noise.

X, y = load_digits(return_X_y=True)
X, y = torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y)
X_pool, X_test, y_pool, y_test = train_test_split(X, y, train_size=250, random_state=0)
X_first, y_first = X_pool[:50], y_pool[:50]
noise = 0.01 * torch.randn(800, 64, generator=torch.Generator().manual_seed(0))
candidates, their_labels = X_pool[50:].repeat(4, 1) + noise, y_pool[50:].repeat(4)

loss = nn.CrossEntropyLoss()


def trained(X, y, seed):
    """A network trained on record."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(100):
            x, target = recorder.announce(torch.randint(len(X), (50,)))
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    return recorder.trajectory


def accuracy(trajectory):
    with torch.no_grad():
        return (trajectory.model(X_test).argmax(dim=1) == y_test).double().mean().item()


start = trained(X_first, y_first, seed=0)

# %%
# Fifty of them
# -------------
# By experimental design on the path kernel, by the smallest margins, and at random. How many *different* digits are
# among them?

chosen = {
    name: pk.influence.label_next(start, candidates, count=50, criterion=name).ids
    for name in ("experimental_design", "margin")
}
chosen["random"] = np.random.default_rng(0).permutation(800)[:50]
different = {name: len(np.unique(ids % 200)) for name, ids in chosen.items()}
print(", ".join(f"{name}: {count} different digits" for name, count in different.items()))

# %%
# Ask for their labels, and train again
# -------------------------------------
# A random choice has few copies, too, but many digits that the network knows already.

print(f"accuracy with 50 labels {accuracy(start):.3f}")
reached = {}
for name, ids in chosen.items():
    labelled = torch.cat([X_first, candidates[ids]]), torch.cat([y_first, their_labels[ids]])
    reached[name] = np.mean([accuracy(trained(*labelled, seed)) for seed in range(1, 3)])
    print(f"with 50 more, by {name}: {reached[name]:.3f}")

# %%
# Checks
# ------

assert different["experimental_design"] > 40 and different["margin"] < 30
assert reached["experimental_design"] > reached["margin"] + 0.02
