"""A budget is kept within a tenth, or refused before anything is computed, with one that suffices."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
from pathkernel.gradients.pytrees import memory_bytes
import sys, threading, time, re
import torch, pathkernel as pk
from torch import nn
torch.set_num_threads(1)
budget, kind, optimizer, ask, queries = sys.argv[1:]
torch.manual_seed(0)
if kind == "mlp":
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    X = torch.randn(400, 64)
else:
    middle = [nn.BatchNorm2d(16)] if kind == "batch norm" else []
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10))
    X = torch.randn(200, 3, 32, 32)
y = torch.randint(10, (len(X),))
opt = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](net.parameters(), lr=1e-3)
loss = nn.CrossEntropyLoss()
with pk.KernelRecorder(net, opt, loss, data=(X, y), audit_every=0) as recorder:
    for x, t in recorder.batches(100):
        opt.zero_grad(); loss(net(x), t).backward(); opt.step()
pk.KernelMachine(recorder.trajectory)  # loads what torch needs at the first use of its transformations
def call(memory):
    machine = pk.KernelMachine(recorder.trajectory, memory=memory)
    return machine.explain(X[:int(queries)]) if ask == "explain" else machine.decision_function(X[:int(queries)])

resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
start, top, on = resident(), [0], [True]
def watch():
    while on[0]:
        top[0] = max(top[0], resident()); time.sleep(0.002)
thread = threading.Thread(target=watch, daemon=True); thread.start()
try:
    call(budget)
except pk.errors.InputError as refusal:
    budget = re.search('memory="([^"]+)"', str(refusal))[1]
    assert top[0] - start < 2e8
    call(budget)
on[0] = False
print(budget, (top[0] - start) / 1e6, memory_bytes(budget) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("budget", "kind", "optimizer", "ask"),
    [
        ("20MB", "mlp", "adam", "explain"),  # with little room, one query after the other
        pytest.param("60MB", "mlp", "adam", "explain", marks=pytest.mark.exhaustive),
        ("60MB", "mlp", "sgd", "decision"),
        pytest.param("20MB", "conv", "sgd", "explain", marks=pytest.mark.exhaustive),
        ("150MB", "conv", "adam", "explain"),
        pytest.param("150MB", "batch norm", "sgd", "explain", marks=pytest.mark.exhaustive),  # test_memory_plan has one
    ],
)
def test_a_budget_is_kept_or_refused(budget: str, kind: str, optimizer: str, ask: str) -> None:
    script, queries = textwrap.dedent(SCRIPT), "2" if budget == "20MB" else "60"  # one takes some ten seconds there
    done = subprocess.run(
        [sys.executable, "-c", script, budget, kind, optimizer, ask, queries],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, peak, allowed = done.stdout.split()
    assert float(peak) <= 1.1 * float(allowed)
