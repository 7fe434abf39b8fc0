"""A framework that is too old or too new is named before anything is trained."""

from __future__ import annotations

from importlib import metadata

import pytest

from pathkernel.callbacks.recording import FrameworkRecording, RecorderOptions
from pathkernel.callbacks.versions import VERSIONS, check_version
from pathkernel.errors import InputError, MissingExtraError, TrajectoryError
from pathkernel.recording.recorder import KernelRecorder


@pytest.mark.parametrize("version", ["2.1.9", "3.0", "3", "0.9rc1", "10.0.0"])
def test_versions_outside_the_range_are_refused_by_number(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(MissingExtraError, match=rf"lightning is of the version {version}.*2\.2 on.*before 3"):
        check_version("lightning")


@pytest.mark.parametrize("version", ["2.2", "2.2.0.post0", "2.6.6", "2.10rc1", "2.9.dev1"])
def test_versions_inside_the_range_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    check_version("lightning")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    for name in VERSIONS:
        with pytest.raises(MissingExtraError, match=rf"{name} is not installed.*\[frameworks\]"):
            check_version(name)


def test_options_are_those_of_the_recorder() -> None:
    import inspect

    taken = set(inspect.signature(KernelRecorder.__init__).parameters) - {"self", "model", "optimizer"}
    assert set(RecorderOptions.__annotations__) == taken


def test_other_options_are_refused_at_construction() -> None:
    with pytest.raises(InputError, match=r"`storage=`.*store"):
        FrameworkRecording("LightningRecorder", {"storage": "runs"})  # type: ignore[typeddict-unknown-key]


def test_before_training_there_is_no_path() -> None:
    recording = FrameworkRecording("LightningRecorder", {})
    with pytest.raises(TrajectoryError, match="has not seen any training yet"):
        _ = recording.trajectory
