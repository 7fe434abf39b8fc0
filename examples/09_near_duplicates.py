"""
Near-duplicates, and test samples that leaked
=============================================

Samples that are there twice count twice, and a test sample with a copy in training tests nothing.
`pathkernel.influence.near_duplicates` finds them under a kernel: the cosine of two samples as the network sees them
along its training. Here copies with a little noise are planted, one of them with another label.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import pathkernel as pk
from pathkernel.influence import near_duplicates
from pathkernel.plotting import NearDuplicatesDisplay

# %%
# Digits, some of them twice
# --------------------------
# Training: 380 digits, and 20 copies with noise of 2 % of the range of the pixels. Test: 190 digits that training has
# not seen, and 10 copies of such as it has: 5 % are leaked.

generator = np.random.default_rng(0)
X, y = load_digits(return_X_y=True)
order = generator.permutation(len(X))
X, y = X[order] / 16, y[order]


def copied(rows):
    return np.clip(rows + 0.02 * generator.standard_normal(rows.shape), 0, 1)


twice, leaked = generator.permutation(380)[:20], generator.permutation(380)[:10]
X_train = torch.tensor(np.concatenate([X[:380], copied(X[twice])]), dtype=torch.float32)
y_train = torch.tensor(np.concatenate([y[:380], y[twice]]))
y_train[380] = (y_train[380] + 1) % 10  # the first copy has another label
X_test = torch.tensor(np.concatenate([copied(X[leaked]), X[400:590]]), dtype=torch.float32)

# %%
# Train, recorded
# ---------------

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer, loss = torch.optim.AdamW(model.parameters(), lr=3e-3), nn.CrossEntropyLoss()
with pk.KernelRecorder(model, optimizer, loss, data=(X_train, y_train)) as recorder:
    for _ in range(12):
        for x, target in recorder.batches(batch_size=50, shuffle=True):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
kernel = pk.PathKernel(recorder.trajectory, steps=4)

# %%
# Within the training samples
# ---------------------------
# No threshold on the cosine is chosen: a pair counts where its samples are nearer to each other than the distance of
# the next neighbour makes likely by chance.

found = near_duplicates(kernel, X_train, labels=y_train)
print(found)
conflicts = [f"{i} ({y_train[i]}) and {j} ({y_train[j]})" for i, j in found.pairs[found.conflicts]]
print(f"labels disagree: {', '.join(conflicts)}")
print(f"leave out {found.redundant.tolist()}")
NearDuplicatesDisplay.from_near_duplicates(found, X_train.reshape(-1, 8, 8), k=20).plot()

# %%
# Between training and test
# -------------------------

across = near_duplicates(kernel, X_train, X_test)
print(across)
print(f"{len(across.redundant)} of {len(X_test)} test samples have a near-duplicate in training")

# %%
# How near is near?
# -----------------
# What a network takes for the same need not be the same pixels, and the other way round. Any kernel will do; under
# that of the pixels themselves, copies with so little noise are easier to find.

print(
    f"path kernel: cosines of {found.cosine.min():.4f} or more in pairs, {found.next_cosine.max():.4f} at most beside"
)


def pixels(A, B=None):
    return np.asarray(A) @ np.asarray(A if B is None else B).T


by_pixels, across_pixels = near_duplicates(pixels, X_train), near_duplicates(pixels, X_train, X_test)

# %%
# Checks
# ------

planted = {(int(i), 380 + j) for j, i in enumerate(twice)}
for name, one, other in (("path kernel", found, across), ("pixels", by_pixels, across_pixels)):
    pairs, leaks = set(map(tuple, one.pairs.tolist())), set(other.redundant.tolist())
    hits, leaked_hits = len(planted & pairs), len(leaks & set(range(10)))
    print(f"{name}: {hits} of 20 copies and {leaked_hits} of 10 leaked samples found, and besides "
          f"{len(pairs) - hits} pairs and {len(leaks) - leaked_hits} test samples")  # fmt: skip
    assert hits >= 16 and leaked_hits >= 8
    assert len(pairs) - hits <= 2 and len(leaks) - leaked_hits <= 2
assert [int(twice[0]), 380] in found.pairs[found.conflicts].tolist()
