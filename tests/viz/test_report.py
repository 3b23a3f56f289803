"""docs/results.md holds what the committed reports hold, and nothing else."""

import json
from pathlib import Path

import pytest

from trimode.errors import DataError
from trimode.viz.report import read_reports, results_page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_page_is_made_of_the_committed_reports():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert page == results_page(read_reports(DOCS / "results")), "run `make results`"


def test_the_page_names_machine_commit_and_every_mode_on_five_kinds_of_prompts():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    report = read_reports(DOCS / "results")["smollm2-135m"]
    assert report["hardware"]["processor"] in page
    assert report["versions"]["commit"] in page
    assert {"ar", "diffusion", "self_spec", "auto"} <= {row["mode"] for row in report["results"]}
    assert {row["engine"] for row in report["results"]} == {"trimode", "transformers", "llama.cpp"}
    assert all(len(row["by_category"]) == 5 for row in report["results"])
    for name in report["results"]:
        assert f"| {name['label']} |" in page


def test_every_picture_of_the_page_is_there():
    for line in (DOCS / "results.md").read_text(encoding="utf-8").split("]("):
        name = line.partition(")")[0]
        if name.endswith(".png"):
            assert (DOCS / name).is_file(), name


def test_a_changed_figure_makes_the_page_stale(tmp_path):
    report = read_reports(DOCS / "results")["smollm2-135m"]
    row = report["results"][0]["tokens_per_second"]
    changed = {
        **report,
        "results": [{**report["results"][0], "tokens_per_second": {**row, "median": 2 * row["median"]}}],
    }
    assert results_page({"a": changed}) != results_page({"a": report})


@pytest.mark.parametrize("text", [None, "{", "[]", '{"hardware": {}, "versions": {}}'])
def test_what_is_no_report_is_told(tmp_path, text):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError):
        read_reports(tmp_path)


def test_reports_are_whole_json():
    for path in (DOCS / "results").glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["partial"] is False
