"""Training with Accelerate that is stopped, and goes on from its checkpoint in the middle of an epoch.

https://github.com/huggingface/accelerate/blob/main/examples/by_feature/checkpointing.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train(steps, resume_from_checkpoint=None):
    set_seed(42)
    accelerator = Accelerator(cpu=True)
    X = torch.randn(96, 10)
    y = torch.stack([X[:, 0] * X[:, 1], X[:, 2].sin()], 1)
    dataset = TensorDataset(X, y)
    model = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_dataloader = DataLoader(dataset, shuffle=True, batch_size=16)
    lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    starting_step = 0
    if resume_from_checkpoint:
        accelerator.load_state(resume_from_checkpoint)
        starting_step = int(resume_from_checkpoint.removeprefix("step_"))
    overall_step = starting_step
    while overall_step < steps:
        active_dataloader = train_dataloader
        if overall_step == starting_step and starting_step:
            active_dataloader = accelerator.skip_first_batches(train_dataloader, starting_step % 6)
        for x, target in active_dataloader:
            loss = nn.functional.mse_loss(model(x), target)
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            overall_step += 1
            if overall_step == steps:
                break
    accelerator.save_state(f"step_{overall_step}")
    accelerator.free_memory()
    return accelerator.unwrap_model(model), X


def main(steps):
    first = steps // 2
    train(first)
    model, X = train(steps, resume_from_checkpoint=f"step_{first}")
    return {model: X[:4]}


if __name__ == "__main__":
    main(20)
