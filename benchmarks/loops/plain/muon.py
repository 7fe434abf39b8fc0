"""Muon for matrices and AdamW for the rest, in the manner of KellerJordan/modded-nanogpt, train_gpt.py.

https://github.com/KellerJordan/modded-nanogpt/blob/master/train_gpt.py
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW, Muon

vocab_size, sequence_length = 16, 10


class Block(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.c_fc = nn.Linear(n_embd, 2 * n_embd, bias=False)
        self.mlp_proj = nn.Linear(2 * n_embd, n_embd, bias=False)

    def forward(self, x):
        q, k, v = self.c_attn(F.rms_norm(x, (x.size(-1),))).chunk(3, dim=-1)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp_proj(F.relu(self.c_fc(F.rms_norm(x, (x.size(-1),)))).square())


class GPT(nn.Module):
    def __init__(self, n_layer=2, n_embd=16):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.h = nn.ModuleList([Block(n_embd) for _ in range(n_layer)])
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, idx, targets):
        x = F.rms_norm(self.wte(idx), (self.wte.embedding_dim,))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(F.rms_norm(x, (x.size(-1),)))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class DistributedDataLoader:
    """Walks through the text, batch after batch, and begins anew at its end."""

    def __init__(self, tokens, B, T):
        self.tokens, self.B, self.T, self.position = tokens, B, T, 0

    def next_batch(self):
        buffer = self.tokens[self.position : self.position + self.B * self.T + 1]
        self.position += self.B * self.T
        if self.position + self.B * self.T + 1 > len(self.tokens):
            self.position = 0
        return buffer[:-1].view(self.B, self.T), buffer[1:].view(self.B, self.T)


def text(length):
    """Characters that follow each other with some regularity."""
    characters = torch.zeros(length, dtype=torch.int64)
    jumps = torch.randint(1, 4, (length,))
    for t in range(1, length):
        characters[t] = (2 * characters[t - 1] + jumps[t]) % vocab_size
    return characters


def main(num_iterations=30, warmdown_iters=10):
    torch.manual_seed(0)
    train_loader = DistributedDataLoader(text(600), B=8, T=sequence_length)
    model = GPT()
    optimizer1 = AdamW([model.wte.weight, model.lm_head.weight], lr=3e-3, betas=(0.9, 0.95), fused=True)
    optimizer2 = Muon(model.h.parameters(), lr=0.02, momentum=0.95)
    optimizers = [optimizer1, optimizer2]

    def get_lr(it):
        return 1.0 if it < num_iterations - warmdown_iters else (num_iterations - it) / warmdown_iters

    schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, get_lr) for opt in optimizers]

    x, y = train_loader.next_batch()
    for _ in range(num_iterations):
        logits, loss = model(x, y)
        x, y = train_loader.next_batch()
        loss.backward()
        for opt, sched in zip(optimizers, schedulers, strict=True):
            opt.step()
            sched.step()
        model.zero_grad(set_to_none=True)
    return {model: (x[:4], y[:4])}


if __name__ == "__main__":
    main()
