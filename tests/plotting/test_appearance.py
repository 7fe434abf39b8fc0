"""What a figure leaves behind: settings of matplotlib, its interactive mode and open figures as they were."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fresh_processes import FINE, raised_by
from matplotlib import pyplot as plt

from pathkernel.plotting.appearance import STYLE, styled
from pathkernel.plotting.gram import GramDisplay
from pathkernel.plotting.report import ReportFigure, Section, close_figures, write_report
from pathkernel.plotting.spectrum import SpectrumDisplay

BACKEND = """
import matplotlib
from matplotlib.backends.backend_agg import *
matplotlib.interactive(True)  # as matplotlib_inline does when a notebook's first figure chooses it
"""

SESSION = """
import matplotlib, numpy as np
from pathkernel.plotting.gram import GramDisplay
from pathkernel.plotting.spectrum import SpectrumDisplay
{first}
display = {display}.from_gram(np.eye(5)).plot()
assert matplotlib.is_interactive(), "before the second figure"
import matplotlib.pyplot as plt
plt.figure()
assert matplotlib.is_interactive()
assert plt.get_fignums() == [1, 2]
assert matplotlib.get_backend() == "module://chosen_late", matplotlib.get_backend()
"""


SESSIONS = {
    (first, display): SESSION.format(first=first, display=display)
    for first in ("", "import matplotlib.pyplot as plt", "matplotlib.rcParams['font.size'] = 7.0")
    for display in ("GramDisplay", "SpectrumDisplay")
}


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sessions")
    (folder / "chosen_late.py").write_text(BACKEND)
    path = f"{folder}:{Path(__file__).parents[2]}"
    return raised_by(
        tuple(SESSIONS.values()), MPLBACKEND="module://chosen_late", PYTHONPATH=path, MPLCONFIGDIR=str(folder)
    )


@pytest.mark.parametrize("session", SESSIONS, ids="-".join)
def test_the_first_figure_of_a_session_may_switch_on_interactive_mode(
    raised: dict[str, str], session: tuple[str, str]
) -> None:
    assert raised[SESSIONS[session]] == FINE


def test_the_style_is_there_inside_and_the_users_own_afterwards() -> None:
    with matplotlib.rc_context({"font.size": 7.5, "axes.spines.top": True}):
        before = dict(plt.rcParams)
        with pytest.raises(ZeroDivisionError), styled():
            assert all(plt.rcParams[key] == value for key, value in STYLE.items())
            plt.rcParams["figure.dpi"] = 123.0  # not ours
            raise ZeroDivisionError
        changed = {key for key, value in plt.rcParams.items() if value != before[key]}
        assert changed == {"figure.dpi"}


@pytest.mark.parametrize("interactive", [False, True])
def test_displays_and_reports_leave_settings_and_open_figures(tmp_path: Path, interactive: bool) -> None:
    with matplotlib.rc_context({"interactive": interactive}):
        own = plt.figure()
        before, backend = dict(plt.rcParams), matplotlib.get_backend()
        ax = own.add_subplot()
        GramDisplay.from_gram(np.eye(4)).plot(ax=ax)
        figure = SpectrumDisplay.from_gram(np.eye(4)).plot().figure_
        sections = [Section("Gram", figures=[ReportFigure(figure, "alt", "caption")])]
        write_report(tmp_path / "report.html", title="Title", sections=sections)
        close_figures(sections)
        assert plt.get_fignums() == [own.number] and plt.gcf() is own
        assert dict(plt.rcParams) == before and matplotlib.get_backend() == backend
        assert matplotlib.is_interactive() == interactive
        plt.close(own)
