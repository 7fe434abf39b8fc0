"""The training programs of `frameworks.py`, by framework: what each is, and what is asked of its network.

Each is `frameworks/plain/<name>.py` and `frameworks/recorded/<name>.py`, the same program with the callback's lines,
and has `main(steps)`, which returns its trained network, the one that is watched, with a few samples to explain.
"""

from __future__ import annotations

from _programs import Program

LIGHTNING: dict[str, Program] = {}

TRAINER: dict[str, Program] = {}

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
