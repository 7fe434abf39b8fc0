"""Lightning's first example: encoder and decoder, called one after the other.

https://lightning.ai/docs/pytorch/stable/starter/introduction.html
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pathkernel.callbacks import LightningRecorder

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


class LitAutoEncoder(L.LightningModule):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        z = self.encoder(x)
        x_hat = self.decoder(z)
        loss = nn.functional.mse_loss(x_hat, x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(steps):
    L.seed_everything(0)
    encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    decoder = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 64))
    autoencoder = LitAutoEncoder(encoder, decoder)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(labels)
    train_loader = DataLoader(TensorDataset(images[:400], labels[:400]), batch_size=32, shuffle=True)
    recorder = LightningRecorder(watch=("encoder", "decoder"), task="regression")
    trainer = L.Trainer(max_steps=steps, callbacks=[recorder], **QUIET)
    trainer.fit(model=autoencoder, train_dataloaders=train_loader)
    return {autoencoder: images[400:404].flatten(1)}


if __name__ == "__main__":
    main(20)
