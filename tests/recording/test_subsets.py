"""Loaders over a part of the training data: ids are places in all of them."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

import pathkernel as pk

CE, N = nn.CrossEntropyLoss(), 24
torch.manual_seed(0)
X, Y = torch.randn(N, 4), torch.randint(2, (N,))

PARTS = {
    "subset": lambda dataset: Subset(dataset, [20, 21, 22, 5, 23]),
    "in another order": lambda dataset: Subset(dataset, list(reversed(range(N)))),
    "nested": lambda dataset: Subset(Subset(dataset, range(10, N)), torch.tensor([3, 0, 1])),
    "split": lambda dataset: random_split(dataset, [15, N - 15], generator=torch.Generator().manual_seed(3))[0],
    "indexed": lambda dataset: pk.IndexedDataset(Subset(dataset, [7, 9, 3])),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    "data", [lambda dataset: dataset, lambda dataset: (X, Y), lambda dataset: N], ids=["dataset", "arrays", "length"]
)
def test_samples_of_a_subset_have_their_places_in_the_data(name, data):
    """Shares of a network that is linear in its parameters, by closed form."""
    dataset = TensorDataset(X, Y)
    part = PARTS[name](dataset)
    if name == "in another order" and not isinstance(data(dataset), Dataset):
        pytest.skip("as long as the data: it may be the data")
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected, query = torch.zeros(N), X[:1]
    with pk.KernelRecorder(model, optimizer, CE, data=data(dataset)) as recorder:
        for x, target in recorder.track(DataLoader(part, batch_size=2)):
            optimizer.zero_grad()
            z = model(x)
            CE(z, target).backward()
            slope = (z.softmax(1) - nn.functional.one_hot(target, 2))[:, 1].detach() / len(x)
            places = [int((row == X).all(1).nonzero()) for row in x]
            expected[places] += -0.1 * slope * (x @ query[0] + 1)
            optimizer.step()
    shares = torch.as_tensor(pk.KernelMachine(recorder.trajectory).explain(query, outputs=1).shares[0])
    assert torch.allclose(shares.float(), expected, atol=1e-6)
