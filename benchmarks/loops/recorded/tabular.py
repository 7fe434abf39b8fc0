"""A tabular network of numbers and categories, with early stopping, in the manner of rtdl's bin/mlp.py.

https://github.com/yandex-research/rtdl-revisiting-models/blob/main/bin/mlp.py
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import nn

import pathkernel as pk


class MLP(nn.Module):
    def __init__(self, d_num, categories, d_embedding, d_layer, dropout):
        super().__init__()
        self.category_embeddings = nn.Embedding(categories, d_embedding)
        self.layers = nn.ModuleList([nn.Linear(d_num + d_embedding, d_layer), nn.Linear(d_layer, d_layer)])
        self.dropout = dropout
        self.head = nn.Linear(d_layer, 1)

    def forward(self, x_num, x_cat):
        x = torch.cat([x_num, self.category_embeddings(x_cat)], dim=-1)
        for layer in self.layers:
            x = F.relu(layer(x))
            if self.dropout:
                x = F.dropout(x, self.dropout, self.training)
        return self.head(x).squeeze(-1)


def index_loader(size, batch_size):
    """Ids of the rows of each batch, in a new order."""
    return torch.randperm(size).split(batch_size)


@torch.no_grad()
def evaluate(model, part):
    model.eval()
    return F.binary_cross_entropy_with_logits(model(part["num"], part["cat"]), part["y"]).item()


def main(epochs=20, patience=3):
    torch.manual_seed(0)
    X, y = load_breast_cancer(return_X_y=True)
    X = torch.tensor((X - X.mean(0)) / X.std(0), dtype=torch.float32)
    every = {"num": X[:, :8], "cat": (X[:, 8] > 0).long() + (X[:, 8] > 1).long(), "y": torch.tensor(y).float()}
    train = {name: part[:200] for name, part in every.items()}
    val = {name: part[200:300] for name, part in every.items()}
    test = {name: part[300:] for name, part in every.items()}

    X_num, X_cat, Y = train["num"], train["cat"], train["y"]
    model = MLP(8, 3, 4, 16, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-4)
    best, best_state, bad_epochs = float("inf"), None, 0
    with pk.KernelRecorder(model, optimizer, data=((X_num, X_cat), Y), task="classification") as recorder:
        for _ in range(epochs):
            model.train()
            for batch_idx in index_loader(200, 32):
                recorder.announce(batch_idx)
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(model(X_num[batch_idx], X_cat[batch_idx]), Y[batch_idx])
                loss.backward()
                optimizer.step()
            score = evaluate(model, val)
            if score < best:
                best, best_state, bad_epochs = score, copy.deepcopy(model.state_dict()), 0
            else:
                bad_epochs += 1
                if bad_epochs >= patience:
                    break
    model.load_state_dict(best_state)
    print(f"test loss {evaluate(model, test):.3f}")
    return {model: (test["num"][:4], test["cat"][:4])}


if __name__ == "__main__":
    main()
