"""The work that engines are compared on: networks, data, training paths, and what is asked of them.

Everything random comes from a seed, is made once by the benchmark and handed to every method as arrays, so that
libraries without torch, in environments of their own, are given the very same numbers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

OUTPUTS = 10
IMAGE = 28
TOKENS, VOCABULARY, MODEL_WIDTH, HEADS, LAYERS = 64, 256, 128, 4, 4
GROUPS = 8
LEARNING_RATE = {"SGD": 0.1, "AdamW": 3e-3}
WEIGHT_DECAY, BETAS, EPSILON = 1e-2, (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Task:
    """One piece of work, the same for every method.

    Attributes
    ----------
    kind
        ``"gram"``: a tangent kernel at one θ. ``"path gram"``: the same along a recorded path. ``"shares"``: how much
        each training sample moved each query.
    network
        ``"mlp"`` (64-width-width-10), ``"cnn"`` or ``"transformer"``.
    outputs
        ``"trace"``, ``"full"`` or ``"loss"``.
    queries, references
        Rows and columns; references 0 stands for a symmetric Gram of the queries.
    data
        ``"noise"``, or ``"digits"`` with the network trained for `steps` steps.
    """

    kind: str = "gram"
    network: str = "mlp"
    outputs: str = "trace"
    queries: int = 256
    references: int = 0
    width: int = 256
    data: str = "noise"
    optimizer: str = "AdamW"
    steps: int = 0
    batch: int = 64
    quadrature: str = "discrete_gradient"
    tolerance: float = 0.0
    memory: str = "1GB"
    device: str = "cpu"
    part: int = 0
    """Steps, nodes or queries that a method too slow for all of them takes instead; its time is scaled."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ------------------------------------------------------------------------------------------------------ networks


def mlp(width: int) -> nn.Module:
    from torch import nn

    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, OUTPUTS))


def cnn() -> nn.Module:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GroupNorm(GROUPS, 64),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (IMAGE // 4) ** 2, OUTPUTS),
    )


def transformer() -> nn.Module:
    """Four causal layers, normalised before each part; the feed-forward part is twice as wide as the model."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            d = MODEL_WIDTH
            self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

        def forward(self, x: Tensor) -> Tensor:
            n, t, d = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
            return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.position = nn.Embedding(VOCABULARY, MODEL_WIDTH), nn.Embedding(TOKENS, MODEL_WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm, self.head = nn.LayerNorm(MODEL_WIDTH), nn.Linear(MODEL_WIDTH, VOCABULARY)

        def forward(self, tokens: Tensor) -> Tensor:
            # One row of positions for each sample: libraries that hook modules want the samples first everywhere.
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
            x = self.embedding(tokens) + self.position(positions)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Transformer()


def network(task: Task) -> nn.Module:
    """The network of a task, freshly initialised."""
    import torch

    torch.manual_seed(0)
    return {"mlp": lambda: mlp(task.width), "cnn": cnn, "transformer": transformer}[task.network]()


def loaded(task: Task, arrays: dict[str, np.ndarray]) -> nn.Module:
    """The network of a task with the weights that everyone uses, in eval mode."""
    import torch

    model = network(task)
    model.load_state_dict({name: torch.from_numpy(arrays[f"theta/{name}"].copy()) for name in model.state_dict()})
    return model.eval()


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy; of a sequence, the mean over its tokens."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs.flatten(0, -2), targets.flatten())


def sample_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each sample of a batch."""
    from torch.nn.functional import cross_entropy

    losses = cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.reshape(len(outputs), -1).mean(dim=1)


# ---------------------------------------------------------------------------------------------------------- data


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """1437 training and 360 test samples of digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(
        (X / 16).astype(np.float32), y, test_size=360, stratify=y, random_state=0
    )
    return X_train, y_train, X_test, y_test


def arrays_of(task: Task) -> dict[str, np.ndarray]:
    """X, y (references), Xq, yq (queries), weights, and for paths every θ_s and the ids of every batch."""
    generator = np.random.default_rng(0)
    model = network(task)
    result: dict[str, np.ndarray] = {}
    if task.data == "digits":
        X, y, X_test, y_test = digits()
        samples = task.references or len(X)
        result = {"X": X[:samples], "y": y[:samples]}
        # The path Gram is of all samples with the training samples; shares and loss products are of test samples.
        queries = (np.concatenate([X, X_test]), np.concatenate([y, y_test])) if task.outputs == "trace" else None
        result["Xq"], result["yq"] = queries if queries is not None else (X_test, y_test)
        result["Xq"], result["yq"] = result["Xq"][: task.queries], result["yq"][: task.queries]
        if task.steps:
            result |= train(model, task, result["X"], result["y"])
    else:
        shape = {"mlp": (64,), "cnn": (1, IMAGE, IMAGE), "transformer": (TOKENS,)}[task.network]
        if task.network == "transformer":
            sequences = generator.integers(0, VOCABULARY, (task.queries, TOKENS + 1))
            result["Xq"], result["yq"] = sequences[:, :-1].copy(), sequences[:, 1:].copy()
        else:
            result["Xq"] = generator.standard_normal((task.queries, *shape)).astype(np.float32)
            result["yq"] = generator.integers(0, OUTPUTS, task.queries)
    return result | {f"theta/{name}": value.detach().numpy() for name, value in model.state_dict().items()}


def optimizer_of(model: nn.Module, task: Task) -> Any:
    from torch import optim

    if task.optimizer == "SGD":
        return optim.SGD(model.parameters(), lr=LEARNING_RATE["SGD"])
    return optim.AdamW(
        model.parameters(), lr=LEARNING_RATE["AdamW"], weight_decay=WEIGHT_DECAY, betas=BETAS, eps=EPSILON
    )


def batches(task: Task, samples: int) -> np.ndarray:
    """Ids of every step, (steps, batch): a permutation for each epoch, what is left over of it dropped."""
    generator, size = np.random.default_rng(1), min(task.batch, samples)
    epochs = math.ceil(task.steps / (samples // size))
    order = [generator.permutation(samples)[: samples // size * size].reshape(-1, size) for _ in range(epochs)]
    return np.concatenate(order)[: task.steps]


def train(model: nn.Module, task: Task, X: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """An ordinary training loop; every θ_s, (steps + 1, P), and the ids. One thread, so that it can be repeated."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs, targets = torch.from_numpy(X), torch.from_numpy(y)
    optimizer, ids = optimizer_of(model, task), batches(task, len(X))
    flat = torch.nn.utils.parameters_to_vector
    path = [flat(model.parameters()).detach().numpy().copy()]
    for chosen in torch.from_numpy(ids):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
        path.append(flat(model.parameters()).detach().numpy().copy())
    torch.set_num_threads(threads)
    return {"path": np.stack(path), "ids": ids}
