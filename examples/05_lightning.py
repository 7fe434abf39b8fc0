"""
Lightning: a callback, and which digits taught the network
==========================================================

A network is trained by a Lightning trainer as always. One callback records it, and afterwards the trained network is a
kernel machine: each of its answers is a sum over the training images.
"""

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk

# %%
# A module, as people write them
# ------------------------------


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, target = batch
        return F.cross_entropy(self(x), target)

    def validation_step(self, batch, batch_idx):
        x, target = batch
        self.log("accuracy", (self(x).argmax(1) == target).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)]


images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = (TensorDataset(images[part], labels[part]) for part in order[:800].split([600, 200]))
settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
settings |= {"enable_progress_bar": False, "enable_model_summary": False}


def fit(callbacks):
    L.seed_everything(0)
    module = Digits()
    trainer = L.Trainer(max_epochs=6, callbacks=callbacks, gradient_clip_val=1.0, **settings)
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=200))
    return module.eval(), float(trainer.callback_metrics["accuracy"])


# %%
# One callback
# ------------
# Ids are places in ``train``; they travel with the shuffled batches.

callback = pk.callbacks.LightningRecorder(task="classification")
module, accuracy = fit([callback])
print(callback.trajectory)
print(f"accuracy on {len(test)} test images: {accuracy:.3f}")

# %%
# Which training images made these answers?
# -----------------------------------------
# The four test images of which the network is least sure, each with those that spoke most for its answer.

queries, truth = test.tensors
with torch.no_grad():
    outputs = module(queries)
unsure = outputs.softmax(1).max(1).values.argsort()[:4]
why = callback.machine.explain(queries[unsure])
print(why)

figure, rows = plt.subplots(4, 6, figsize=(6, 4.5), squeeze=False)
for row, query, shares in zip(rows, unsure, why.shares, strict=True):
    answer = int(outputs[query].argmax())
    best = np.argsort(-shares)[:5]
    pictures = [(queries[query], f"{int(truth[query])}? says {answer}")]
    pictures += [(train[i][0], f"{int(train[i][1])}: {shares[i]:+.2f}") for i in best]
    for axes, (picture, title) in zip(row, pictures, strict=True):
        axes.imshow(picture.view(8, 8), cmap="gray_r")
        axes.set_title(title, fontsize=7)
        axes.axis("off")
figure.tight_layout()

# %%
# Checks
# ------
# The machine is the network, and training was what it would have been.

machine_says = callback.machine(queries)
largest = np.abs(why.output).max()
residual = np.abs(why.left_over).max() / largest
print(f"largest difference between machine and network: {np.abs(machine_says - outputs.numpy()).max():.1e}")
print(f"residual {residual:.1e}, error of the split {why.split_error:.1e}, relative to the outputs")
plain, _ = fit([])

assert np.abs(machine_says - outputs.numpy()).max() < 1e-4
assert residual < 1e-5
assert why.split_error < 1e-5
assert accuracy > 0.85
assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
