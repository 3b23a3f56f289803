"""The recipes of the published sizes: each can be read, and says the memory that it needs."""

import json
import re
from pathlib import Path

import pytest

from trimode.checkpoint.presets import published_sizes
from trimode.cli.app import run as program
from trimode.model.config import ModelConfig
from trimode.training.convert import make_objective
from trimode.training.memory import num_trained, training_memory
from trimode.training.recipe import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PUBLISHED = sorted((RECIPES / "nemotron-labs-diffusion").glob("*.toml"))


def published(size: str) -> ModelConfig:
    sizes = published_sizes(f"nvidia/Nemotron-Labs-Diffusion-{size.upper()}")
    assert sizes is not None
    return sizes


SHAPES = {size: published(size) for size in ("3b", "8b", "14b")}
PARAMETERS = {"3b": 3_831_659_520, "8b": 8_489_553_920, "14b": 13_506_073_600}
"""As published."""


def test_there_is_a_recipe_for_each_size_and_each_way_to_train():
    assert {file.stem for file in PUBLISHED} == {f"{s}-{way}" for s in SHAPES for way in ("full", "lora", "adapter")}


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_a_recipe_says_the_memory_that_the_formula_gives(file):
    recipe = read_recipe(file)
    make_objective(recipe)
    size, way = file.stem.split("-")
    assert (recipe.weights == "full") == (way == "full")
    assert (recipe.objective == "adapter") == (way == "adapter")
    stated = re.search(r"Memory of each of (\d+) ranks?: (\d+) GB", file.read_text())
    assert stated is not None
    memory = training_memory(SHAPES[size], recipe, int(stated[1]))
    assert round(memory.total / 1e9) == int(stated[2])
    assert memory.total < 80e9, "one GPU of the common kind"
    assert f"ministral-3-{size}-" in recipe.base.lower()


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_a_plan_needs_neither_a_folder_nor_the_base(file, monkeypatch, capsys):
    def unreachable(*_):
        raise AssertionError("a plan went looking for the base")

    monkeypatch.setattr("trimode.checkpoint.open_checkpoint", unreachable)
    assert program(["train", str(file), "--plan", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["memory_bytes"]
    assert told["total"] == training_memory(SHAPES[file.stem.split("-")[0]], read_recipe(file)).total


def test_training_without_a_folder_is_refused(capsys):
    assert program(["train", str(PUBLISHED[0])]) == 2
    assert "--output names the run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("size", SHAPES)
def test_weights_gradients_and_moments_are_counted_by_hand(size):
    assert SHAPES[size].num_parameters == PARAMETERS[size]
    full = read_recipe(RECIPES / "nemotron-labs-diffusion" / f"{size}-full.toml", ["train.shard=false"])
    memory = training_memory(SHAPES[size], full)
    assert memory.weights == 4 * PARAMETERS[size]
    assert memory.gradients == 4 * PARAMETERS[size]
    assert memory.optimizer == 8 * PARAMETERS[size]
    adapter = read_recipe(RECIPES / "nemotron-labs-diffusion" / f"{size}-adapter.toml")
    memory, trained = training_memory(SHAPES[size], adapter), num_trained(SHAPES[size], adapter)
    assert memory.weights == 2 * PARAMETERS[size] + 4 * trained
    assert memory.optimizer == 8 * trained


def test_the_embedded_models_recipe_can_be_read():
    recipe = read_recipe(RECIPES / "smollm2-135m" / "adapter.toml")
    assert all(Path(source.path).exists() for source in recipe.data.sources)
