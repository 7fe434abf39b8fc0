"""Modules whose class has a rule of its own, met as one call each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pathkernel.gradients.layers.rules import RULES
from pathkernel.gradients.layers.tracing import ParameterTracer
from pathkernel.gradients.model_function import ModelFunction


@contextmanager
def module_rules(function: ModelFunction, tracer: ParameterTracer) -> Iterator[None]:
    """Let the modules whose class has a rule of its own be one call each, and the tracer know where a pass begins."""
    beginning = function.called[0].register_forward_pre_hook(lambda *_: tracer.begin(), prepend=True)
    patched = [child for child in function.module.modules() if type(child) in RULES and "forward" not in vars(child)]
    for child in patched:
        rule = RULES[type(child)]
        child.forward = lambda *inputs, m=child, r=rule: tracer.module_call(m, r, inputs)
    try:
        yield
    finally:
        beginning.remove()
        for child in patched:
            del child.forward
