"""A compiled network with dropout, in the manner of huggingface/pytorch-image-models, train.py with `--torchcompile`.

https://github.com/huggingface/pytorch-image-models/blob/main/train.py; the backend is one of its options
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Residual(nn.Module):
    def __init__(self, dim, drop_rate):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(drop_rate), nn.Linear(2 * dim, dim))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class ResidualMLP(nn.Module):
    def __init__(self, num_classes=10, dim=16, drop_rate=0.2):
        super().__init__()
        self.stem = nn.Linear(64, dim)
        self.blocks = nn.Sequential(Residual(dim, drop_rate), Residual(dim, drop_rate))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x.flatten(1))))


def train_one_epoch(model, loader, optimizer, loss_fn):
    model.train()
    for input, target in loader:
        output = model(input)
        loss = loss_fn(output, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def main(epochs=3, torchcompile="aot_eager"):
    torch.manual_seed(42)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    dataset_train = TensorDataset(images[:256], torch.tensor(labels[:256]))
    loader_train = DataLoader(dataset_train, batch_size=32, shuffle=True)

    model = ResidualMLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    model = torch.compile(model, backend=torchcompile)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    for _ in range(epochs):
        train_one_epoch(model, loader_train, optimizer, loss_fn)
    model.eval()
    return {model: images[256:260]}


if __name__ == "__main__":
    main()
