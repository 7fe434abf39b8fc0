"""neural-tangents at the same work, jitted, in each implementation that runs. No torch in this environment."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.interpreters.ad as automatic_differentiation
import jax.numpy as jnp
import numpy as np
from _workloads import GROUPS, HEADS, IMAGE, LAYERS, MODEL_WIDTH, OUTPUTS, TOKENS, Task
from jax import lax
from jax._src import source_info_util

Arrays = dict[str, np.ndarray]
Call = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]

# Three repairs of neural-tangents 0.6.5 under the newest jax that it can be imported with. Its `experimental` part
# wants TensorFlow and has nothing to do with kernels; its structured derivatives look for two names where they were.
sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")
automatic_differentiation.source_info_util = source_info_util
automatic_differentiation.config = types.SimpleNamespace(jax_enable_checks=False)

import neural_tangents as nt  # noqa: E402

Parameters = dict[str, Any]


def linear(p: Parameters, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def mlp(p: Parameters, x: Any) -> Any:
    hidden = jnp.maximum(linear(p, "0", x), 0)
    return linear(p, "4", jnp.maximum(linear(p, "2", hidden), 0))


def convolution(p: Parameters, name: str, x: Any) -> Any:
    layout = ("NCHW", "OIHW", "NCHW")
    z = lax.conv_general_dilated(x, p[f"{name}.weight"], (1, 1), "SAME", dimension_numbers=layout)
    return z + p[f"{name}.bias"][:, None, None]


def pooled(x: Any) -> Any:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))


def cnn(p: Parameters, x: Any) -> Any:
    z = convolution(p, "3", pooled(jnp.maximum(convolution(p, "0", x), 0)))
    n, c, h, w = z.shape
    groups = z.reshape(n, GROUPS, -1)
    centred = groups - groups.mean(axis=2, keepdims=True)
    z = (centred / jnp.sqrt((centred**2).mean(axis=2, keepdims=True) + 1e-5)).reshape(n, c, h, w)
    z = jnp.maximum(z * p["4.weight"][:, None, None] + p["4.bias"][:, None, None], 0)
    return linear(p, "8", pooled(z).reshape(n, 64 * (IMAGE // 4) ** 2))


def layer_norm(p: Parameters, name: str, x: Any) -> Any:
    centred = x - x.mean(axis=-1, keepdims=True)
    normalised = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return normalised * p[f"{name}.weight"] + p[f"{name}.bias"]


def transformer(p: Parameters, tokens: Any) -> Any:
    n, t, d = len(tokens), TOKENS, MODEL_WIDTH
    x = p["embedding.weight"][tokens] + p["position.weight"]
    causal = jnp.tril(jnp.ones((t, t), dtype=bool))
    for layer in range(LAYERS):
        name = f"blocks.{layer}"
        qkv = linear(p, f"{name}.qkv", layer_norm(p, f"{name}.norm1", x))
        q, k, v = jnp.transpose(qkv.reshape(n, t, 3, HEADS, d // HEADS), (2, 0, 3, 1, 4))
        scores = jnp.where(causal, q @ jnp.swapaxes(k, -1, -2) / (d // HEADS) ** 0.5, -1e30)
        mixed = jnp.transpose(jax.nn.softmax(scores) @ v, (0, 2, 1, 3)).reshape(n, t, d)
        x = x + linear(p, f"{name}.out", mixed)
        hidden = linear(p, f"{name}.up", layer_norm(p, f"{name}.norm2", x))
        x = x + linear(p, f"{name}.down", jax.nn.gelu(hidden, approximate=False))
    return linear(p, "head", layer_norm(p, "norm", x))


def losses(network: Callable[[Parameters, Any], Any]) -> Callable[[Parameters, Any], Any]:
    """Cross-entropy of each sample as its one output; the target travels in the columns after the inputs."""

    def function(p: Parameters, pairs: Any) -> Any:
        width = pairs.shape[1] - TOKENS if network is transformer else pairs.shape[1] - 1
        logits, targets = network(p, pairs[:, :width]), pairs[:, width:].astype(int)
        logits = logits.reshape(len(pairs), targets.shape[1], -1)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=2)
        return -chosen[:, :, 0].mean(axis=1, keepdims=True)

    return function


class CannotDo(RuntimeError):
    """The library has no way to do this."""


CONTRACTION, PRODUCTS, STRUCTURED = 1, 2, 3


def neural_tangents(task: Task, arrays: Arrays, implementation: int) -> Call:
    if implementation == STRUCTURED and task.network == "transformer":
        raise CannotDo("has no structured rule for embeddings; takes a minute and 6 GB for 5 samples of this network")
    prefix = "theta/"
    parameters = {name.removeprefix(prefix): jnp.asarray(a) for name, a in arrays.items() if name.startswith(prefix)}
    network = {"mlp": mlp, "cnn": cnn, "transformer": transformer}[task.network]

    def samples(x: str, y: str) -> Any:
        if task.outputs != "loss":
            return jnp.asarray(arrays[x])
        targets = arrays[y].reshape(len(arrays[y]), -1).astype(arrays[x].dtype)
        return jnp.asarray(np.concatenate([arrays[x], targets], axis=1))

    Xq, X = samples("Xq", "yq"), samples("X", "y") if "X" in arrays else None
    kernel = jax.jit(
        nt.empirical_ntk_fn(
            network if task.outputs != "loss" else losses(network),
            trace_axes=() if task.outputs == "full" else (-1,),
            vmap_axes=0,
            implementation=implementation,
        )
    )
    # Its trace is the mean over the outputs.
    scale = float(OUTPUTS) if task.outputs == "trace" else 1.0
    return lambda: kernel(Xq, X, parameters).block_until_ready(), lambda K: scale * np.asarray(K)


METHODS = {
    "neural-tangents-contraction": lambda task, arrays: neural_tangents(task, arrays, CONTRACTION),
    "neural-tangents-products": lambda task, arrays: neural_tangents(task, arrays, PRODUCTS),
    "neural-tangents-structured": lambda task, arrays: neural_tangents(task, arrays, STRUCTURED),
}
