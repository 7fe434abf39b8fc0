"""Training with Accelerate that is stopped early, with two optimizers and weights that are averaged.

https://github.com/huggingface/accelerate/blob/main/examples/by_feature/early_stopping.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import pathkernel as pk


class EarlyStoppingCallback:
    """A callback class that helps with early stopping"""

    def __init__(self, min_delta=0, patience=5):
        self.min_delta = min_delta
        self.patience = patience
        self.counter = 0
        self.lowest_loss = float("inf")

    def check_early_stopping(self, eval_loss):
        delta = self.lowest_loss - eval_loss
        if delta >= self.min_delta:
            self.lowest_loss = eval_loss
            self.counter = 0
        else:
            self.counter += 1
            if self.counter >= self.patience:
                return True
        return False


def main(steps):
    set_seed(1)
    X = torch.randint(30, (120, 6))
    dataset = TensorDataset(X, (X < 15).sum(1) % 3)
    train, valid = random_split(dataset, [96, 24])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3))
    embedding_optimizer = torch.optim.Adagrad(model[0].parameters(), lr=0.1)
    optimizer = torch.optim.AdamW(model[2:].parameters(), lr=1e-2)
    loaders = DataLoader(train, batch_size=8, shuffle=True), DataLoader(valid, batch_size=8)
    model, embedding_optimizer, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model, embedding_optimizer, optimizer, *loaders
    )
    callback, done, stop = EarlyStoppingCallback(), 0, False
    with pk.KernelRecorder(model, [embedding_optimizer, optimizer], nn.CrossEntropyLoss(), dataset) as recorder:
        while done < steps and not stop:
            for batch, labels in recorder.track(train_dataloader):
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(batch), labels)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_value_(model.parameters(), 0.1)
                        done += 1
                    for one in (embedding_optimizer, optimizer):
                        one.step()
                        one.zero_grad()
            with torch.no_grad():
                losses = [nn.functional.cross_entropy(model(x), t).item() for x, t in eval_dataloader]
            if callback.check_early_stopping(sum(losses)):
                accelerator.set_trigger()
            stop = accelerator.check_trigger()
    return {accelerator.unwrap_model(model): X[:4]}


if __name__ == "__main__":
    main(24)
