"""Labelled and unlabelled images from two loaders, each through the network by itself."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pathkernel.callbacks import LightningRecorder

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class SemiSupervised(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        (x, y), (u,) = batch["labelled"], batch["unlabelled"]
        entropy = torch.distributions.Categorical(logits=self(u)).entropy().mean()
        return F.cross_entropy(self(x), y) + 0.1 * entropy

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(steps):
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    labels = torch.tensor(labels)
    loaders = {
        "labelled": DataLoader(TensorDataset(images[:100], labels[:100]), batch_size=20, shuffle=True),
        "unlabelled": DataLoader(TensorDataset(images[100:400]), batch_size=30, shuffle=True),
    }
    module = SemiSupervised()
    trainer = L.Trainer(max_steps=steps, callbacks=[LightningRecorder(task="classification")], **QUIET)
    trainer.fit(module, loaders)
    return {module: images[400:404]}


if __name__ == "__main__":
    main(20)
