"""Data sets of the hub: rows like lines of a file, and one clear line where they cannot be had."""

import json
import sys
from types import ModuleType

import pytest

from tests.training.test_run import train, world  # noqa: F401
from trimode.errors import DataError
from trimode.training import hub
from trimode.training.data import make_documents
from trimode.training.hub import read_hub
from trimode.training.recipe import read_recipe

ROWS = [{"prompt_ids": [5, 6], "answer_ids": [7, 8, 9, 10], "other": 1}, {"text": "no tokenizer"}] * 3


@pytest.fixture
def datasets(monkeypatch):
    """The package, as far as it is used; remembers how it was called."""
    package = ModuleType("datasets")
    package.calls = []

    def load_dataset(name, subset=None, *, split, streaming):
        package.calls.append((name, subset, split, streaming))
        if name == "nobody/nothing":
            raise ConnectionError("Couldn't reach the hub\nand so on")
        return iter(ROWS)

    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return package


def test_rows_are_read_as_a_stream_up_to_the_limit(datasets):
    rows = list(read_hub("owner/name", subset="main", split="test", limit=2))
    assert rows == [(1, ROWS[0]), (2, ROWS[1])]
    assert datasets.calls == [("owner/name", "main", "test", True)]


def test_rows_become_documents_and_bad_ones_are_named():
    rows = list(enumerate(ROWS, 1))
    skipped = []

    def encode(value):
        raise DataError("the base has no tokenizer.")

    found = make_documents(rows, "owner/name", encode, max_tokens=16, vocab_size=40, skip=skipped.append)
    assert [d.ids for d in found] == [(5, 6, 7, 8, 9, 10)] * 3
    assert skipped[0] == "line 2 of owner/name: the base has no tokenizer."
    with pytest.raises(DataError, match="Line 2 of owner/name: the base has no tokenizer"):
        make_documents(rows, "owner/name", encode, max_tokens=16, vocab_size=40)


def test_a_recipe_trains_on_a_data_set(datasets, world, tmp_path):  # noqa: F811
    source = 'data.sources=[{ hub = "owner/name", weight = 2.0 }, { path = "answers.jsonl", limit = 3 }]'
    changes = ["train.steps=1", 'data.bad_lines="skip"', "data.held_out=0"]
    train(world, tmp_path / "run", source, *changes)
    assert datasets.calls[0][:3] == ("owner/name", None, "train")
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["data"]["sources"][0] == {"hub": "owner/name", "weight": 2.0}


def test_without_network_or_package_there_is_one_clear_line(datasets, monkeypatch):
    with pytest.raises(DataError, match=r"nobody/nothing cannot be read: Couldn't reach the hub\. Check") as caught:
        list(read_hub("nobody/nothing"))
    assert "\n" not in str(caught.value)

    def offline(self, name, timeout):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(hub.HfApi, "dataset_info", offline)
    with pytest.raises(DataError, match="Name or service not known"):
        list(read_hub("owner/name"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"package 'datasets' is not installed \(pip install 'trimode\[train\]'\)"):
        list(read_hub("owner/name"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{ weight = 1.0 }", "needs a path"),
        ("{ path = 'a', hub = 'b' }", "one of the two"),
        ("{ path = 'a', split = 'test' }", "belong to a data set of the hub"),
        ("{ hub = 'a/b', limit = 0 }", "limit must be at least 1"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(world, source, said):  # noqa: F811
    with pytest.raises(ValueError, match=said):
        read_recipe(world / "recipe.toml", [f"data.sources=[{source}]"])
