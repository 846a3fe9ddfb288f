"""Results as files: what changes from run to run changes few lines."""

import json

import pytest

from bench.document import as_json, write_samples
from bench.record import RESULTS, summary

COMMITTED = [path for path in sorted(RESULTS.rglob("*.json")) if path.parts[len(RESULTS.parts)].startswith("nvidia")]


def results(samples):
    cases = {
        name: {"forward": summary([scale * s for s in samples]), "bytes": 8} for name, scale in (("a", 1), ("b", 2))
    }
    return {"device": "A {GPU}", "versions": {"torch": "1"}, "cases": [{"shape": (2, 3), "ways": cases}], "none": []}


def test_a_line_for_each_case_and_no_samples():
    text = as_json(results([1.0, 2.0, 3.0, 4.0, 5.0]))
    case = '     "forward": {"median": 6.0, "q1": 4.0, "q3": 8.0, "count": 5},'
    assert text.splitlines()[:5] == ["{", ' "device": "A {GPU}",', ' "versions": {"torch": "1"},', ' "cases": [', "  {"]
    assert case in text.splitlines()
    assert "samples" not in text
    assert json.loads(text)["cases"][0]["shape"] == [2, 3]
    assert len(text.splitlines()) == len(as_json(results([1.0] * 100)).splitlines())


def test_another_run_changes_a_line_for_each_time():
    first, second = (as_json(results([time] * 9)).splitlines() for time in (1.0, 1.5))
    assert [one for one, other in zip(first, second, strict=True) if one != other] == [
        line for line in first if "median" in line
    ]
    assert sum("median" in line for line in first) == 2


def test_samples_are_written_where_somebody_asks(tmp_path):
    file = tmp_path / "raw" / "samples.json"
    write_samples(results([1.0, 2.0]), None)
    assert not list(tmp_path.iterdir())
    write_samples(results([1.0, 2.0]), file)
    assert json.loads(file.read_text())["cases"][0]["ways"]["b"]["forward"]["samples"] == [2.0, 4.0]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(RESULTS)))
def test_committed_results_have_this_form(path):
    text = path.read_text()
    assert as_json(json.loads(text)) == text


def test_there_are_committed_results():
    assert COMMITTED
