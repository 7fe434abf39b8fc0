"""Accumulated and clipped gradients, OneCycle by steps, workers, a part of the data for validation."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from pathkernel.callbacks import LightningRecorder

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Wide(L.LightningModule):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=self.steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(steps):
    L.seed_everything(0, workers=True)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    labels = torch.tensor(labels)
    train, held_out = random_split(TensorDataset(images[:440], labels[:440]), [400, 40])
    loader = DataLoader(train, batch_size=16, shuffle=True, num_workers=1, persistent_workers=True)
    module = Wide(steps)
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, **QUIET}
    trainer = L.Trainer(max_steps=steps, callbacks=[LightningRecorder(task="classification")], **options)
    trainer.fit(module, loader, DataLoader(held_out, batch_size=40))
    return {module.net: images[440:444]}


if __name__ == "__main__":
    main(20)
