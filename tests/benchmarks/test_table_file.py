"""A committed table keeps what a partial run did not touch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expunge.benchmarks import tables
from expunge.benchmarks.table_file import Section, merge, read, write
from expunge.benchmarks.testbed import diabetes_case
from expunge.errors import BadData, BadSetting

TABLE = "| model | UA % |\n|---|---|\n| original | 0 |\n| retrained | 90 |\n| ssd | 1 |\n| salun | 50 |\n"


def test_rows_of_some_methods_replace_their_namesakes_only():
    whole = Section.of("note", TABLE, "`all` in 9 s")
    new = TABLE.replace("| salun | 50 |", "| salun | 80 |\n| scrub | 70 |").replace("| ssd | 1 |\n", "")
    part = Section.of("new note", new, "`some` in 2 s", part=True)
    merged = whole.merged(part, ["salun", "scrub", "ssd"])
    assert list(merged.rows) == ["original", "retrained", "salun", "scrub", "ssd"]
    assert merged.rows["salun"] == "| salun | 80 |" and merged.rows["ssd"] == "| ssd | 1 |"
    assert merged.made == {"`all` in 9 s": "ssd", "`some` in 2 s": "salun, scrub"} and merged.note == "new note"


def test_reading_back_what_was_written_gives_the_same():
    sections = {"class": Section.of("two\nlines", TABLE, "`a: b` in 1 s"), "rows": Section.of("", TABLE, "`c` in 3 s")}
    text = write("# t\n\nversions", sections)
    assert read(text) == sections and write("# t\n\nversions", read(text)) == text


def test_sections_that_were_not_run_stay():
    old = write("# t", {"class": Section.of("n", TABLE, "`a` in 1 s"), "rows": Section.of("m", TABLE, "`a` in 1 s")})
    new = Section.of("n2", TABLE.replace("| ssd | 1 |\n", ""), "`b` in 2 s")
    after = merge(old, {"class": new}, False, {"rows": [], "class": []})
    assert list(after) == ["rows", "class"] and after["class"] == new and after["rows"] == read(old)["rows"]


@pytest.mark.parametrize("change", [("UA %", "RA %"), ("| retrained | 90 |", "| retrained | 91 |")])
def test_rows_of_other_columns_or_other_seeds_are_not_put_side_by_side(change):
    with pytest.raises(BadData, match="whole section"):
        Section.of("", TABLE, "`a` in 1 s").merged(Section.of("", TABLE.replace(*change), "`b` in 1 s", part=True))


@pytest.mark.parametrize("name", ["digits", "cifar", "regression"])
def test_the_committed_tables_can_be_read(name: str):
    text = (Path(__file__).parents[2] / "benchmarks-results" / f"{name}.md").read_text("utf-8")
    found = read(text)
    assert set(found) == set(tables.STUDIES[name])
    for request, section in found.items():
        assert [r for r in section.rows if r not in ("original", "retrained")] == list(
            tables.STUDIES[name][request].methods
        )
        assert section.made


def test_only_and_methods_leave_the_rest_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real thing on the smallest study, without attacks: one method of one request, one seed."""
    case = diabetes_case(0)
    case = case.with_(recipe=replace(case.recipe, epochs=2))
    study = replace(
        tables.STUDIES["regression"]["diabetes"], case=lambda s: case, checks=("wasserstein",), audit={"attacks": []}
    )
    monkeypatch.setitem(tables.STUDIES["regression"], "diabetes", study)
    out = tmp_path / "regression.md"
    tables.run("regression", 1, 1, tmp_path / "runs", out, only="diabetes", methods=["fine_tune", "grad_ascent"])
    before = read(out.read_text("utf-8"))["diabetes"]
    out.write_text(out.read_text("utf-8") + "\n## lastfm\n\n" + str(Section.of("kept", TABLE, "`x` in 1 s")), "utf-8")
    tables.run("regression", 1, 1, tmp_path / "runs", out, only="diabetes", methods=["grad_ascent"])
    after = read(out.read_text("utf-8"))
    assert after["lastfm"] == Section.of("kept", TABLE, "`x` in 1 s")
    same = [name for name in before.rows if name != "grad_ascent"]
    assert {n: after["diabetes"].rows[n] for n in same} == {n: before.rows[n] for n in same}
    assert len(after["diabetes"].made) == 2
    with pytest.raises(BadSetting, match="salun"):
        tables.run("regression", methods=["salun"], out=out)
