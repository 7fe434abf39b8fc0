"""Draws ``docs/_static/overview.png``, the picture at the top of README: ``python docs/make_overview.py [FILE]``.

Everything in it is computed by the library from one small training run on scikit-learn's digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.plotting.appearance import LOWERS, MINUS, RAISES, STYLE, TASK
from pathkernel.plotting.gram import GramDisplay

SIZE, DPI = (10.667, 3.467), 150  # 1600 × 520 pixels
INK, PAPER, QUERY = "#1F2328", "white", TASK
ARROW = "-|>,head_width=0.18,head_length=0.36"
PER_CLASS = 14  # samples of each digit in the Gram matrix


def train(X: Tensor, y: Tensor) -> pk.Trajectory:
    """A tanh network, by plain SGD on mini-batches: steps long enough to be seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.5), nn.CrossEntropyLoss()
    with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        for _ in range(6):
            for x, target in recorder.batches(batch_size=50, shuffle=True):
                optimizer.zero_grad()
                loss(model(x), target).backward()
                optimizer.step()
    return recorder.trajectory


def draw_path(ax: Axes, trajectory: pk.Trajectory, X: Tensor, y: Tensor, query: Tensor, sample: Tensor) -> None:
    """The loss in the plane of the path's two principal axes, the path, and two samples' gradients along it."""
    points = torch.stack([trajectory.vector(s) for s in range(len(trajectory) + 1)]).double()
    center = points.mean(dim=0)
    axes = torch.linalg.svd(points - center, full_matrices=False).Vh[:2]
    axes *= torch.sign(axes @ (points[-1] - points[0]))[:, None]  # from left to right, and upwards
    path = ((points - center) @ axes.T).numpy()

    low, high = path.min(axis=0), path.max(axis=0)
    margin = np.array([0.14, 0.3]) * (high - low)
    columns, rows = (np.linspace(a - m, b + m, 40) for a, b, m in zip(low, high, margin, strict=True))
    function = trajectory.function(torch.float64)
    losses = np.empty((len(rows), len(columns)))
    for i, j in np.ndindex(*losses.shape):
        theta = center + torch.tensor([columns[j], rows[i]], dtype=torch.float64) @ axes
        losses[i, j] = float(trajectory.loss(function.outputs(theta, X), y))
    ax.contourf(columns, rows, np.log(losses), levels=16, cmap="Blues_r", alpha=0.5)
    ax.contour(columns, rows, np.log(losses), levels=16, colors="white", linewidths=0.6, linestyles="solid")

    ax.plot(*path.T, color=INK, linewidth=1.0, marker="o", markersize=2.6, markeredgewidth=0)
    # ∇f of the query and of the training sample that raised it most: their products along the path are the kernel.
    digit = int(function.outputs(trajectory.final, query).argmax())
    model, names = trajectory.model, trajectory.layout.names
    longest = 0.26 * np.ptp(columns)
    arrows = []
    for s in np.linspace(0.06, 0.84, 5) * len(trajectory):
        for x, color in ((query, QUERY), (sample, RAISES)):
            parameters = {name: p.float().requires_grad_() for name, p in trajectory.parameters(round(s)).items()}
            output = torch.func.functional_call(model, parameters, x)[0, digit]
            gradient = torch.autograd.grad(output, [parameters[name] for name in names])
            arrow = axes @ torch.cat([g.reshape(-1) for g in gradient]).double()
            arrows.append((path[round(s)], arrow.numpy(), color))
    scale = longest / max(np.linalg.norm(arrow) for _, arrow, _ in arrows)
    for point, arrow, color in arrows:
        ax.annotate(
            "",
            point + scale * arrow,
            point,
            arrowprops={"arrowstyle": ARROW, "color": color, "linewidth": 2.0, "shrinkA": 0, "shrinkB": 0},
        )
    for (point, arrow, color), name, offset in zip(
        arrows[2:4], (r"$\nabla f(x)$", r"$\nabla f(x_i)$"), ((0, -17), (-4, 7)), strict=True
    ):
        tip = point + scale * arrow
        ax.annotate(name, tip, offset, textcoords="offset points", color=color, fontsize=12.5)
    for s, name, face in ((0, r"$\theta_0$", PAPER), (-1, r"$\theta_S$", INK)):
        ax.plot(*path[s], marker="o", color=face, markeredgecolor=INK, markersize=7)
        ax.annotate(name, path[s], (0, -19), textcoords="offset points", ha="center", color=INK, fontsize=13)
    ax.set(xticks=[], yticks=[], xlim=(columns[0], columns[-1]), ylim=(rows[0], rows[-1]))
    ax.spines[:].set_visible(False)


def draw_gram(ax: Axes, trajectory: pk.Trajectory, X: Tensor, y: Tensor) -> None:
    """The path kernel of some training digits, sorted by class."""
    chosen = torch.cat([torch.nonzero(y == digit)[:PER_CLASS, 0] for digit in range(10)])
    kernel = pk.PathKernel(trajectory, steps=20)
    display = GramDisplay.from_gram(kernel(X[chosen]), y[chosen].numpy()).plot(ax, colorbar=False)
    display.ax_.set(xlabel="", ylabel="")


def draw_digit(figure: Figure, cell: SubplotSpec, image: Tensor, frame: str, width: float) -> Axes:
    """One digit in a frame."""
    ax = figure.add_subplot(cell)
    ax.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=frame, linewidth=width)
    return ax


def number(value: float) -> str:
    """Two decimals and a sign."""
    return f"{value:+.2f}".replace("-", MINUS)


def draw_shares(figure: Figure, cell: SubplotSpec, why: pk.Attributions, query: Tensor, X: Tensor) -> None:
    """A test digit beside the training digits that raised its score and those that lowered it."""
    grid = cell.subgridspec(4, 4, width_ratios=[1.7, 1, 1, 1], height_ratios=[0.2, 1, 0.28, 1], wspace=0.2, hspace=0.3)
    ax = draw_digit(figure, grid[:, 0], query, QUERY, 2.6)
    ax.set_title(f"network: “{why.output_index[0]}”", fontsize=11, fontweight="bold", color=INK, loc="center")
    ax.set_xlabel(f"score {number(why.output[0])}", fontsize=11, fontweight="bold", color=INK, labelpad=6)
    ranking, shares = why.top(3), why.shares[0]
    untrained = f"untrained: {number(why.initial[0])}"  # with the two sums beside it, this makes the score
    ax.text(0.5, -0.3, untrained, fontsize=10, color=INK, ha="center", transform=ax.transAxes)
    for row, verb, color, ids, signed in (
        (0, "raised by", RAISES, ranking.proponents[0], shares[shares > 0]),
        (2, "lowered by", LOWERS, ranking.opponents[0], shares[shares < 0]),
    ):
        heading = figure.add_subplot(grid[row, 1:])
        heading.axis("off")
        text = f"{verb} {len(signed)} digits: {number(signed.sum())}"
        heading.text(0, 0.1, text, color=color, fontsize=10, transform=heading.transAxes)
        for column, i in enumerate(ids, start=1):
            panel = draw_digit(figure, grid[row + 1, column], X[int(i)], color, 2.2)
            panel.set_xlabel(number(shares[i]), color=color, fontsize=9.5, fontweight="bold", labelpad=2)


def caption(figure: Figure, cell: SubplotSpec, title: str, formula: str) -> None:
    """What a panel is, above it, and its formula, below."""
    box = cell.get_position(figure)
    figure.text(box.x0, 0.925, title, fontsize=12.5, fontweight="bold", color=INK)
    figure.text((box.x0 + box.x1) / 2, 0.075, formula, fontsize=12.5, color=INK, ha="center", va="center")


def main() -> None:
    """Train, explain, draw."""
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, train_size=500, test_size=200, random_state=0)
    X, X_test = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    y, y_test = (torch.tensor(part) for part in parts[2:])
    trajectory = train(X, y)
    machine = pk.KernelMachine(trajectory)
    query = 0
    why = machine.explain(X_test[query : query + 1])
    print(why, y_test[query], why.top(3), sep="\n")

    with plt.rc_context({**STYLE, "font.family": "DejaVu Sans", "mathtext.fontset": "cm", "text.color": INK}):
        figure = plt.figure(figsize=SIZE, dpi=DPI, facecolor=PAPER)
        grid = figure.add_gridspec(
            1, 3, width_ratios=[1.25, 1, 1.5], wspace=0.15, left=0.015, right=0.985, top=0.88, bottom=0.215
        )
        left, middle = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
        draw_path(left, trajectory, X, y, X_test[query : query + 1], X[[int(why.shares[0].argmax())]])
        draw_gram(middle, trajectory, X, y)
        draw_shares(figure, grid[2], why, X_test[query], X)
        caption(figure, grid[0], "1  Watch training", r"$\theta_S=\theta_0+\sum_s\Delta_s$")
        caption(
            figure,
            grid[1],
            "2  The path kernel",
            r"$K(x,x')=\sum_s w_s\,\langle\nabla f(x;\theta_s),\nabla f(x';\theta_s)\rangle$",
        )
        caption(
            figure,
            grid[2],
            "3  Who moved the prediction",
            r"$f(x;\theta_S)=f(x;\theta_0)+\sum_i\,\mathrm{share}_i(x)$",
        )
        figure.savefig(TARGET if len(sys.argv) < 2 else sys.argv[1], dpi=DPI, facecolor=PAPER)


TARGET = Path(__file__).parent / "_static" / "overview.png"

if __name__ == "__main__":
    main()
