"""The least that the structured methods must do: multiplications counted layer by layer, and bytes that must move.

A floor is FLOPs / the speed of a large float32 matrix product + bytes / the speed of memory, both measured in the same
run. A multiply-add is 2 FLOPs. Elementwise work, and memory traffic that a fused product would avoid, count nothing.

For one linear map y = W a at T positions of a sample, with C back-propagated signals δ (one for each output), the
contribution of its weight to ⟨∇f(x), ∇f(x')⟩ can be had in two ways, and the cheaper one is counted:

positions  Σ_tt' (a_t·a'_t') (δ_t·δ'_t'):  2 T² (d_in + C' d_out)  for each pair of samples
matrices   G = Σ_t δ_t a_tᵀ, then ⟨G, G'⟩: 2 C T d_in d_out  for each sample, 2 C' d_in d_out  for each pair

with C' = C for the trace and C² for full blocks. Pairs are N (N + 1) / 2 where the kernel is symmetric (of full blocks
those of N C rows) and N M otherwise. The bias makes d_in one larger. The last layer's δ are unit vectors: its kernel
is a·a' + 1 for every output, and the first δ that must be computed is its weight, for nothing.

What counts on a network beyond its layers is not in the floor: where only activations lie between the last hidden layer
and the output layer, δ_c = w_c ∘ φ', and the trace of that hidden layer needs d_out in place of C d_out. `spared` says
how many FLOPs the floor has too many by that; targets and ratios of all times are with the floor as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from _workloads import HEADS, IMAGE, LAYERS, MODEL_WIDTH, OUTPUTS, TOKENS, VOCABULARY, Task


@dataclass(frozen=True)
class Linear:
    """W (d_out, d_in) at some positions of each sample; convolutions are linear in their patches."""

    d_in: int
    d_out: int
    positions: int = 1
    first: bool = False
    """No gradient of its inputs is needed."""
    last: bool = False
    """Its outputs are the network's."""

    @property
    def size(self) -> int:
        return (self.d_in + 1) * self.d_out


@dataclass(frozen=True)
class Affine:
    """Weights whose gradient in one sample is elementwise work (norms, tables of embeddings); the products are not."""

    size: int


Layer = Linear | Affine


def layers_of(task: Task) -> list[Layer]:
    if task.network == "mlp":
        w = task.width
        return [Linear(64, w, first=True), Linear(w, w), Linear(w, OUTPUTS, last=True)]
    if task.network == "cnn":
        fine, coarse = IMAGE**2, (IMAGE // 2) ** 2
        head = Linear(64 * (IMAGE // 4) ** 2, OUTPUTS, last=True)
        return [Linear(9, 32, fine, first=True), Linear(9 * 32, 64, coarse), Affine(2 * 64), head]
    d, t = MODEL_WIDTH, TOKENS
    mixing = [Affine(2 * d), Linear(d, 3 * d, t), Linear(d, d, t)]
    block = [*mixing, Affine(2 * d), Linear(d, 2 * d, t), Linear(2 * d, d, t)]
    return [Affine(VOCABULARY * d), Affine(t * d), *(block * LAYERS), Affine(2 * d), Linear(d, VOCABULARY, t)]


def parameters_of(task: Task) -> int:
    return sum(layer.size for layer in layers_of(task))


def inner(layers: list[Layer]) -> list[Layer]:
    """The same with a loss behind the last layer, whose δ is then a signal as any other."""
    return [Linear(x.d_in, x.d_out, x.positions, x.first) if isinstance(x, Linear) else x for x in layers]


def forward(layers: list[Layer], samples: int) -> float:
    """2 T d_in d_out for each linear map."""
    return samples * sum(2.0 * x.positions * x.d_in * x.d_out for x in layers if isinstance(x, Linear))


def backward(layers: list[Layer], samples: int, signals: int) -> float:
    """The same for every signal, but for the first layer and, where signals are outputs, the last."""
    needed = [x for x in layers if isinstance(x, Linear) and not x.first and not x.last]
    return samples * signals * sum(2.0 * x.positions * x.d_in * x.d_out for x in needed)


def attention(task: Task, samples: int) -> float:
    """Scores and mixtures below the diagonal: forward 4 T (T + 1)/2 d, and backward twice that."""
    if task.network != "transformer":
        return 0.0
    assert MODEL_WIDTH % HEADS == 0
    return 3.0 * samples * LAYERS * 4 * (TOKENS * (TOKENS + 1) / 2) * MODEL_WIDTH


def contraction(layer: Layer, samples: int, sample_pairs: float, row_pairs: float, signals: int) -> float:
    """FLOPs of one layer's part of the kernel.

    Parameters
    ----------
    samples, signals
        How many samples there are in all (queries and references), and signals for each.
    sample_pairs, row_pairs
        Pairs of samples, and of signals of samples (C for each pair of samples for the trace, C² for full blocks).
    """
    if isinstance(layer, Affine):
        return 2.0 * row_pairs * layer.size
    if layer.last:
        return 2.0 * sample_pairs * layer.d_in
    d_in, t = layer.d_in + 1, layer.positions
    by_positions = 2.0 * t * t * (sample_pairs * d_in + row_pairs * layer.d_out)
    forming = 2.0 * samples * signals * t * d_in * layer.d_out if t > 1 else 0.0
    return min(by_positions, forming + 2.0 * row_pairs * d_in * layer.d_out)


def gram_products(task: Task) -> float:
    """FLOPs of the kernel's products alone."""
    n, m = task.queries, task.references
    signals = 1 if task.outputs == "loss" else OUTPUTS
    sample_pairs = n * m if m else n * (n + 1) / 2
    row_pairs = sample_pairs * signals
    if task.outputs == "full":
        row_pairs = n * m * signals**2 if m else n * signals * (n * signals + 1) / 2
    layers = layers_of(task) if task.outputs != "loss" else inner(layers_of(task))
    return sum(contraction(layer, n + m, sample_pairs, row_pairs, signals) for layer in layers)


def spared(task: Task) -> float:
    """FLOPs of `gram_products` that the trace of a perceptron can do without: see the top of this file."""
    if task.network != "mlp" or task.outputs != "trace":
        return 0.0
    n, m = task.queries, task.references
    sample_pairs = n * m if m else n * (n + 1) / 2
    return 2.0 * sample_pairs * (OUTPUTS - 1) * task.width


def passes(task: Task) -> float:
    """FLOPs of the forward and backward passes of one Gram matrix."""
    n, layers = task.queries + task.references, layers_of(task)
    signals = 1 if task.outputs == "loss" else OUTPUTS
    if task.outputs == "loss":
        layers = inner(layers)
    return forward(layers, n) + backward(layers, n, signals) + attention(task, n)


def gram(task: Task) -> tuple[float, float]:
    """FLOPs and bytes of one tangent kernel."""
    return gram_products(task) + passes(task), 0.0


def path_gram(task: Task) -> tuple[float, float]:
    """A trapezoid has one node more than steps."""
    nodes = task.steps + 1
    return nodes * gram(task)[0], nodes * 4.0 * parameters_of(task)


def shares(task: Task) -> tuple[float, float]:
    """FLOPs and bytes of the backward sweep, one query gradient a step (midpoint).

    Each step runs the queries forward and backward at the midpoint (one output each) and the batch at θ_s. The
    discrete gradient adds a forward pass of the queries at the end of the step, ∇f(m)·Δ (as much again), and ⟨Δ, ∇ℓ_i⟩
    of the batch. Then

    SGD    the query's gradient is of rank one, layer by layer:  2 Q B (d_in + d_out)
    AdamW  it is added to a memory of Q × P numbers, read and written: 8 Q P bytes; contracted with the batch: 2 Q B P

    and θ is read twice (queries and batch), 8 P bytes, the shares read and written, 16 Q B bytes.
    """
    q, b, layers, size = task.queries, task.batch, layers_of(task), parameters_of(task)
    work = forward(layers, q) + backward(layers, q, 1)
    losses = inner(layers)
    work += forward(losses, b) + backward(losses, b, 1)
    if task.quadrature == "discrete_gradient":
        work += 2 * forward(layers, q) + forward(layers, b)
    moved = 8.0 * size + 16.0 * q * b
    if task.optimizer == "SGD":
        work += sum(2.0 * q * b * (x.d_in + 1 + x.d_out) for x in losses if isinstance(x, Linear))
    else:
        work += 2.0 * q * b * size
        moved += 8.0 * q * size
    return task.steps * work, task.steps * moved


FLOORS = {"gram": gram, "path gram": path_gram, "shares": shares}


def count(task: Task) -> tuple[float, float]:
    """FLOPs and bytes that a task takes at least."""
    return FLOORS[task.kind](task)
