"""Fabric in mixed precision, with gradients that are accumulated and clipped, and a checkpoint that is loaded.

https://lightning.ai/docs/fabric/stable/advanced/gradient_accumulation.html
"""

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk


def main(steps):
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    images, labels = load_digits(return_X_y=True)
    X, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    dataset = TensorDataset(X[:256], y[:256])
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    dataloader = fabric.setup_dataloaders(DataLoader(dataset, batch_size=16, shuffle=True))
    accumulate, iteration = 4, 0
    with pk.KernelRecorder(model, optimizer, nn.CrossEntropyLoss(), data=dataset) as recorder:
        while iteration < accumulate * steps:
            for input, target in recorder.track(dataloader):
                iteration += 1
                is_accumulating = iteration % accumulate != 0
                with fabric.no_backward_sync(model, enabled=is_accumulating):
                    loss = nn.functional.cross_entropy(model(input), target) / accumulate
                    fabric.backward(loss)
                if not is_accumulating:
                    fabric.clip_gradients(model, optimizer, max_norm=1.0)
                    optimizer.step()
                    optimizer.zero_grad()
    return {model.module: X[256:260]}


if __name__ == "__main__":
    main(12)
