"""A character model of names with an endless sampler, in the manner of karpathy/makemore, makemore.py.

https://github.com/karpathy/makemore/blob/master/makemore.py
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

names = """ada bea cara dana ella fae gina hana ida jana kaya lena mara nina oda pia rena sara tara una vera willa
alan boris carl dan emil finn gary henri ivan jonas karl leo max nico otto paul robin sam timo udo viktor""".split()


class CharDataset(Dataset):
    def __init__(self, words):
        self.words = words
        self.chars = sorted(set("".join(words)))
        self.stoi = {ch: i + 1 for i, ch in enumerate(self.chars)}
        self.max_word_length = max(len(w) for w in words)

    def __len__(self):
        return len(self.words)

    def __getitem__(self, idx):
        ix = torch.tensor([self.stoi[c] for c in self.words[idx]])
        x = torch.zeros(self.max_word_length + 1, dtype=torch.long)
        y = torch.zeros(self.max_word_length + 1, dtype=torch.long)
        x[1 : 1 + len(ix)] = ix
        y[: len(ix)] = ix
        y[len(ix) + 1 :] = -1  # -1 masks the loss at the inactive locations
        return x, y


class InfiniteDataLoader:
    """Puts the iterator of the data loader behind a `next` that never ends."""

    def __init__(self, dataset, **kwargs):
        train_sampler = RandomSampler(dataset, replacement=True, num_samples=int(1e10))
        self.train_loader = DataLoader(dataset, sampler=train_sampler, **kwargs)
        self.data_iter = iter(self.train_loader)

    def next(self):
        try:
            batch = next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.train_loader)
            batch = next(self.data_iter)
        return batch


class MLP(nn.Module):
    """Takes the previous tokens, encodes them with a lookup table, and predicts the next token (Bengio et al. 2003)."""

    def __init__(self, vocab_size, block_size=3, n_embd=8, n_embd2=24):
        super().__init__()
        self.block_size, self.vocab_size = block_size, vocab_size
        self.wte = nn.Embedding(vocab_size + 1, n_embd)  # one more for <BLANK>, before the first token
        self.mlp = nn.Sequential(nn.Linear(block_size * n_embd, n_embd2), nn.Tanh(), nn.Linear(n_embd2, vocab_size))

    def forward(self, idx, targets=None):
        embs = []
        for _ in range(self.block_size):
            embs.append(self.wte(idx))
            idx = torch.roll(idx, 1, 1)
            idx[:, 0] = self.vocab_size
        logits = self.mlp(torch.cat(embs, -1))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


def main(max_steps=60):
    torch.manual_seed(3407)
    train_dataset = CharDataset(names)
    model = MLP(len(train_dataset.chars) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8)
    batch_loader = InfiniteDataLoader(train_dataset, batch_size=8)

    step = 0
    while True:
        batch = batch_loader.next()
        X, Y = batch
        logits, loss = model(X, Y)
        model.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step >= max_steps:
            break
    x, _ = next(iter(DataLoader(train_dataset, batch_size=4)))
    return {model: x}


if __name__ == "__main__":
    main()
