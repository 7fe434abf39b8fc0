"""Manual optimization: SGD for the backbone and AdamW for the head, each with a schedule; no forward."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pathkernel.callbacks import LightningRecorder

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class FineTuned(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        backbone, head = self.optimizers()
        loss = F.cross_entropy(self.net(x), y, label_smoothing=0.1)
        backbone.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(backbone, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        backbone.step()
        head.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        backbone = torch.optim.SGD(self.net[:3].parameters(), lr=0.05, momentum=0.9, nesterov=True)
        head = torch.optim.AdamW(self.net[3].parameters(), lr=3e-3)
        return [backbone, head], [torch.optim.lr_scheduler.ExponentialLR(one, 0.97) for one in (backbone, head)]


def main(steps):
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    labels = torch.tensor(labels)
    loader = DataLoader(TensorDataset(images[:400], labels[:400]), batch_size=40, shuffle=True)
    module = FineTuned()
    trainer = L.Trainer(max_steps=2 * steps, callbacks=[LightningRecorder(task="classification")], **QUIET)
    trainer.fit(module, loader)
    return {module.net: images[400:404]}


if __name__ == "__main__":
    main(20)
