"""The training programs of `frameworks.py`, by framework: what each is, and what is asked of its network.

Each is `frameworks/plain/<name>.py` and `frameworks/recorded/<name>.py`, the same program with the callback's lines,
and has `main(steps)`, which returns its trained network, the one that is watched, with a few samples to explain.
"""

from __future__ import annotations

from _programs import Program

LIGHTNING: dict[str, Program] = {
    "lightning_classifier": Program("convolutions with dropout, validation, the best checkpoint kept", 8, length=30),
    "lightning_autoencoder": Program("two parts that are called one after the other, no forward", 8, length=30),
    "lightning_manual": Program("manual optimization, two optimizers of one network", 8, length=30),
    "lightning_gan": Program("a critic and its generator, recorded each", 6, length=20),
    "lightning_accumulate": Program("accumulation, clipping, schedule", 8, length=24),
    "lightning_bfloat16": Program("mixed precision, bfloat16", 8, length=24, tolerance=2e-3),
    "lightning_early_stopping": Program("early stopping, the best weights loaded", 20, length=40),
    "lightning_fit_twice": Program("fit called twice", 8, length=20),
    "lightning_resume": Program("cut off, gone on with from a checkpoint", 8, length=20),
    "lightning_two_loaders": Program("two train loaders", 6, length=20),
}

TRAINER: dict[str, Program] = {
    "trainer_classification": Program("BERT shape, default collator, columns removed", 4, length=20),
    "trainer_language_model": Program(
        "GPT-2 shape, padding, accumulation, mean over tokens", 3, outputs=50, length=10, returns="logits"
    ),
    "trainer_masked": Program(
        "BERT shape, attention masks, masks drawn anew", 4, outputs=50, length=12, returns="logits"
    ),
    "trainer_accumulation": Program("accumulation, clipping, schedule, smoothed labels, validation", 4, length=15),
    "trainer_checkpointing": Program(
        "GPT-2 shape, gradient checkpoints, fused AdamW", 3, outputs=50, length=10, returns="logits"
    ),
    "trainer_resume": Program("cut off, gone on with from a checkpoint", 8, length=12),
    "trainer_bfloat16": Program("mixed precision, bfloat16", 4, length=12, tolerance=2e-3),
}

SKORCH: dict[str, Program] = {
    "skorch_classifier": Program("classifier with a softmax of its own, held-out samples", 2, length=6),
    "skorch_regressor": Program("regressor in a pipeline", 2, length=6),
    "skorch_grid_search": Program("search over folds, the best net fitted again", 2, length=4),
    "skorch_accumulation": Program("gradients accumulated by a net of one's own", 2, length=6),
    "skorch_checkpoint": Program("one logit, the best checkpoint loaded", 3, length=8),
}

ACCELERATE: dict[str, Program] = {
    "accelerate_accumulate": Program("Accelerate: accumulation and clipping, schedule", 4, length=20),
    "accelerate_bfloat16": Program("Accelerate: mixed precision, bfloat16", 4, length=20, tolerance=2e-3),
    "accelerate_checkpoint": Program("Accelerate: cut off, gone on with from a saved state", 4, length=12),
    "accelerate_cv": Program("Accelerate: batches dispatched, images normalised on the way", 4, length=20),
    "accelerate_early_stopping": Program("Accelerate: early stopping", 4, length=20),
    "fabric_mnist": Program("Fabric: digits, several epochs", 1, length=3),
    "fabric_bfloat16": Program("Fabric: mixed precision, bfloat16", 4, length=20, tolerance=2e-3),
}

PROGRAMS = {"Lightning": LIGHTNING, "Trainer": TRAINER, "skorch": SKORCH, "Accelerate": ACCELERATE}
"""Framework → name of the files → program, with numbers of steps; those of Fabric are with those of Accelerate."""

CASES = {"Lightning": 6, "Trainer": 5, "skorch": 3, "Accelerate": 3}
"""How many of each framework there are to be at least."""

LINES_LIMIT = dict.fromkeys(PROGRAMS, 2)
"""How many lines the recorder may take."""
