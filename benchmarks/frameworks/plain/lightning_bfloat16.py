"""Mixed precision in bfloat16."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class Mixed(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(steps):
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32)
    labels = torch.tensor(labels)
    loader = DataLoader(TensorDataset(images[:320], labels[:320]), batch_size=32, shuffle=True)
    module = Mixed()
    options = {"precision": "bf16-mixed", **QUIET}
    trainer = L.Trainer(max_steps=steps, **options)
    trainer.fit(module, loader)
    return {module: images[320:324]}


if __name__ == "__main__":
    main(20)
