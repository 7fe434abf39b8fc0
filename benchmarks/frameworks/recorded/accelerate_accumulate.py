"""Accumulation, clipping and a schedule with Accelerate, in the manner of its examples.

https://github.com/huggingface/accelerate/blob/main/examples/by_feature/gradient_accumulation.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk


def main(steps):
    torch.manual_seed(0)
    X = torch.randn(96, 10)
    y = (X[:, :3] * torch.tensor([1.0, -1.0, 0.5])).sum(1) > 0
    dataset = TensorDataset(X, y.long())
    model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = DataLoader(dataset, batch_size=8, shuffle=True)
    loss_function = nn.CrossEntropyLoss()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    with pk.KernelRecorder(model, optimizer, data=dataset) as recorder:
        done = 0
        while done < steps:
            for batch in recorder.track(loader):
                with accelerator.accumulate(model):
                    x, target = batch
                    loss = loss_function(model(x), target)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                        done += 1
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if done == steps:
                    break
    return {accelerator.unwrap_model(model): X[:4]}


if __name__ == "__main__":
    main(20)
