"""A report is one file that needs nothing else, and shows what it was given."""

from __future__ import annotations

import base64
import errno
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_sftrl.apps.report.page import Curve, Series, Table, write_report
from megatron_sftrl.errors import UserError

TABLE = Table(title="Accuracy", columns=("stage", "greedy"), rows=(("before", "1 %"), ("after <b>", "40 %")))
CURVE = Curve(
    title="Loss",
    x_label="step",
    y_label="nats",
    series=(Series(label="gift", x=(1.0, 2.0), y=(2.0, 1.0)), Series(label="sft", x=(1.0,), y=(3.0,))),
)


def test_the_report_holds_tables_and_pictures_and_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(path, title="Run & more", text=["First.", "Second."], tables=[TABLE], curves=[CURVE])
    page = path.read_text()
    assert "<h1>Run &amp; more</h1>" in page
    assert "after &lt;b&gt;" in page
    assert "<td>40 %</td>" in page
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == []
    assert "<script" not in page
    assert "http" not in page
    (picture,) = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
    root = ElementTree.fromstring(base64.b64decode(picture))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_each_series_has_a_color_of_its_own(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", title="r", curves=[CURVE, CURVE])
    page = (tmp_path / "r.html").read_text()
    pictures = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 2
    drawn = base64.b64decode(pictures[0]).decode()
    assert "#2563eb" in drawn
    assert "#dc2626" in drawn


def test_a_dashed_series_is_dashed(tmp_path: Path) -> None:
    curve = replace(CURVE, series=(CURVE.series[0], replace(CURVE.series[0], is_dashed=True, color=0)))
    for each, is_dashed in ((CURVE, False), (curve, True)):
        write_report(tmp_path / "r.html", title="r", curves=[each])
        (picture,) = re.findall(r"base64,([A-Za-z0-9+/=]+)", (tmp_path / "r.html").read_text())
        lines = re.findall(r"<path d=[^>]*stroke: #2563eb[^>]*>", base64.b64decode(picture).decode())
        assert {"stroke-dasharray" in line for line in lines} == {is_dashed, False}


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.html"
    write_report(path, title="old")
    old = path.read_text()

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match=r"the page cannot be written to .*r\.html"):
        write_report(path, title="new")
    assert path.read_text() == old
    assert [each.name for each in tmp_path.iterdir()] == ["r.html"]


def test_a_row_that_does_not_fit_its_table_is_refused() -> None:
    with pytest.raises(ValueError, match="table 'x': expected 2 cells in each row"):
        Table(title="x", columns=("a", "b"), rows=(("1",),))


@pytest.mark.parametrize(("x", "y"), [((1.0,), ()), ((), ())])
def test_a_series_without_matching_points_is_refused(x: tuple[float, ...], y: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="series 's': expected as many x as y"):
        Series(label="s", x=x, y=y)
