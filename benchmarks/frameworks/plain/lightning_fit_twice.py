"""Trainer.fit called twice: a second round with another trainer."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Again(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(steps):
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    labels = torch.tensor(labels)
    loader = DataLoader(TensorDataset(images[:320], labels[:320]), batch_size=32, shuffle=True)
    module = Again()
    options = dict(QUIET)
    L.Trainer(max_steps=steps // 2, **options).fit(module, loader)
    L.Trainer(max_steps=steps - steps // 2, **options).fit(module, loader)
    return {module.net: images[320:324]}


if __name__ == "__main__":
    main(20)
