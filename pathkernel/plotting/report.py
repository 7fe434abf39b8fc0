"""The report: one self-contained HTML page with the certificate, the results, the figures and the settings."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata, resources
from io import BytesIO
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from pathkernel.errors import PathKernelError
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.storage.format import write_atomically

DOTS_PER_INCH = 160  # sharp on dense screens
PIXELS_PER_INCH = 96  # of CSS: figures appear in their own size

Verdict = Literal["within tolerance", "above tolerance"]


@dataclass(frozen=True)
class KeyFigure:
    """One number to be read first.

    Parameters
    ----------
    label
        What it is.
    value
        The number; a float gets three significant digits.
    note
        A few words on how to read it.
    verdict
        Marks the card, in colour and in these words; None leaves it plain.
    """

    label: str
    value: object
    note: str = ""
    verdict: Verdict | None = None


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the report.

    Parameters
    ----------
    figure
        Drawn, e.g. ``display.plot().figure_``; it is not closed.
    alt
        What it shows, in words, for readers who do not see it.
    caption
        Text below it.
    """

    figure: Figure
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Parameters
    ----------
    heading
        Its title.
    text
        Explanation; empty lines separate paragraphs.
    figures
        Shown one below the other.
    folded
        Whether readers open it by a click.
    """

    heading: str
    text: str = ""
    figures: Sequence[ReportFigure] = ()
    folded: bool = False


def close_figures(sections: Sequence[Section]) -> None:
    """Release the figures of a report that has been written; pyplot keeps them otherwise."""
    for section in sections:
        for figure in section.figures:
            plt.close(figure.figure)


def certificate_figures(attributions: Attributions, tolerance: float = 1e-5) -> list[KeyFigure]:
    """Put the certificate of an explanation into three key figures, four with the error of its shares.

    Parameters
    ----------
    attributions
        What ``machine.explain(X)`` returned.
    tolerance
        Largest residual that counts as complete, relative to |f(x; θ_S) - f(x; θ_0)|.

    Returns
    -------
    list of KeyFigure
        Agreement max |network - machine| in units of the output, the largest residual, the
        median quadrature error, and the median error of the shares where
        ``explain(X, verify="shares")`` measured it; the verdicts of the first two are on the residual.
    """
    difference = float(np.abs(attributions.output - attributions.reconstruction).max())
    residual = float(np.max(attributions.residual))
    verdict: Verdict = "within tolerance" if residual <= tolerance else "above tolerance"  # NaN is above
    figures = [
        KeyFigure("Agreement", difference, "largest |network − kernel machine|, in units of the output", verdict),
        KeyFigure("Residual", residual, f"largest unexplained part; complete up to {written(tolerance)}", verdict),
        KeyFigure(
            "Quadrature error",
            float(np.median(attributions.quadrature_error)),
            "median error along the steps, relative to how far the output moved",
        ),
    ]
    if attributions.shares_error is not None:
        bar = float(np.median(attributions.shares_error))
        figures.append(KeyFigure("Shares error", bar, "median bar of all shares together, relative to the same"))
    return figures


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    subtitle: str = "",
    key_figures: Sequence[KeyFigure] = (),
    table: Sequence[Mapping[str, object]] = (),
    sections: Sequence[Section] = (),
    settings: Mapping[str, object] | None = None,
    date: datetime | None = None,
) -> Path:
    """Write the report page.

    The page needs nothing but itself: styles are inline, figures are embedded PNG images, and
    its content security policy forbids scripts and every outside resource. All text is
    escaped. The file appears at once or not at all: it is written beside `path` and renamed.

    Parameters
    ----------
    path
        Where to write, in a folder that exists; an earlier report is replaced.
    title, subtitle
        Heading of the page and the line below it.
    key_figures
        Cards below the heading, e.g. `certificate_figures(attributions)`.
    table
        Results, one mapping of column to value per row. Columns come in the order in which
        they first appear; a missing value is drawn as a dash.
    sections
        Explanations and figures, in order.
    settings
        Name and value of everything the results depend on.
    date
        Moment in the footer, with its time zone; by default now, UTC.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    PathKernelError
        If the folder of `path` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise PathKernelError(
            f"There is no folder {path.parent}",
            "A report is written into a folder that exists",
            f"Create it first: Path({str(path.parent)!r}).mkdir(parents=True)",
        )
    columns = list(dict.fromkeys(str(name) for row in table for name in row))
    rows = [{str(name): value for name, value in row.items()} for row in table]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(written=written, paragraphs=paragraphs, embedded=embedded)
    template = resources.files("pathkernel.plotting").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=title,
        subtitle=subtitle,
        key_figures=key_figures,
        columns=columns,
        numeric={name for name in columns if all(_is_number(row.get(name, 0)) for row in rows)},
        rows=rows,
        sections=sections,
        settings=settings or {},
        version=_version(),
        date=date or datetime.now(UTC),
    )
    write_atomically(path, [page.encode()], durable=True)
    return path


def written(value: object, digits: int = 4) -> str:
    """Write an entry: `digits` significant digits for floats, words for truth values, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{float(value):.{digits}g}".replace("-", "−")
    return str(value)


def paragraphs(text: str) -> list[str]:
    """Split a text at its empty lines."""
    return [" ".join(part.split()) for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]


def embedded(figure: Figure) -> tuple[str, int]:
    """Turn a figure into a data address.

    Returns
    -------
    str, int
        ``data:image/png;base64,…`` and the width at which it is drawn, CSS pixels.
    """
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight", metadata={"Software": None})
    png = buffer.getvalue()
    pixels = int.from_bytes(png[16:20], "big")  # the width in PNG's header chunk
    width = round(pixels * PIXELS_PER_INCH / DOTS_PER_INCH)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii"), width


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, Real) and not isinstance(value, bool | np.bool_))


def _version() -> str:
    try:
        return metadata.version("pathkernel")
    except metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "(a checkout)"
