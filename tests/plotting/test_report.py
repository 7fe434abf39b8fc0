"""The report page: self-contained, escaped, whole or absent."""

from __future__ import annotations

import base64
import os
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import pyplot as plt

from pathkernel.errors import PathKernelError
from pathkernel.plotting.report import (
    KeyFigure,
    ReportFigure,
    Section,
    certificate_figures,
    paragraphs,
    write_report,
    written,
)

ATTACK = "<script>alert('x')</script><img src=x onerror=\"alert(1)\">"
ESCAPED = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"


class Elements(HTMLParser):
    """Every start tag with its attributes, and the tags still open at the end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def figure_of_a_line():
    figure, ax = plt.subplots(figsize=(3, 2))
    ax.plot([0, 1])
    return figure


@pytest.fixture
def page(tmp_path, attributions) -> str:
    path = write_report(
        tmp_path / "report.html",
        title="Digits",
        subtitle="A small network",
        key_figures=[*certificate_figures(attributions), KeyFigure("Accuracy", 0.97222)],
        table=[{"model": "network", "accuracy": 0.97222, "exact": None}, {"model": "SVC", "steps": 460, "exact": True}],
        sections=[
            Section("Completeness", "First.\n\nSecond.", [ReportFigure(figure_of_a_line(), "a line", "Caption.")]),
            Section("More", folded=True),
        ],
        settings={"optimizer": "AdamW(lr=0.003)"},
        date=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
    )
    return path.read_text(encoding="utf-8")


def test_every_text_is_escaped(tmp_path):
    path = write_report(
        tmp_path / "report.html",
        title=ATTACK,
        subtitle=ATTACK,
        key_figures=[KeyFigure(ATTACK, ATTACK, ATTACK)],
        table=[{ATTACK: ATTACK}],
        sections=[
            Section(ATTACK, ATTACK, [ReportFigure(figure_of_a_line(), ATTACK, ATTACK)]),
            Section(ATTACK, folded=True),
        ],
        settings={ATTACK: ATTACK},
    )
    page = path.read_text(encoding="utf-8")
    elements = Elements(page)
    assert "<script" not in page
    assert page.count(ESCAPED) == 15
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    assert [image["alt"] for image in elements.named("img")] == [ATTACK]


def test_the_page_needs_nothing_but_itself_and_forbids_scripts(page):
    elements = Elements(page)
    assert elements.open == []
    assert not elements.named("script") + elements.named("link")
    assert all(image["src"].startswith("data:image/png;base64,") for image in elements.named("img"))
    assert not re.search(r"https?://|url\(|@import", page)
    policy = next(meta["content"] for meta in elements.named("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_figures_are_embedded_with_their_words_and_their_own_size(page):
    (image,) = Elements(page).named("img")
    png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    assert png.startswith(b"\x89PNG")
    assert image["alt"] == "a line"
    assert 200 < int(image["width"]) < 320  # 3 inches at 96 pixels, trimmed
    assert "<figcaption>Caption.</figcaption>" in page


def test_the_table_has_every_column_once_in_order_of_appearance(page):
    header = re.search(r"<thead>(.*?)</thead>", page, re.DOTALL).group(1)
    assert re.findall(r">(\w+)</th>", header) == ["model", "accuracy", "exact", "steps"]
    rows = re.findall(r"<tr>(<td.*?)</tr>", page)
    assert [re.findall(r">([^<]*)</td>", row) for row in rows] == [
        ["network", "0.9722", "–", "–"],
        ["SVC", "–", "yes", "460"],
    ]


def test_sections_settings_and_footer_are_there(page):
    elements = Elements(page)
    assert "<p>First.</p>\n<p>Second.</p>" in page
    assert ["open" in details for details in elements.named("details")] == [False, True]
    assert "AdamW(lr=0.003)" in page
    assert elements.named("time") == [{"datetime": "2026-01-02T03:04:00+00:00"}]
    assert "2026-01-02 03:04 UTC" in page


def test_an_empty_report_is_a_page_with_a_title(tmp_path):
    elements = Elements(write_report(tmp_path / "report.html", title="Nothing yet").read_text(encoding="utf-8"))
    assert not elements.named("table") + elements.named("section") + elements.named("details")


def test_the_certificate_is_judged_by_its_residual(attributions):
    agreement, residual, quadrature = certificate_figures(attributions)
    assert agreement.value < 1e-12
    assert agreement.verdict == residual.verdict == "within tolerance"
    assert residual.value == attributions.residual.max()
    assert quadrature.value == 1e-6
    assert quadrature.verdict is None
    for broken in (attributions.output + 0.1, np.full_like(attributions.output, np.nan)):
        agreement, residual, _ = certificate_figures(replace(attributions, output=broken))
        assert agreement.verdict == residual.verdict == "above tolerance"


def test_the_certificate_has_the_error_of_the_shares_where_it_was_measured(attributions):
    bar = np.linspace(1e-6, 3e-6, len(attributions.output))
    *_, shares = certificate_figures(replace(attributions, shares_error=bar))
    assert shares.label == "Shares error" and shares.value == np.median(bar) and shares.verdict is None


def test_a_report_that_fails_leaves_the_old_one_and_no_rest(tmp_path, monkeypatch):
    path = write_report(tmp_path / "report.html", title="Old")
    old = path.read_text(encoding="utf-8")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(path, title="New")
    assert path.read_text(encoding="utf-8") == old
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_report_replaces_the_old_one_and_can_be_shared(tmp_path):
    path = write_report(tmp_path / "report.html", title="Old")
    write_report(path, title="New")
    assert "<h1>New</h1>" in path.read_text(encoding="utf-8")
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(PathKernelError, match="There is no folder") as caught:
        write_report(tmp_path / "runs" / "report.html", title="Digits")
    assert caught.value.expected
    assert "mkdir(parents=True)" in caught.value.write


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (np.False_, "no"),
        (460, "460"),
        (np.int64(3), "3"),
        (0.97222, "0.9722"),
        (np.float32(-2.5), "−2.5"),
        (1.2346e-15, "1.235e−15"),
        ("a < b", "a < b"),
    ],
)
def test_entries_are_written_for_readers(value, text):
    assert written(value) == text


def test_paragraphs_are_split_at_empty_lines():
    assert paragraphs("one\ntwo\n\n\n three \r\n\r\nfour") == ["one two", "three", "four"]
    assert paragraphs("") == []
