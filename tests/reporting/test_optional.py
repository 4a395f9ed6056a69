"""The failure of an optional output is reported once, in one line; what ends a run on purpose is not caught."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from higgs_ds.common.console import set_quiet
from higgs_ds.common.errors import LostRankError, NotFiniteError, SaveError, StoppedError
from higgs_ds.reporting.optional import OptionalOutput


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (ValueError("one\n  two.\n"), "ValueError: one two"),
        (AssertionError(), "AssertionError"),
        (SaveError("here: could not be written"), "here: could not be written"),
    ],
)
@pytest.mark.parametrize("quiet", [False, True])
def test_a_failure_is_one_line(
    error: Exception, cause: str, quiet: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("higgs_ds.common.console._quiet", False)
    set_quiet(quiet)
    output = OptionalOutput("drawing", "it is drawn later")
    assert output.attempt(lambda: raising(error)) is None
    assert output.failed
    assert capsys.readouterr() == (f"warning: drawing failed: {cause}. The run goes on; it is drawn later\n", "")


def test_only_the_first_failure_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    output = OptionalOutput("drawing", "it is drawn later")
    failed = []
    for error in (KeyError("a"), KeyError("b"), None, KeyError("c")):
        output.attempt(lambda error=error: raising(error) if error else None)
        failed.append(output.failed)
    assert failed == [True, True, False, True]
    assert capsys.readouterr().out.count("\n") == 1
    assert output.attempt(lambda: 7) == 7


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, StoppedError, NotFiniteError, LostRankError])
def test_what_ends_a_run_is_raised(kind: type[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(kind):
        OptionalOutput("drawing", "").attempt(lambda: raising(kind("now")))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize(("given", "backend"), [("pdf", "pdf"), ("nonsense", "agg"), (None, "agg")])
def test_drawing_keeps_the_backend_of_a_notebook(given: str | None, backend: str) -> None:
    """A notebook's own plots, in the process that has run a training, use the backend of its MPLBACKEND."""
    code = (
        "import os; from higgs_ds.reporting.curves import Curve, draw; "
        "assert '<svg' in draw(Curve('a', {}), {'': ([1, 2], [3.0, 4.0])}); import matplotlib; "
        "print(matplotlib.get_backend(), os.environ.get('MPLBACKEND'))"
    )
    hidden = ("MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"MPLBACKEND": given} if given else {}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [backend, str(given)]
