"""Images with Accelerate: a convolutional network, one cycle of the rate, batches that are made dicts and dispatched.

https://github.com/huggingface/accelerate/blob/main/examples/cv_example.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

import pathkernel as pk


class PetsDataset(Dataset):
    def __init__(self, n):
        self.labels = torch.arange(n) % 3
        self.images = torch.randn(n, 1, 8, 8) + 2 * torch.eye(8)[self.labels][:, None, None]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, idx):
        return {"image": self.images[idx], "label": self.labels[idx]}


def main(steps):
    set_seed(42)
    config = DataLoaderConfiguration(dispatch_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    dataset = PetsDataset(96)
    train_dataloader = DataLoader(dataset, shuffle=True, batch_size=16)
    eval_dataloader = DataLoader(dataset, batch_size=32)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 3))
    optimizer = torch.optim.Adam(params=model.parameters(), lr=3e-2 / 25)
    epochs = -(-steps // len(train_dataloader))
    lr_scheduler = OneCycleLR(optimizer=optimizer, max_lr=3e-2, epochs=epochs, steps_per_epoch=len(train_dataloader))
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    with pk.KernelRecorder(model, optimizer, data=len(dataset), task="classification") as recorder:
        for _ in range(epochs):
            model.train()
            for batch in recorder.track(train_dataloader):
                inputs = (batch["image"] - 0.5) / 1.2
                outputs = model(inputs)
                loss = torch.nn.functional.cross_entropy(outputs, batch["label"])
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            model.eval()
            accurate = 0
            for batch in eval_dataloader:
                with torch.no_grad():
                    outputs = model((batch["image"] - 0.5) / 1.2)
                predictions, references = accelerator.gather_for_metrics((outputs.argmax(dim=-1), batch["label"]))
                accurate += int((predictions == references).sum())
    return {accelerator.unwrap_model(model): (dataset.images[:4] - 0.5) / 1.2}


if __name__ == "__main__":
    main(18)
