"""Networks that permute, route, merge, mask, split or share their samples inside.

Each is a smooth function of one sample, whatever else is in the batch (`ZOO`), unless it is not (`COUPLED`). Everyday
code does all of this; a method that takes "row i of a tensor" for "sample i" goes wrong on it, and so does one that
takes any axis as long as the batch for the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networks
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LENGTH, WIDTH, HIDDEN, OUTPUTS, VOCABULARY = 6, 4, 5, 3, 11


@dataclass(frozen=True)
class Specimen:
    """A network, its samples, and what happens inside.

    Attributes
    ----------
    make
        Builds it.
    kind
        Of samples: ``"vectors"``, ``"sequences"``, ``"images"``, or ``"tokens"``, padded with zeros.
    lengths
        Lengths that occur inside: a batch of as many samples is easily confused.
    smooth
        Whether outputs are smooth in θ.
    evaluation
        Whether it is a function of one sample in evaluation mode only.
    shape
        Of a sample, where it is not the kind's own.
    """

    make: Callable[[], nn.Module]
    kind: str = "vectors"
    lengths: tuple[int, ...] = ()
    smooth: bool = True
    evaluation: bool = False
    shape: tuple[int, ...] = ()

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network, the same for the same seed; in evaluation mode where it has to be."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(dtype).train(not self.evaluation)

    def samples(self, n: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        """n different samples."""
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "tokens":
            (length,) = self.shape or (LENGTH,)
            tokens = torch.randint(1, VOCABULARY, (n, length), generator=generator)
            lengths = torch.randint(1, length + 1, (n, 1), generator=generator)
            return torch.where(torch.arange(length) < lengths, tokens, 0)
        own = {"vectors": (WIDTH,), "sequences": (LENGTH, WIDTH), "images": (2, 4, 4)}[self.kind]
        return torch.randn(n, *(self.shape or own), generator=generator, dtype=torch.float64).to(dtype)


def two_layers(inputs: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS))


def lengths_of(tokens: Tensor) -> Tensor:
    return (tokens != 0).sum(1)


# -- permuted -------------------------------------------------------------------------------------------------------


class Permuted(nn.Module):
    """Samples in another order inside; the order is made of the batch."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.order, self.net = order, two_layers()

    def forward(self, x: Tensor) -> Tensor:
        order = self.order(x)
        return self.net(x[order])[order.argsort()]


class SortedByLength(nn.Module):
    """Token sequences, the longest first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.layer, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        order = lengths_of(x).argsort(descending=True, stable=True)
        x = x[order]
        states = self.layer(self.table(x)).tanh() * (x != 0)[..., None]
        return self.head(states.sum(1))[order.argsort()]


class Flipped(nn.Module):
    """The batch backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flip(0)).flip(0)


class Rolled(nn.Module):
    """The batch rolled by two."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.roll(2, 0)).roll(-2, 0)


class GatheredAndScattered(nn.Module):
    """Hidden states sorted along the samples by `gather`, put back by `scatter`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        hidden, order = self.first(x).tanh(), x.sum(1).argsort()[:, None]
        out = self.last(hidden.gather(0, order.expand_as(hidden)))
        return torch.zeros_like(out).scatter(0, order.expand_as(out), out)


class SwappedHalves(nn.Module):
    """The second half of the batch before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        n, half = len(x), len(x) // 2
        hidden = self.first(torch.cat([x[half:], x[:half]])).tanh()
        return self.last(torch.cat([hidden[n - half :], hidden[: n - half]]))


# -- split and joined -----------------------------------------------------------------------------------------------


class Buckets(nn.Module):
    """Sequences of one length at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(VOCABULARY, WIDTH), two_layers()

    def forward(self, x: Tensor) -> Tensor:
        lengths = lengths_of(x)
        out = torch.zeros(len(x), OUTPUTS, dtype=self.table.weight.dtype)
        for length in lengths.unique().tolist():
            own = (lengths == length).nonzero()[:, 0]
            out[own] = self.net(self.table(x[own, :length])).mean(1)
        return out


class Chunks(nn.Module):
    """Large batches four samples at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_layers()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(chunk) for chunk in x.split(4)])


class OneByOne(nn.Module):
    """A loop over the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_layers()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(sample) for sample in x])


class UniqueTokens(nn.Module):
    """Each token of the batch embedded once."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        values, inverse = torch.unique(x, return_inverse=True)
        return self.head(self.layer(self.table(values)).tanh()[inverse].mean(1))


class UniqueSamples(nn.Module):
    """Each sample of the batch once, sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_layers()

    def forward(self, x: Tensor) -> Tensor:
        values, inverse = torch.unique(x, dim=0, return_inverse=True)
        return self.net(values)[inverse]


class EarlyExit(nn.Module):
    """Samples leave the batch after as many rounds as they ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.round, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        rounds, state = (x[:, 0] > 0).long() + (x[:, 1] > 0).long() + 1, x
        for number in range(int(rounds.max().item())):
            going = (rounds > number).nonzero()[:, 0]
            state = state.index_copy(0, going, self.round(state[going]).tanh())
        return self.head(state)


class Interleaved(nn.Module):
    """Two streams in turn along the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.one(x), self.two(x)], 1).flatten(0, 1)
        return self.head(both.tanh()).unflatten(0, (-1, 2)).sum(1)


class Siamese(nn.Module):
    """Two views of every sample, both in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_layers()

    def forward(self, x: Tensor) -> Tensor:
        views = x.repeat_interleave(2, 0) * torch.tensor([1.0, -0.5], dtype=x.dtype).repeat(len(x))[:, None]
        return self.net(views).unflatten(0, (-1, 2)).tanh().mean(1)


class ViewsBehindEachOther(nn.Module):
    """All first views, then all second ones."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_layers()

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.net(torch.cat([x, x.flip(1)])).chunk(2)
        return one * two.tanh()


class Expanded(nn.Module):
    """Every sample at several learned offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets, self.net = nn.Parameter(torch.randn(LENGTH, WIDTH)), two_layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, None].expand(-1, LENGTH, -1) + self.offsets).tanh().mean(1)


# -- routed ---------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture of experts: `nonzero` finds the samples of each, `index_add` brings them back."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 3), nn.ModuleList(two_layers() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(1)
        chosen, out = x[:, :3].argmax(1), torch.zeros(len(x), OUTPUTS, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            own = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, own, expert(x[own]) * weights[own, number, None])
        return out


class ExpertsSorted(nn.Module):
    """A mixture of experts: samples sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.first = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, HIDDEN)
        self.last = nn.Parameter(torch.randn(2, HIDDEN, OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(1), (x[:, 0] > 0).long()
        order = chosen.argsort(stable=True)
        out = torch.einsum("ni,nio->no", self.first(x[order]).tanh(), self.last[chosen[order]])
        return (out * weights[order].gather(1, chosen[order][:, None]))[order.argsort()]


class ExpertsByTokens(nn.Module):
    """Tokens of all samples sorted by expert and cut at the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(3)), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = flat[:, :3].argmax(1)
        order = chosen.argsort(stable=True)
        parts = flat[order].split(chosen.bincount(minlength=3).tolist())
        out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return self.head(out[order.argsort()].tanh().unflatten(0, x.shape[:2]).mean(1))


class TopTwo(nn.Module):
    """The weights of the two experts of each sample, gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(WIDTH, 4), nn.Parameter(torch.randn(4, WIDTH, HIDDEN))
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        index = x.topk(2, dim=1).indices
        weights = self.gate(x).gather(1, index).softmax(1)
        hidden = torch.einsum("nd,nkdh->nkh", x, self.weight[index]).tanh()
        return self.head((hidden * weights[..., None]).sum(1))


class LearnedTopTwo(nn.Module):
    """Routed by its own gate, whose choices stay the same in a short training."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4), nn.ModuleList(nn.Linear(WIDTH, HIDDEN) for _ in range(4))
        self.head = nn.Linear(HIDDEN, OUTPUTS)
        with torch.no_grad():
            self.gate.weight.mul_(20)

    def forward(self, x: Tensor) -> Tensor:
        values, index = (0.1 * self.gate(x)).topk(2, dim=1)
        weights = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, index, values.softmax(1))
        every = torch.stack([expert(x) for expert in self.experts], 1).tanh()
        return self.head((every * weights[..., None]).sum(1))


class TreeOfLayers(nn.Module):
    """Left or right by the sign of a feature, with boolean masks and assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = two_layers(), two_layers()

    def forward(self, x: Tensor) -> Tensor:
        left, out = x[:, 0] < 0, torch.zeros(len(x), OUTPUTS, dtype=x.dtype)
        out[left], out[~left] = self.left(x[left]), self.right(x[~left])
        return out


# -- sequences ------------------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """Packed sequences through a recurrent layer: the last state."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(VOCABULARY, WIDTH), layer(WIDTH, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.table(x), lengths_of(x), batch_first=True, enforce_sorted=False)
        last = self.layer(packed)[1]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


class PackedAndPadded(nn.Module):
    """Packed sequences and back: the mean of all states."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.GRU(WIDTH, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        lengths = lengths_of(x)
        packed = nn.utils.rnn.pack_padded_sequence(self.table(x), lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(states.sum(1) / lengths[:, None])


class LayerOnPackedData(nn.Module):
    """A linear layer on the data of packed sequences, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.table(x), lengths_of(x), batch_first=True, enforce_sorted=False)
        packed = packed._replace(data=self.layer(packed.data).tanh())
        return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0].sum(1)


class ItemInMask(nn.Module):
    """Cut to the longest sequence of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(VOCABULARY, WIDTH), two_layers()

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : int(lengths_of(x).max().item())]
        return (self.net(self.table(x)).tanh() * (x != 0)[..., None]).sum(1)


class BagOfOffsets(nn.Module):
    """One list of all tokens of the batch, and where each sample begins."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.net = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean"), two_layers()

    def forward(self, x: Tensor) -> Tensor:
        lengths = lengths_of(x)
        return self.net(self.bag(x[x != 0], lengths.cumsum(0) - lengths))


class SegmentSums(nn.Module):
    """Sums over the tokens of each sample, as differences of one running sum over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        ends, running = lengths_of(x).cumsum(0), self.layer(self.table(x[x != 0])).tanh().cumsum(0)
        return torch.diff(running[ends - 1], dim=0, prepend=torch.zeros(1, OUTPUTS, dtype=running.dtype)).sinh()


class RunningMean(nn.Module):
    """A cumulative sum along time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.head((self.layer(x).cumsum(1) / steps).tanh()).mean(1)


class FlatTokens(nn.Module):
    """Samples and positions merged into one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.reshape(-1, WIDTH)).tanh().reshape(*x.shape[:2], -1).mean(1))


class SamplesSecond(nn.Module):
    """Positions first, samples second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(0, 1)).tanh()).mean(0)


class SamplesLast(nn.Module):
    """Features × samples, as in formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(HIDDEN, WIDTH)), nn.Parameter(torch.randn(OUTPUTS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return (self.last @ (self.first @ x.T).tanh()).T


class CellLoop(nn.Module):
    """A recurrent cell in a loop."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = cell(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for time in range(x.shape[1]):
            state = self.cell(x[:, time], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Windows(nn.Module):
    """Attention within windows, which lie along the samples, with a learned table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(3, 3))
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.roll(1, 1).reshape(-1, 3, WIDTH)
        query, key, value = self.project(windows).chunk(3, -1)
        out = (query @ key.mT + self.bias).softmax(-1) @ value
        return self.head(out.reshape(x.shape).mean(1))


class MergedTokens(nn.Module):
    """The most similar pair of an even and an odd token becomes one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        best, partner = (x[:, ::2] @ x[:, 1::2].mT).max(-1)
        order = best.argsort(-1)
        stay, go = order[:, :-1, None].expand(-1, -1, HIDDEN), order[:, -1:, None].expand(-1, -1, HIDDEN)
        hidden = self.layer(x).tanh()
        even, odd = hidden[:, ::2], hidden[:, 1::2]
        to = partner.gather(1, order[:, -1:])[..., None].expand(-1, -1, HIDDEN)
        merged = odd.scatter_add(1, to, even.gather(1, go))
        return self.head(torch.cat([even.gather(1, stay), merged], 1).sin()).mean(1)


class Graphs(nn.Module):
    """Graphs of a batch as one big graph: messages by `index_add` along numbered nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        nodes, place = x.flatten(0, 1), t * torch.arange(n)[:, None]
        source, target = ((torch.arange(t) + shift) % t for shift in (0, 2))
        source, target = (place + source).flatten(), (place + target).flatten()
        state = self.update(nodes).index_add(0, target, self.message(nodes[source])).tanh()
        graph = torch.arange(n).repeat_interleave(t)
        return self.head(torch.zeros(n, HIDDEN, dtype=x.dtype).index_add(0, graph, state))


class Bins(nn.Module):
    """Token states added into bins by token, and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        states, index = self.layer(self.table(x)), x[..., None].expand(-1, -1, HIDDEN)
        bins = torch.zeros(len(x), VOCABULARY, HIDDEN, dtype=states.dtype).scatter_add(1, index, states)
        return self.head(bins.gather(1, index).tanh()).mean(1)


# -- masked, and parameters as long as the batch --------------------------------------------------------------------


class Masked(nn.Module):
    """Some positions replaced by a learned token."""

    def __init__(self, replace: Callable[[Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...] = (HIDDEN,)) -> None:
        super().__init__()
        self.replace, self.layer, self.token = replace, nn.Linear(WIDTH, HIDDEN), nn.Parameter(torch.randn(shape))
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) % 3 == 0
        return self.head(self.replace(mask, self.token, self.layer(x)).tanh().mean(1))


def assigned(mask: Tensor, token: Tensor, hidden: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[:, mask] = token
    return hidden


class Fourier(nn.Module):
    """Learned frequencies by `addcmul`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(LENGTH)), nn.Linear(LENGTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(LENGTH, dtype=x.dtype)
        return self.head(torch.addcmul(x[:, :1] * steps, self.weight, steps).sin())


class Lerp(nn.Module):
    """From the input to a parameter along a ramp."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.end = nn.Linear(WIDTH, LENGTH), nn.Parameter(torch.randn(LENGTH))
        self.head = two_layers(LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.lerp(self.first(x).tanh(), self.end, torch.linspace(0, 1, LENGTH, dtype=x.dtype)))


class LearnedQueries(nn.Module):
    """Learned queries attend to the input, causally."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(WIDTH, HIDDEN), nn.Parameter(torch.randn(1, LENGTH, HIDDEN))
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        key, mask = self.key(x), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        out = F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1), key, key, attn_mask=mask)
        return self.head(out.tanh()).mean(1)


class PositionTable(nn.Module):
    """A learned table of positions, read by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.layer = nn.Embedding(LENGTH, WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x + self.places(torch.arange(x.shape[1]))).tanh()).mean(1)


class MemorySlots(nn.Module):
    """Attention to learned slots."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.slots = nn.Linear(WIDTH, HIDDEN), nn.Parameter(torch.randn(LENGTH, HIDDEN))
        self.head = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(((self.query(x) @ self.slots.T).softmax(1) @ self.slots).tanh())


class BatchEnsemble(nn.Module):
    """Members of an ensemble along an axis of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(LENGTH, WIDTH, HIDDEN))
        self.last = nn.Parameter(torch.randn(LENGTH, HIDDEN, OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x.expand(LENGTH, *x.shape) @ self.first).tanh()
        return (hidden @ self.last).mean(0)


class Einsum(nn.Module):
    """Parameters in an einsum with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.randn(WIDTH, WIDTH, HIDDEN))
        self.head = nn.Parameter(torch.randn(HIDDEN, OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("ntd,nte,deh->nth", x, x.flip(1), self.core).tanh()
        return torch.einsum("nth,hc->nc", hidden, self.head)


# -- images ---------------------------------------------------------------------------------------------------------


class FiltersOfEachSample(nn.Module):
    """Filters made of the sample; the batch becomes groups of channels of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.head = nn.Linear(32, 4 * 2 * 9), nn.Linear(4, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        filters = self.filters(x.flatten(1)).reshape(n * 4, c, 3, 3)
        out = F.conv2d(x.reshape(1, n * c, h, w), filters, padding=1, groups=n)
        return self.head(out.reshape(n, 4, h, w).tanh().mean((2, 3)))


class SampledFeatures(nn.Module):
    """Features read at places that depend on the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(12, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        places = x[:, :, :2, :2].permute(0, 2, 3, 1).tanh()
        features = F.grid_sample(self.convolution(x).tanh(), places, align_corners=False)
        return self.head(features.flatten(1))


class SpatialTransformer(nn.Module):
    """The place to look at is learned; bilinear reading has kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.head = nn.Linear(32, 6), nn.Linear(32, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(0.3 * self.place(x.flatten(1)).reshape(-1, 2, 3), list(x.shape), align_corners=False)
        return self.head(F.grid_sample(x, grid, align_corners=False).flatten(1))


class Patches(nn.Module):
    """Patches of all images in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).mT.flatten(0, 1)
        return self.head(self.layer(patches).tanh()).unflatten(0, (len(x), -1)).mean(1)


class FramesInTheBatch(nn.Module):
    """Channels of an image as images of their own, through one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(1, 3, 3), nn.Linear(24, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x.flatten(0, 1)[:, None]).tanh().reshape(len(x), -1))


# -- what torch.func refuses ----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A layer that is run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last(checkpoint(lambda h: self.middle(h).tanh(), hidden, use_reentrant=False))


class SlopesByFunc(nn.Module):
    """`torch.func` in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_layers()

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda sample: self.net(sample).sum()))(x)[:, :OUTPUTS]


class SlopesByAutograd(nn.Module):
    """A physics-informed network: u and its slopes by autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            value = self.net(x)
            (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return torch.cat([value, slope[:, : OUTPUTS - 1]], 1)


class _Softsign(torch.autograd.Function):
    """x / (1 + x²), in the old style, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x / (1 + x * x)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return signal * (1 - x * x) / (1 + x * x) ** 2


class _SoftsignOnce(_Softsign):
    """The same, of which there is no second derivative."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return signal * (1 - x * x) / (1 + x * x) ** 2


class _Sorting(torch.autograd.Function):
    """Sorts samples inside a function of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        ctx.save_for_backward(x, weight)
        return (x[order] @ weight.T)[order.argsort()]

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return signal @ weight, signal.T @ x


class CustomFunction(nn.Module):
    """An autograd function without a rule for vmap."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function.apply(self.first(x)))


class CustomLayer(nn.Module):
    """An autograd function that holds the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(HIDDEN, WIDTH)), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Sorting.apply(x, self.weight).tanh())


# -- shared ---------------------------------------------------------------------------------------------------------


class TwoNames(nn.Module):
    """Layers, and once more the same layers in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)
        self.net = nn.Sequential(self.first, nn.Tanh(), self.last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ThreeTimes(nn.Module):
    """One layer three times in a list."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(WIDTH, WIDTH)
        self.layers, self.head = nn.ModuleList([layer] * 3), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


class OneActivationTwice(nn.Module):
    """One learned activation behind two layers; its slope is one number."""

    def __init__(self) -> None:
        super().__init__()
        act, layers = nn.PReLU(), (nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, OUTPUTS))
        self.net = nn.Sequential(layers[0], act, layers[1], act, layers[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Tempered(nn.Module):
    """A learned temperature without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.log_scale = two_layers(), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.log_scale.exp()


class TiedBackAndForth(nn.Module):
    """A weight, and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(HIDDEN, WIDTH)), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.weight).tanh() @ self.weight)


class UnderTwoNames(nn.Module):
    """Any network, registered twice, and scaled by a parameter without axes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.again, self.scale = net, net, nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, *inputs: Any) -> Tensor:
        return self.net(*inputs) * self.scale


def _of_networks(name: str, **options: Any) -> Specimen:
    make, kind = networks.NETWORKS[name]
    shape = {"vectors": (6,), "sequences": (4, 6), "images": (2, 6, 6)}[kind]
    return Specimen(make, kind, shape=shape, **options)


ZOO: dict[str, Specimen] = {
    "sorted by length": Specimen(SortedByLength, "tokens", (LENGTH,)),
    "sorted by a feature": Specimen(lambda: Permuted(lambda x: x[:, 0].argsort())),
    "shuffled": Specimen(
        lambda: Permuted(lambda x: torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x))))
    ),
    "even before odd": Specimen(
        lambda: Permuted(lambda x: torch.cat([torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)]))
    ),
    "flipped": Specimen(Flipped),
    "rolled": Specimen(Rolled),
    "gathered and scattered": Specimen(GatheredAndScattered, lengths=(HIDDEN,)),
    "halves swapped": Specimen(SwappedHalves),
    "buckets by length": Specimen(Buckets, "tokens", (LENGTH,)),
    "chunks of four": Specimen(Chunks, lengths=(4,)),
    "one by one": Specimen(OneByOne),
    "unique tokens": Specimen(UniqueTokens, "tokens", (VOCABULARY,)),
    "unique samples": Specimen(UniqueSamples),
    "early exit": Specimen(EarlyExit),
    "interleaved": Specimen(Interleaved),
    "siamese": Specimen(Siamese),
    "views behind each other": Specimen(ViewsBehindEachOther),
    "expanded": Specimen(Expanded, lengths=(LENGTH,)),
    "experts by nonzero": Specimen(Experts),
    "experts sorted": Specimen(ExpertsSorted),
    "experts by tokens": Specimen(ExpertsByTokens, "sequences", (LENGTH,)),
    "top two of four": Specimen(TopTwo, lengths=(4,)),
    "learned top two": Specimen(LearnedTopTwo, lengths=(4,)),
    "tree of layers": Specimen(TreeOfLayers),
    "packed LSTM": Specimen(lambda: Packed(nn.LSTM), "tokens", (LENGTH,)),
    "packed GRU, padded": Specimen(PackedAndPadded, "tokens", (LENGTH,)),
    "layer on packed data": Specimen(LayerOnPackedData, "tokens", (LENGTH,)),
    "item in a mask": Specimen(ItemInMask, "tokens", (LENGTH,)),
    "bag with offsets": Specimen(BagOfOffsets, "tokens", (LENGTH,)),
    "segment sums": Specimen(SegmentSums, "tokens", (LENGTH,)),
    "cumulative sum": Specimen(RunningMean, "sequences", (LENGTH,)),
    "flattened tokens": Specimen(FlatTokens, "sequences", (LENGTH,)),
    "samples second": Specimen(SamplesSecond, "sequences", (LENGTH,)),
    "samples last": Specimen(SamplesLast, lengths=(WIDTH, HIDDEN)),
    "LSTM cell": Specimen(lambda: CellLoop(nn.LSTMCell), "sequences", (LENGTH,)),
    "GRU cell": Specimen(lambda: CellLoop(nn.GRUCell), "sequences", (LENGTH,)),
    "windows": Specimen(Windows, "sequences", (3, LENGTH)),
    "merged tokens": Specimen(MergedTokens, "sequences", (3, LENGTH)),
    "graphs": Specimen(Graphs, "sequences", (LENGTH,)),
    "bins": Specimen(Bins, "tokens", (LENGTH, VOCABULARY)),
    "mask token by where": Specimen(
        lambda: Masked(lambda mask, token, hidden: torch.where(mask[:, None], token, hidden)), "sequences", (LENGTH,)
    ),
    "mask token by masked_fill": Specimen(
        lambda: Masked(lambda mask, token, hidden: hidden.masked_fill(mask[:, None], token), ()), "sequences", (LENGTH,)
    ),
    "mask token by assignment": Specimen(lambda: Masked(assigned), "sequences", (LENGTH,)),
    "addcmul": Specimen(Fourier, lengths=(LENGTH,)),
    "lerp": Specimen(Lerp, lengths=(LENGTH,)),
    "learned queries": Specimen(LearnedQueries, "sequences", (LENGTH,)),
    "position table": Specimen(PositionTable, "sequences", (LENGTH,)),
    "memory slots": Specimen(MemorySlots, lengths=(LENGTH,)),
    "ensemble": Specimen(BatchEnsemble, lengths=(LENGTH,)),
    "einsum": Specimen(Einsum, "sequences", (WIDTH, LENGTH)),
    "class token": _of_networks("class token", lengths=(5,), smooth=False, evaluation=True),
    "filters of each sample": Specimen(FiltersOfEachSample, "images", (4,)),
    "sampled features": Specimen(SampledFeatures, "images", (4,)),
    "spatial transformer": Specimen(SpatialTransformer, "images", (4,), smooth=False),
    "pixel shuffle": Specimen(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.PixelShuffle(2), nn.Tanh(), nn.Flatten(), nn.Linear(16, OUTPUTS)),
        "images",
        (4,),
    ),
    "patches": Specimen(Patches, "images", (4,)),
    "frames in the batch": Specimen(FramesInTheBatch, "images", (3,)),
    "checkpointed": Specimen(Checkpointed, lengths=(HIDDEN,)),
    "torch.func inside": Specimen(SlopesByFunc, lengths=(HIDDEN,)),
    "autograd inside": Specimen(SlopesByAutograd, lengths=(HIDDEN,)),
    "custom function": Specimen(lambda: CustomFunction(_Softsign)),
    "custom function, once": Specimen(lambda: CustomFunction(_SoftsignOnce)),
    "custom layer": Specimen(CustomLayer),
    "shared module": _of_networks("called twice", lengths=(6,)),
    "module under two names": Specimen(TwoNames),
    "module three times": Specimen(ThreeTimes, lengths=(3,)),
    "activation twice": Specimen(OneActivationTwice, lengths=(OUTPUTS, HIDDEN), smooth=False),
    "scalar parameter": Specimen(Tempered),
    "tied back and forth": Specimen(TiedBackAndForth, lengths=(HIDDEN,)),
    "weight norm": _of_networks("weight norm", lengths=(5,)),
    "spectral norm": _of_networks("spectral norm", lengths=(5,), evaluation=True),
}
"""Name → network."""


# -- not functions of one sample ------------------------------------------------------------------------------------


class Centred(nn.Module):
    """Hidden states minus their mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last((hidden - hidden.mean(0)).tanh())


class SoftmaxOverSamples(nn.Module):
    """A softmax along the wrong axis."""

    def __init__(self) -> None:
        super().__init__()
        self.net = two_layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(0)


class SamplesAttend(nn.Module):
    """Samples that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(WIDTH, 3 * HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, 1)
        return self.head((query @ key.T).softmax(1) @ value)


class Capacity(nn.Module):
    """Of the samples that choose an expert, the first two are served."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.skip = two_layers(), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > -1
        served = chosen & (chosen.cumsum(0) <= 2)
        return self.skip(x) + self.expert(x) * served[:, None]


class Sampling(nn.Module):
    """Random numbers in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.first(x)
        return self.last((mean + 0.5 * torch.randn_like(mean)).tanh())


class DropoutAlways(nn.Module):
    """Monte Carlo dropout: `F.dropout` whose flag was forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x).tanh(), 0.5))


class Counting(nn.Module):
    """An output that depends on how often the network was called."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = two_layers(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) / (1 + 0.1 * self.calls)


COUPLED: dict[str, Specimen] = {
    "centred batches": Specimen(Centred),
    "batch statistics in evaluation": Specimen(
        lambda: nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN, track_running_stats=False), nn.Tanh(), nn.Linear(HIDDEN, 3)
        )
    ),
    "softmax over samples": Specimen(SoftmaxOverSamples),
    "samples attend to each other": Specimen(SamplesAttend),
    "experts with a capacity": Specimen(Capacity),
    "random in evaluation": Specimen(Sampling),
    "dropout in evaluation": Specimen(DropoutAlways),
    "counts its calls": Specimen(Counting),
}
"""Networks that are no functions of one sample, and are to be refused."""

COUPLED_IN_TRAINING: dict[str, Specimen] = {
    "batch norm in training": Specimen(
        lambda: nn.Sequential(
            # Running statistics that stay where they are belong to no channel.
            *(nn.Linear(WIDTH, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN, momentum=0.0), nn.Tanh()),
            nn.Linear(HIDDEN, OUTPUTS),
        )
    ),
    "dropout in training": Specimen(
        lambda: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Dropout(0.3), nn.Linear(HIDDEN, OUTPUTS))
    ),
    "sorted, then batch norm": Specimen(
        lambda: nn.Sequential(
            Permuted(lambda x: x[:, 0].argsort()),
            nn.BatchNorm1d(OUTPUTS, momentum=0.0),
            nn.Tanh(),
            nn.Linear(OUTPUTS, OUTPUTS),
        )
    ),
}
"""Networks that couple samples in training, where the batch as it ran is what counts, and not in evaluation."""
