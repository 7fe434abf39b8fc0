"""The training programs of `loops.py`: what each is, how long a short run is, and what is asked of its network."""

from __future__ import annotations

from _programs import Program
from torch import Tensor

QUERIES = 4
"""Samples of which every program gives as many for explanation."""


def time_first(returned: Tensor) -> Tensor:
    """Outputs (T, B, V), or (T·B, V), with the samples along the first axis."""
    return returned.reshape(-1, QUERIES, returned.shape[-1]).transpose(0, 1)


PROGRAMS = {
    "mnist": Program("image classifier, Adadelta, dropout", 1),
    "vae": Program("variational autoencoder", 2, outputs=64),
    "siamese": Program("random pairs of images, BatchNorm", 1, outputs=0),
    "dcgan": Program("both networks of a GAN, BatchNorm", 1, outputs=0),
    "lstm_language_model": Program(
        "LSTM, dropout, state carried on, updated by hand", 1, outputs=3, axes=(1, 1), rows=time_first
    ),
    "transformer_language_model": Program(
        "transformer, dropout, updated by hand", 1, outputs=3, axes=(1,), rows=time_first
    ),
    "nanogpt": Program("(logits, loss), accumulation, clipping, warm-up, decay groups", 8, outputs=3),
    "makemore": Program("characters, endless sampler", 12, outputs=3),
    "reinforce": Program("policy gradient with dropout", 4, outputs=0),
    "gcn": Program("graph network, all nodes at once", 8),
    "tabular": Program("two inputs, early stopping, best weights loaded", 6),
    "mixup": Program("mixup, BatchNorm", 1),
    "augmentation": Program("random augmentation in the Dataset, BatchNorm", 1),
    "clip": Program("contrastive, similarity matrix, learnt temperature", 1, outputs=0, part="visual"),
    "wgan_gp": Program("critic with gradient penalty", 1, outputs=0),
    "checkpointing": Program("gradient checkpointing, dropout", 1),
    "compiled": Program("torch.compile, dropout", 1),
    "muon": Program("Muon and AdamW", 8, outputs=3),
    "finetune": Program("SGD for the backbone, AdamW for the head, BatchNorm", 1),
    "bert": Program("padded texts, masks, keyword inputs, (loss, logits)", 1),
    "distillation": Program("live teacher, two views, dropout", 1),
    "truncated_bptt": Program("hidden state carried on", 1, outputs=3, axes=(0, 1)),
    "bfloat16": Program("autocast to bfloat16", 1, tolerance=2e-3),
    "lbfgs": Program("LBFGS: refused", 1, refused="LBFGS"),
}
"""By the name of the file."""
