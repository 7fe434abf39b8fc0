"""Early stopping, and the best checkpoint loaded when training has ended."""

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pathkernel.callbacks import LightningRecorder

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Stopped(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def main(steps):
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    labels = torch.tensor(labels)
    noisy = torch.where(torch.rand(240) < 0.5, torch.randint(10, (240,)), labels[:240])
    train = DataLoader(TensorDataset(images[:240], noisy), batch_size=24, shuffle=True)
    validation = DataLoader(TensorDataset(images[240:320], labels[240:320]), batch_size=80)
    module = Stopped()
    best = ModelCheckpoint(monitor="val_loss")
    callbacks = [EarlyStopping("val_loss", patience=1), best]
    callbacks.append(LightningRecorder(task="classification"))
    trainer = L.Trainer(max_steps=steps, callbacks=callbacks, **QUIET)
    trainer.fit(module, train, validation)
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    return {module: images[320:324]}


if __name__ == "__main__":
    main(20)
