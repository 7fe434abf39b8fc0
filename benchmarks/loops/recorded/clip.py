"""Contrastive learning of two encoders with a learnt temperature, in the manner of openai/CLIP, clip/model.py.

https://github.com/openai/CLIP/blob/main/clip/model.py; trained as in its paper, figure 3
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pathkernel as pk

words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class CLIP(nn.Module):
    def __init__(self, embed_dim=12):
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, embed_dim))
        self.token_embedding = nn.Embedding(27, 12)
        self.text_projection = nn.Linear(60, embed_dim)
        self.logit_scale = nn.Parameter(torch.ones([]) * np.log(1 / 0.07))

    def encode_image(self, image):
        return self.visual(image)

    def encode_text(self, text):
        return self.text_projection(torch.tanh(self.token_embedding(text)).flatten(1))

    def forward(self, image, text):
        image_features = self.encode_image(image)
        text_features = self.encode_text(text)
        image_features = image_features / image_features.norm(dim=1, keepdim=True)
        text_features = text_features / text_features.norm(dim=1, keepdim=True)
        logit_scale = self.logit_scale.exp()
        logits_per_image = logit_scale * image_features @ text_features.t()
        logits_per_text = logits_per_image.t()
        return logits_per_image, logits_per_text


def tokenize(word):
    return torch.tensor([ord(letter) - 96 for letter in word.ljust(5, "`")])


def main(epochs=3):
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    texts = torch.stack([tokenize(words[label]) for label in labels])
    dataset = TensorDataset(images[:240], texts[:240])
    dataloader = DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)

    model = CLIP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.2)
    with pk.KernelRecorder(model, optimizer, data=len(dataset), task="regression") as recorder:
        for _ in range(epochs):
            for image, text in recorder.track(dataloader, keep=True):
                optimizer.zero_grad()
                logits_per_image, logits_per_text = model(image, text)
                ground_truth = torch.arange(len(image))
                image_loss = F.cross_entropy(logits_per_image, ground_truth)
                text_loss = F.cross_entropy(logits_per_text, ground_truth)
                loss = (image_loss + text_loss) / 2
                loss.backward()
                optimizer.step()
                with torch.no_grad(), recorder.channel("clamp"):
                    model.logit_scale.clamp_(0, np.log(100))
    return {model: (images[240:244], texts[240:244])}


if __name__ == "__main__":
    main()
