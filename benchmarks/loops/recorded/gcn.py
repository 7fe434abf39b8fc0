"""A graph convolutional network on all nodes at once, in the manner of pytorch/examples, gcn/main.py.

https://github.com/pytorch/examples/blob/main/gcn/main.py
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam

import pathkernel as pk


class GraphConv(nn.Module):
    def __init__(self, input_dim, output_dim):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(input_dim, output_dim))
        nn.init.xavier_normal_(self.kernel)

    def forward(self, input_tensor, adj_mat):
        return torch.mm(adj_mat, torch.mm(input_tensor, self.kernel))


class GCN(nn.Module):
    def __init__(self, input_dim, hidden_dim, output_dim, dropout_p=0.5):
        super().__init__()
        self.gc1 = GraphConv(input_dim, hidden_dim)
        self.gc2 = GraphConv(hidden_dim, output_dim)
        self.dropout = nn.Dropout(dropout_p)

    def forward(self, input_tensor, adj_mat):
        x = self.gc1(input_tensor, adj_mat)
        x = F.relu(x)
        x = self.dropout(x)
        x = self.gc2(x, adj_mat)
        return F.log_softmax(x, dim=1)


class Nodes(nn.Module):
    def __init__(self, gcn, *graph):
        super().__init__()
        self.gcn, self.graph = gcn, graph

    def forward(self, ids):
        return self.gcn(*self.graph)[ids]


def load_graph(nodes=90):
    """Three communities; features say little about them, neighbours more."""
    labels = torch.arange(nodes) % 3
    features = F.one_hot(labels, 3).float() + torch.randn(nodes, 3)
    features = torch.cat([features, torch.randn(nodes, 5)], dim=1)
    linked = torch.where(labels[:, None] == labels, 0.15, 0.02) > torch.rand(nodes, nodes)
    adj_mat = (linked | linked.T | torch.eye(nodes, dtype=torch.bool)).float()
    degree = adj_mat.sum(dim=1).rsqrt()
    return features, labels, degree[:, None] * adj_mat * degree


def test(gcn, input, target, mask):
    gcn.eval()
    with torch.no_grad():
        output = gcn(*input)
    return (output[mask].argmax(dim=1) == target[mask]).float().mean().item()


def main(epochs=40):
    torch.manual_seed(42)
    features, labels, adj_mat = load_graph()
    idx = torch.randperm(len(labels))
    idx_train, idx_test = idx[:45], idx[45:]
    gcn = GCN(features.shape[1], 8, 3)
    optimizer = Adam(gcn.parameters(), lr=0.01, weight_decay=5e-4)
    criterion = nn.NLLLoss()
    nodes, ids = Nodes(gcn, features, adj_mat), torch.arange(len(labels))
    with pk.KernelRecorder(nodes, optimizer, criterion, data=(ids, labels)) as recorder:
        for _ in range(epochs):
            gcn.train()
            optimizer.zero_grad()
            output = nodes(recorder.announce(ids)[0])
            loss = criterion(output[idx_train], labels[idx_train])
            loss.backward()
            optimizer.step()
            test(gcn, (features, adj_mat), labels, idx_test)
    return {nodes: ids[:4]}


if __name__ == "__main__":
    main()
