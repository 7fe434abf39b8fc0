"""Optimizers read as dynamics: discretised flows and the motion of a body, each with its update rule.

Every optimizer names its rule, which the recorder is given: ``KernelRecorder(..., optimizer, ..., rule=Lion.rule())``.
"""
