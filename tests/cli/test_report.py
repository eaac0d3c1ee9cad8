"""``mshare report``: the live line, the model, and the picture."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ET

import pytest

from msharefs.cli import plot
from msharefs.cli.exits import Failure
from msharefs.cli.report import curves, report
from msharefs.cli.types import parse_counts
from msharefs.footprint import Footprint
from msharefs.pagetables import Span, Tables, cost

MIB = 1 << 20
MEMORY = [Span(0, 8 * MIB)]

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib (the extra plot) is missing"
)


SIX_TABLES = Tables(4, 1, 1)


def footprint(pid, *, known=True, tables=SIX_TABLES):
    if not known:
        return Footprint(pid, "test", 1, 8 * MIB, None, None, None, 1 << 16)
    return Footprint(pid, "test", 1, 8 * MIB, 8 * MIB, 0, tables, 1 << 16)


def test_the_first_line_is_measured_and_the_others_are_not():
    rows = report(MEMORY, [footprint(1), footprint(2, tables=Tables(2, 1, 1))], [1, 100])
    assert [(row.what, row.clients) for row in rows] == [("live", 2), ("model", 1), ("model", 100)]
    live, one, hundred = rows
    assert (live.now, live.present, live.vmpte) == (10 * 4096, 16 * MIB, 2 << 16)
    assert live.cost == cost(MEMORY, 2)
    assert (one.now, one.vmpte, one.present) == (5 * 4096, None, 8 * MIB)
    assert hundred.now == 500 * 4096
    assert hundred.cost.small == 600 * 4096
    assert hundred.cost.thp == 200 * 4096
    assert hundred.cost.shared == 6 * 4096


def test_what_one_client_hides_is_not_summed_up():
    live, model = report(MEMORY, [footprint(1), footprint(2, known=False)], [10])
    assert (live.now, live.present, model.now) == (None, None, None)
    assert live.vmpte == 2 << 16
    assert live.cost == cost(MEMORY, 2)


def test_a_region_without_clients_or_memory():
    live, model = report(MEMORY, [], [10])
    assert (live.clients, live.now, live.vmpte, model.now) == (0, 0, 0, None)
    assert model.cost == cost(MEMORY, 10)
    rows = report([], [], [10])
    assert [row.cost.small for row in rows] == [0, 0]
    assert curves(rows) == [], "a logarithmic axis has no nought"


def test_numbers_of_clients_as_people_write_them():
    assert parse_counts("100, 1,10,1") == [1, 10, 100]
    for text in ("", "0", "1,,2", "-1", "1.5", "٣"):
        with pytest.raises(ValueError, match="not a list of numbers"):
            parse_counts(text)


@needs_matplotlib
@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_is_one(tmp_path, suffix):
    path = tmp_path / f"curve{suffix}"
    rows = report(MEMORY, [footprint(1)], [1, 10, 100])
    plot.draw(path, "pool: 8M of shared memory", curves(rows))
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        return
    drawn = ET.parse(path).getroot()
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    words = set(drawn.itertext())
    assert words >= {"pool: 8M of shared memory", "4 KiB pages", "huge pages", "one set of tables"}
    again = tmp_path / "again.svg"
    plot.draw(again, "pool: 8M of shared memory", curves(rows))
    assert again.read_bytes() == path.read_bytes()


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Failure, match=r"pip install 'msharefs\[plot\]'") as raised:
        plot.plot_file(None, None, "curve.svg")
    assert raised.value.exit_code == 1
    assert plot.plot_file(None, None, None) is None
