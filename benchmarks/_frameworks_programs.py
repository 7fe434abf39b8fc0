"""The training programs of `frameworks.py`, by framework: what each is, and what is asked of its network.

Each is `frameworks/plain/<name>.py` and `frameworks/recorded/<name>.py`, the same program with the callback's lines,
and has `main(steps)`, which returns its trained network, the one that is watched, with a few samples to explain.
"""

from __future__ import annotations

from _programs import Program

LIGHTNING: dict[str, Program] = {}

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
    # Rows and batches round differently, by up to the distance of 1 and the next number.
    "trainer_bfloat16": Program("mixed precision, bfloat16", 4, length=12, tolerance=2**-7),
}

SKORCH: dict[str, Program] = {}

ACCELERATE: dict[str, Program] = {
    "accelerate_accumulate": Program("Accelerate: accumulation and clipping, schedule", 4, length=20),
}

PROGRAMS = {"Lightning": LIGHTNING, "Trainer": TRAINER, "skorch": SKORCH, "Accelerate": ACCELERATE}
"""Framework → name of the files → program, with numbers of steps; those of Fabric are with those of Accelerate."""

CASES = {"Lightning": 6, "Trainer": 5, "skorch": 3, "Accelerate": 3}
"""How many of each framework there are to be at least."""

LINES_LIMIT = {"Lightning": 2, "Trainer": 2, "skorch": 2, "Accelerate": 3}
"""How many lines the recorder may take: those of Accelerate and Fabric are recipes, without a callback."""
