r"""Proof that a tape sees every parameter exactly as autograd does; what it does not is named, with the reason.

Reused modules, tied weights, parameters used by functions, in-place operations, samples that are sorted or routed
inside: each of them has made a known library silently wrong. So before a tape is believed, the gradients of a few
samples in random directions of the outputs are compared with autograd's, parameter by parameter, in float64 and at a
generic point near θ (where nothing is zero by initialisation). Once for each sequence of calls and shape of samples.

The few are distinct, in random order, and their number is none of the lengths that occur in the network, so that no
other axis is taken for that of the samples; `ProvedTapes` sees that nothing changes at the number in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Float, PyTree
from pathkernel.gradients.forward_state import hashable
from pathkernel.gradients.layers.batch_axis import NO_ROLES, Arrangement, Roles
from pathkernel.gradients.layers.proofs import Coverage, TapeProofs
from pathkernel.gradients.layers.tape import FAILURES, Tape
from pathkernel.gradients.losses import weighted_gradient
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.gradients.per_sample import ROW_LIMIT, error_of_rows, random_signs
from pathkernel.gradients.pytrees import count
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.runtime.workspace import Workspace

TOLERANCE = 1e-9
"""Relative difference between a parameter's gradients on the tape and by autograd that is rounding in float64."""

SAMPLES = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)
"""Numbers of samples that are compared, and that a second pass has, to see along which axis they lie: the first two
that are no lengths in the network."""

JITTER = 0.01
"""Relative size of the noise on floating inputs, which makes repeated samples distinct and leaves zeros alone."""


def prove(function: ModelFunction, theta: Float[Tensor, " P"], inputs: PyTree, lengths: Iterable[int] = ()) -> Coverage:
    """Compare a tape with autograd, parameter by parameter.

    Parameters
    ----------
    function
        The network; compared in float64.
    theta
        θ near which the comparison is made.
    inputs
        Samples, some of which are used.
    lengths
        Lengths of axes in the network, which the numbers of samples are to differ from.
    """
    known = set(lengths)
    sizes = [n for n in SAMPLES if n not in known][:2] or list(SAMPLES[:2])
    found = result_or_error(lambda: _proved(function.converted(torch.float64), theta.double(), inputs, sizes), FAILURES)
    return uncovered(function, found) if isinstance(found, Exception) else found


def uncovered(function: ModelFunction, error: Exception) -> Coverage:
    """Nothing: the network does not run under a tape."""
    reason = f"the network could not be taken apart ({type(error).__name__})"
    return Coverage((), dict.fromkeys(function.layout.names, reason), 0.0)


def _proved(function: ModelFunction, theta: Tensor, inputs: PyTree, sizes: Sequence[int]) -> Coverage:
    generator = torch.Generator().manual_seed(0)
    scale = 1e-2 * theta.abs().mean().clamp_min(1e-2)
    point = theta + scale * torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta)
    few, fewer = (distinct(inputs, n, generator) for n in (sizes[0], sizes[-1]))
    tape, other = _apart(function, point, few, fewer)
    roles, arrangements = tape.roles, _arrangements(tape, other)
    cotangents = torch.randn(tape.outputs.shape, generator=generator, dtype=torch.float64).to(tape.outputs)
    compared = _Comparison.of(function, point, few, cotangents, generator)
    best: Coverage | None = None
    for merged in ("samples", "positions"):
        tried = tuple(replace(a, merged=merged) if a.merged else a for a in arrangements)
        found = compared.coverage(Tape(function, point, few, tried, roles=roles))
        if best is None or len(found.plain) < len(best.plain):
            best = found
        if not any(a.merged for a in arrangements):
            break
    assert best is not None
    while best.plain:  # without its weight a bias is counted in another way: compare what remains as it will be used
        tape = Tape(function, point, few, best.arrangements, best.plain, roles=roles)
        again = compared.coverage(tape)
        if again.plain.keys() == best.plain.keys():
            break
        best = again
    return best


ROUNDS = 8
"""Pairs of passes in which it is found out which results are of samples: what depends on such a result is seen in the
next one. Chosen, not measured; what is not found out by then is plain."""


def _apart(function: ModelFunction, point: Tensor, few: PyTree, fewer: PyTree) -> tuple[Tape, Tape]:
    """Two tapes of different numbers of samples, each result taken for one of samples where its shape follows them."""
    roles = NO_ROLES
    for _ in range(ROUNDS):
        one, two = (Tape(function, point, inputs, roles=roles) for inputs in (few, fewer))
        if [call.place for call in one.calls] != [call.place for call in two.calls]:
            continue  # the first pass of its kind, which computed what later ones have at hand
        shared = {
            own.place for own, other in zip(one.calls, two.calls, strict=True) if own.output.shape == other.output.shape
        }
        spread = {place for place, shapes in one.composed.items() if two.composed.get(place) != shapes}
        found = Roles(roles.shared | (shared - roles.spread), roles.spread | (spread - roles.shared))
        if found == roles:
            break
        roles = found
    return one, two


@dataclass(frozen=True)
class _Comparison:
    r"""Gradients of a few samples by autograd, for tapes to be held against, parameter by parameter.

    As the sum :math:`\sum_i s_i\, J_i^\top \lambda_i`, one reverse sweep, with random λ: rows that are another
    sample's, or to which other samples contribute, change it whichever they are, since no two of the s are the same.

    Attributes
    ----------
    function
        The network, in float64.
    cotangents, weights
        λ (n, C) and s (n,).
    expected
        The sum, (P,).
    """

    function: ModelFunction
    cotangents: Tensor
    weights: Tensor
    expected: Tensor

    @classmethod
    def of(
        cls, function: ModelFunction, point: Tensor, few: PyTree, cotangents: Tensor, generator: torch.Generator
    ) -> _Comparison:
        """Autograd's gradients of the batch as it runs, random layers included."""
        # Powers of two round nothing, also in networks that compute a part in float32 whatever they are given.
        powers = torch.randperm(len(cotangents), generator=generator) - 2
        weights = ((-2.0) ** powers).to(cotangents)
        expected = weighted_gradient(function, point, few, weights.unsqueeze(1) * cotangents).double()
        return cls(function, cotangents, weights, expected)

    def coverage(self, tape: Tape) -> Coverage:
        """Coverage of a tape, of two components.

        The second is the first times a number of each sample's own, by which its weights are divided: a sum of other
        weights, in which a rule that takes components for samples, or adds them up, shows as well, and nothing more is
        asked of autograd.
        """
        component = (tape.outputs * self.cotangents).sum(dim=1, keepdim=True)
        factors = (-2.0) ** torch.arange(-2, tape.n - 2, dtype=component.dtype, device=component.device)
        pieces = tape.pieces(torch.cat([component, factors.unsqueeze(1) * component], dim=1))
        weights = torch.stack([self.weights, self.weights / factors], dim=1).double()
        plain = dict(tape.plain)
        found = torch.zeros(2, len(self.expected), dtype=torch.float64, device=self.expected.device)
        for piece in pieces:
            for where, factor in piece.separated():
                found[:, where] += torch.einsum("nk,nkp->kp", weights, factor.rows().double())
        largest = 0.0
        floor = TOLERANCE * 1e-3 * self.expected.norm().item()
        for name, where in self.function.layout.slices.items():
            difference = (found[:, where] - self.expected[where]).norm().item()
            norm = self.expected[where].norm().item()
            if not difference <= TOLERANCE * norm + floor:
                wrong = difference / max(norm, torch.finfo(torch.float64).tiny)
                plain.setdefault(name, f"its gradients on the tape differ from autograd's by {wrong:.1g}")
            elif name not in plain:
                largest = max(largest, difference / max(norm, floor, 1e-300))
        return Coverage(tape.arrangements, plain, largest, tape.roles, tape.elementwise_before_head(TOLERANCE))


def distinct(inputs: PyTree, n: int, generator: torch.Generator) -> PyTree:
    """n samples in random order, none the same as another where that can be had: repeated ones are varied.

    Floating inputs by noise; others (tokens) by turning the positions of a sample round.
    """
    rows = torch.randperm(count(inputs), generator=generator)[:n]
    rows = rows.repeat(-(-n // len(rows)))[:n]

    def varied(leaf: Tensor) -> Tensor:
        chosen = leaf[rows]
        if chosen.is_floating_point():
            noise = torch.randn(chosen.shape, generator=generator, dtype=torch.float64)
            return chosen * (1 + JITTER * noise).to(chosen)
        turned = [own.reshape(-1).roll(place).reshape(own.shape) for place, own in enumerate(chosen)]
        return chosen if count(inputs) >= n else torch.stack(turned)

    return pytree.tree_map(varied, inputs)


def _arrangements(tape: Tape, other: Tape) -> list[Arrangement]:
    """Along which axis the samples of each use and of its arguments lie: the one whose length follows their number."""
    n, m = tape.n, other.n
    arrangements = []
    for one, two in zip(tape.calls, other.calls, strict=True):
        shape = one.output.shape
        pairs = enumerate(zip(shape, two.output.shape, strict=True))
        axes = [axis for axis, (s, t) in pairs if s != t and s * m == t * n]
        axis = axes[0] if axes else 0
        merged = "samples" if axes and shape[axis] != n else ""
        arguments = enumerate(zip(one.arguments, two.arguments, strict=True))
        along = _length(shape, axis), _length(two.output.shape, axis)
        batched = frozenset(i for i, (s, t) in arguments if axes and (_length(s, axis), _length(t, axis)) == along)
        arrangements.append(Arrangement(axis, merged, batched))
    return arrangements


def _length(shape: torch.Size | None, axis: int) -> int | None:
    return shape[axis] if shape is not None and len(shape) > axis else None


class ProvedTapes:
    r"""Records tapes of one network; a sequence of calls, or samples, not met before are proved first.

    Parameters
    ----------
    function
        The network.
    workspace
        Memory for the signals of its tapes.
    proofs
        What is proved, by default what is proved of the network whoever asked for it.

    Notes
    -----
    Two proofs. A sequence of calls with samples of a shape: parameter by parameter on a few samples in float64
    (`prove`), some five passes, once. The same with another number of samples: the rows of all of them against the
    batch run forward as it is, :math:`\langle row_i, v\rangle = \lambda_i \cdot (J v)_i` for random λ and v, two
    passes, once; where the network calls a function that may rearrange its samples, every time.
    """

    def __init__(
        self, function: ModelFunction, workspace: Workspace | None = None, proofs: TapeProofs | None = None
    ) -> None:
        self.function, self.workspace = function, workspace
        self.proofs = TapeProofs.of(function) if proofs is None else proofs
        self._latest: Coverage | None = None
        self._trying = False

    def record(
        self, theta: Float[Tensor, " P"], inputs: PyTree, function: ModelFunction | None = None, *, rows: bool = True
    ) -> Tape:
        """A forward pass of n samples at θ.

        Parameters
        ----------
        theta, inputs
            θ, (P,), and samples.
        function
            The same network with other buffers or run in another way.
        rows
            Whether rows will be made of it: those of this number of samples are proved then.
        """
        function = function or self.function
        proofs, modes = self.proofs, hashable(function.state.modes)
        latest = proofs.latest(modes)
        if latest is not None and latest.plain.keys() >= set(function.layout.names):
            self._latest = latest
            return self._tape(function, theta, inputs, *latest.known)
        known = latest.known if latest else ((), {}, NO_ROLES)
        tape = result_or_error(lambda: self._tape(function, theta, inputs, *known), FAILURES)
        if isinstance(tape, Exception):
            self._latest = uncovered(function, tape)
            proofs.note(None, modes, self._latest)
            return self._tape(function, theta, inputs, *self._latest.known)
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        kind = (function.submodule, *((leaf.shape[1:], leaf.dtype) for leaf in leaves))
        calls = (tape.roles, tape.signature, *kind)
        coverage = proofs.find(calls, modes)
        if coverage is None:
            coverage = prove(function, theta, inputs, tape.lengths)
            proofs.made += 1
        if coverage is not latest:
            proofs.note(calls, modes, coverage)
            tape = self._tape(function, theta, inputs, *coverage.known)
            calls = (tape.roles, tape.signature, *kind)
        met = (calls, tape.n, tuple(tape.shapes), modes)
        # What rearranges its samples may have other parameters left out, which takes other memory: also in a trial.
        known_rows = met in proofs.met or self._trying
        if rows and (not known_rows or tape.rearranges) and len(coverage.plain) < len(function.layout.names):
            strangers = _rows_of_others(tape, theta, inputs)
            if strangers:
                reason = f"rows of {tape.n} samples are not the samples' own: the network mixes or rearranges them"
                coverage = replace(coverage, plain={**coverage.plain, **dict.fromkeys(strangers, reason)})
                tape = self._tape(function, theta, inputs, *coverage.known)
                if len(coverage.plain) < len(function.layout.names) and _rows_of_others(tape, theta, inputs):
                    coverage = Coverage((), dict.fromkeys(function.layout.names, reason), 0.0)
                    tape = self._tape(function, theta, inputs, *coverage.known)
            if not self._trying:
                proofs.met.add(met)
        proofs.note(calls, modes, coverage)
        self._latest = coverage
        return tape

    def repeat(self, theta: Float[Tensor, " P"], inputs: PyTree, function: ModelFunction) -> Tape:
        """The pass that was recorded last once more, nothing proved: to be looked at, for no gradients."""
        assert self._latest is not None
        return self._tape(function, theta, inputs, *self._latest.known)

    def _tape(
        self,
        function: ModelFunction,
        theta: Tensor,
        inputs: PyTree,
        arrangements: tuple[Arrangement, ...],
        plain: Mapping[str, str],
        roles: Roles,
    ) -> Tape:
        return Tape(function, theta, inputs, arrangements, plain, self.workspace, roles)

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Passes whose memory is measured, and of which nothing is used: their rows need no proof of their own.

        The proof holds less at once than the gradients themselves: the signals, and after them a pass without a graph.
        """
        before, self._trying = self._trying, True
        try:
            yield
        finally:
            self._trying = before

    @property
    def coverage(self) -> Coverage | None:
        """`Coverage` of the tape recorded last; None before the first."""
        return self._latest


def _rows_of_others(tape: Tape, theta: Tensor, inputs: PyTree) -> list[str]:
    """Parameters whose rows on a tape are not those of its samples; decided in float64 where rounding might have a say.

    By the batch run forward; where that disagrees or torch has no way to it, parameter by parameter by a sweep back.
    """
    limit = ROW_LIMIT.get(tape.function.dtype, 0.0) if tape.function.state.autocast is None else 0.0
    if _error(tape, theta, inputs) <= limit:
        return []
    function, theta = tape.function.converted(torch.float64), theta.double()
    told = tape.arrangements, tape.plain, None, tape.roles
    again = result_or_error(lambda: Tape(function, theta, inputs, *told), FAILURES)
    if not isinstance(again, Exception):
        if _error(again, theta, inputs) <= ROW_LIMIT[torch.float64]:
            return []
        blamed = result_or_error(lambda: _blamed(again, theta, inputs), FAILURES)
        if not isinstance(blamed, Exception):
            return blamed
    return [name for name in function.layout.names if name not in tape.plain]


def _blamed(tape: Tape, theta: Tensor, inputs: PyTree) -> list[str]:
    r"""Parameters for which :math:`\sum_i s_i\, row_i` is not :math:`\sum_i s_i J_i^\top \lambda_i`, s and λ at random.

    Rows that are another sample's change the sum, whichever they are, since no two of the s are the same.
    """
    layout = tape.function.layout
    generator = torch.Generator().manual_seed(tape.n)
    weights = torch.randn(tape.outputs.shape, generator=generator, dtype=torch.float64).to(tape.outputs)
    s = torch.randn(tape.n, 1, generator=generator, dtype=torch.float64).to(tape.outputs)
    with torch.enable_grad():
        pieces = tape.pieces((tape.outputs * weights).sum(dim=1, keepdim=True))
    found = torch.zeros(layout.size, dtype=torch.float64, device=tape.function.device)
    for piece in pieces:
        for where, factor in piece.separated():
            found[where] += factor.weighted_sum(s.unsqueeze(2))[0]
    expected = weighted_gradient(tape.function, theta, inputs, s * weights)
    limit = ROW_LIMIT[torch.float64] * expected.norm().item()
    return [
        name
        for name, where in layout.slices.items()
        if name not in tape.plain and not (found[where] - expected[where]).norm().item() <= limit
    ]


def _error(tape: Tape, theta: Tensor, inputs: PyTree) -> float:
    function, covered = tape.function, [name for name in tape.function.layout.names if name not in tape.plain]
    values = function.parameters(theta)
    own = ParameterLayout.of({name: values[name] for name in covered})
    v = random_signs(own.size, tape.n)
    whole = v.new_zeros(1, function.layout.size)
    for name, where in own.slices.items():
        whole[:, function.layout.slices[name]] = v[:, where]
    weights = torch.randn(tape.outputs.shape, generator=torch.Generator().manual_seed(tape.n), dtype=torch.float64)

    def rows() -> Tensor:
        with torch.enable_grad():
            pieces = tape.pieces((tape.outputs * weights.to(tape.outputs)).sum(dim=1, keepdim=True))
        found = torch.zeros(tape.n, dtype=torch.float64, device=function.device)
        for piece in pieces:
            found += piece.products(function.cast(whole))[:, 0, 0].double()
        return found

    if isinstance(found := result_or_error(rows, FAILURES), Exception):
        return float("inf")
    # What is plain may hold operations that cannot be differentiated forward, and need not be here.
    part = function.restricted(own, values) if tape.plain else function
    return error_of_rows(
        part, own.flatten(values), function.cast(inputs), v, found[:, None, None], weights.unsqueeze(1)
    )
