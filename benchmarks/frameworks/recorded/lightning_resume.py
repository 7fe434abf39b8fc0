"""A run that goes on from its checkpoint with another trainer and a new module."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pathkernel.callbacks import LightningRecorder

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Resumed(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps):
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    labels = torch.tensor(labels)
    loader = DataLoader(TensorDataset(images[:320], labels[:320]), batch_size=32, shuffle=True)
    first = L.Trainer(max_steps=steps // 2, callbacks=[LightningRecorder(store=True, task="classification")], **QUIET)
    first.fit(Resumed(), loader)
    first.save_checkpoint("half.ckpt")

    module = Resumed()
    second = L.Trainer(max_steps=steps, callbacks=[LightningRecorder(store=True, task="classification")], **QUIET)
    second.fit(module, loader, ckpt_path="half.ckpt")
    return {module.net: images[320:324]}


if __name__ == "__main__":
    main(20)
