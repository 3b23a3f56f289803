"""A recipe from end to end on a tiny base: what it learns, and that a run is the same however it was cut up."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import typer

import trimode
from tests.worlds import random_tensors, tiny_config
from trimode.checkpoint import open_checkpoint, save_checkpoint
from trimode.checkpoint.adapter_files import open_adapter
from trimode.cli.train import run
from trimode.errors import CheckpointError, DataError, RunStateError, SettingError, TrainingError, TrimodeError
from trimode.training.recipe import read_recipe
from trimode.training.trainer import Interrupted

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.*"),
]

SCALE = 0.15
"""Of the base's weights: small enough for its text to repeat itself, which two layers can foresee."""

RECIPE = """
base = "base"
objective = "adapter"
dtype = "float32"
block_length = 4

[data]
sources = [{ path = "answers.jsonl" }]
max_tokens = 64
held_out = 4

[adapter]
rank = 16
alpha = 32.0

[blocks]
block_lengths = [4]
blocks_per_document = 24

[train]
steps = 60
documents_per_step = 4
documents_per_forward = 4
rate = 1e-2
warmup = 4
save_every = 1000
evaluate_every = 1000
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A base without any training, its greedy answers to random prompts, and a recipe."""
    directory = tmp_path_factory.mktemp("world")
    config = tiny_config(
        family="llama",
        trained_for_blocks=False,
        known_tokens_are_causal=True,
        adapter_acts_on="masks",
        eos_token_ids=(),
        tied_head=True,
    )
    save_checkpoint(directory / "base", config, random_tensors(config, seed=5, scale=SCALE))
    model = trimode.load(directory / "base", dtype="float32")
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, 40, (48, 3), generator=random).tolist()
    answers = model.generate(prompts, mode="ar", max_new_tokens=40)
    with (directory / "answers.jsonl").open("w") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            file.write(json.dumps({"prompt_ids": prompt, "answer_ids": answer.token_ids}) + "\n")
    (directory / "recipe.toml").write_text(RECIPE)
    return directory


def train(world: Path, output: Path, *changes: str) -> dict:
    return run(read_recipe(world / "recipe.toml", changes), output, "cpu", None)


def factors(output: Path, world: Path) -> dict[str, torch.Tensor]:
    lora = open_adapter(output / "adapter", open_checkpoint(world / "base").config).read()
    return {f"{place} {i}": factor for place, pair in lora.factors.items() for i, factor in enumerate(pair)}


def with_adapter(world: Path, adapter: Path, directory: Path) -> Path:
    """The base with the adapter beside it."""
    directory.mkdir()
    for file in (world / "base").iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "linear_spec_lora").symlink_to(adapter)
    return directory


def test_a_tiny_recipe_raises_the_acceptance_and_leaves_the_text_alone(world, tmp_path):
    train(world, tmp_path / "none", "train.steps=1", "train.rate=1e-9")
    train(world, tmp_path / "run", "train.steps=100")
    plain = trimode.load(world / "base", dtype="float32")
    untrained = trimode.load(with_adapter(world, tmp_path / "none" / "adapter", tmp_path / "start"), dtype="float32")
    trained = trimode.load(with_adapter(world, tmp_path / "run" / "adapter", tmp_path / "model"), dtype="float32")
    random = torch.Generator().manual_seed(1)
    prompts = torch.randint(4, 40, (8, 3), generator=random).tolist()
    knobs = {"max_new_tokens": 40, "block_length": 4}
    for kind in ("linear", "quadratic"):
        before = untrained.generate(prompts, mode="self_spec", self_spec_kind=kind, **knobs)
        after = trained.generate(prompts, mode="self_spec", self_spec_kind=kind, **knobs)
        ar = plain.generate(prompts, mode="ar", max_new_tokens=40)
        assert [out.token_ids for out in after] == [out.token_ids for out in before] == [out.token_ids for out in ar]
        # tokens a decode forward; the margin is stated here: a seventh more at least
        tpf = [sum(len(o.token_ids) for o in outs) / sum(o.stats.nfe_decode for o in outs) for outs in (before, after)]
        assert tpf[1] > 1.14 * tpf[0], (kind, tpf)
        accepted = [sum(out.stats.acceptance_length for out in outs) / len(outs) for outs in (before, after)]
        assert accepted[1] > accepted[0] + 0.25, (kind, accepted)


def test_a_run_that_was_cut_ends_where_one_in_one_piece_does(world, tmp_path):
    train(world, tmp_path / "whole", "train.steps=6", "train.schedule=constant")
    train(world, tmp_path / "cut", "train.steps=2", "train.schedule=constant")
    train(world, tmp_path / "cut", "train.steps=6", "train.schedule=constant")
    whole, cut = factors(tmp_path / "whole", world), factors(tmp_path / "cut", world)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any(factor.abs().max() > 0 for name, factor in whole.items() if name.endswith("1"))


def test_a_finished_run_shows_a_full_bar(world, tmp_path, capsys):
    train(world, tmp_path / "run", "train.steps=2")
    capsys.readouterr()
    train(world, tmp_path / "run", "train.steps=2")
    assert "2/2" in capsys.readouterr().err


def test_micro_batches_give_the_same_update(world, tmp_path):
    train(world, tmp_path / "four", "train.steps=1")
    train(world, tmp_path / "one", "train.steps=1", "train.documents_per_forward=1")
    four, one = factors(tmp_path / "four", world), factors(tmp_path / "one", world)
    for name in four:
        torch.testing.assert_close(four[name].float(), one[name].float(), atol=2e-3, rtol=2e-2)


def test_sigterm_saves_and_the_same_command_goes_on(world, tmp_path, monkeypatch):
    from trimode.training import trainer

    once = []

    def adamw(*args, **kwargs):
        optimizer = real(*args, **kwargs)
        step = optimizer.step

        def killed(*a, **k):
            once.append(1)
            if len(once) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*a, **k)

        optimizer.step = killed
        return optimizer

    real = trainer.adamw
    monkeypatch.setattr(trainer, "adamw", adamw)
    recipe = read_recipe(world / "recipe.toml", ["train.steps=6"])
    with pytest.raises(typer.Exit) as ended:
        run(recipe, tmp_path / "run", "cpu", None)
    assert ended.value.exit_code == 128 + signal.SIGTERM
    assert isinstance(ended.value.__context__, Interrupted)
    assert [state.name for state in (tmp_path / "run").glob("step-*")] == ["step-0000003"]
    monkeypatch.undo()
    train(world, tmp_path / "run", "train.steps=6")
    train(world, tmp_path / "whole", "train.steps=6")
    whole, cut = factors(tmp_path / "whole", world), factors(tmp_path / "run", world)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_loss_that_is_no_number_stops_with_the_last_state_intact(world, tmp_path):
    train(world, tmp_path / "run", "train.steps=2")
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    state = next((tmp_path / "run").glob("step-*"))
    from trimode.training import objectives

    real = objectives.cross_entropy_and_distance
    try:
        objectives.cross_entropy_and_distance = lambda *args: real(*args) * float("nan")
        with pytest.raises(TrainingError, match=r"loss of update 2 is nan.*step-0000002"):
            train(world, tmp_path / "run", "train.steps=4")
    finally:
        objectives.cross_entropy_and_distance = real
    assert list((tmp_path / "run").glob("step-*")) == [state]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("change", ["adapter.rank=8", "train.seed=1", "blocks.decay=2.0"])
def test_another_runs_folder_is_refused_and_left_alone(world, tmp_path, change):
    train(world, tmp_path / "run", "train.steps=1")
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(RunStateError, match="holds another run"):
        train(world, tmp_path / "run", "train.steps=1", change)
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("what", ["state", "log"])
def test_a_full_disk_stops_the_run_with_the_last_state_intact(world, tmp_path, what):
    train(world, tmp_path / "run", "train.steps=2", "train.schedule=constant")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    # as on a full disk, the system refuses in the middle of a write; the log is long by then, or the state is
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write("\n" * (4_000_000 if what == "log" else 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000 if what == "log" else 20_000, hard))
    try:
        with pytest.raises(TrimodeError, match=r"Cannot write .*: File too large\. The last .*state") as caught:
            train(world, tmp_path / "run", "train.steps=4", "train.schedule=constant")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert all(p.read_bytes() == content for p, content in before.items() if p.name not in ("log.jsonl", "curves.png"))
    assert not list((tmp_path / "run").glob("*.draft"))
    # and once there is room again, the run goes on to where one in one piece ends
    train(world, tmp_path / "run", "train.steps=4", "train.schedule=constant")
    train(world, tmp_path / "whole", "train.steps=4", "train.schedule=constant")
    whole, cut = factors(tmp_path / "whole", world), factors(tmp_path / "run", world)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_damaged_state_is_named(world, tmp_path):
    train(world, tmp_path / "run", "train.steps=2")
    (state,) = (tmp_path / "run").glob("step-*")
    for file in (state / "tensors").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunStateError, match=r"step-0000002 is damaged \(.*Remove it") as caught:
        train(world, tmp_path / "run", "train.steps=3")
    assert "\n" not in str(caught.value)


def test_what_a_run_tells_can_be_read_in_its_three_forms(world, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = train(world, tmp_path / "run", "train.steps=4", "train.evaluate_every=2")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "run" / "events"))
    events.Reload()
    assert {"loss", "rate", "grad_norm", "agree_1", "held_out_matched", "positions"} <= set(events.Tags()["scalars"])
    for name in ("loss", "held_out_matched"):
        written = [(line["step"], line[name]) for line in lines if name in line]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (s, pytest.approx(v, rel=1e-6)) for s, v in written
        ]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    # four documents of 24 blocks of three places at most, some of them known or beyond the text
    assert all(100 <= line["positions"] <= 4 * 24 * 3 for line in lines)
    speed = sum(line["positions"] for line in lines) / sum(line["seconds"] for line in lines)
    assert summary["positions_per_second"] == pytest.approx(speed)
    said = " ".join(capsys.readouterr().err.split())
    assert "needs about" in said
    assert f"4 updates in {sum(line['seconds'] for line in lines):,.0f} s: {speed:,.0f} positions a second" in said
    assert "GB at the peak" in said


def test_a_plan_says_the_memory_and_writes_nothing(world, tmp_path, capsys):
    from trimode.cli.app import run as program

    command = ["train", str(world / "recipe.toml"), "-o", str(tmp_path / "run"), "--plan", "--json"]
    assert program(command) == 0
    out = capsys.readouterr()
    assert "needs about" in out.err
    memory = json.loads(out.out)["memory_bytes"]
    assert memory["total"] == sum(memory[name] for name in ("weights", "gradients", "optimizer", "activations"))
    assert not (tmp_path / "run").exists()


def test_training_goes_on_from_an_exported_adapter(world, tmp_path):
    train(world, tmp_path / "first", "train.steps=20")
    first = f"adapter.initial={tmp_path / 'first' / 'adapter'}"
    train(world, tmp_path / "second", first, "train.steps=1", "train.rate=1e-9")
    a, b = factors(tmp_path / "first", world), factors(tmp_path / "second", world)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-2)
    with pytest.raises(TrainingError, match="has rank 16"):
        train(world, tmp_path / "third", first, "adapter.rank=8")


def test_a_successor_may_be_new_and_must_else_have_the_width_that_it_had(world, tmp_path):
    train(world, tmp_path / "without", "train.steps=1")
    without = f"adapter.initial={tmp_path / 'without' / 'adapter'}"
    train(world, tmp_path / "with", without, "adapter.successor=4", "train.steps=1")
    first = f"adapter.initial={tmp_path / 'with' / 'adapter'}"
    for width in (0, 8):
        with pytest.raises(TrainingError, match=f"has a successor of width 4; the recipe asks for {width}"):
            train(world, tmp_path / f"other{width}", first, f"adapter.successor={width}", "train.steps=1")


def test_an_adapter_for_another_base_is_refused(world, tmp_path):
    train(world, tmp_path / "run", "train.steps=1")
    config = open_checkpoint(world / "base").config
    save_checkpoint(tmp_path / "other", config, random_tensors(config, seed=6, scale=SCALE))
    (tmp_path / "other" / "linear_spec_lora").symlink_to(tmp_path / "run" / "adapter")
    with pytest.raises(CheckpointError, match="trained on another base"):
        trimode.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("", "holds no documents"),
        ("{not json\n", "Line 1 of .*not JSON"),
        ("\ufeff".encode("utf-16").decode("latin-1"), "Line 1 of .*not UTF-8"),
        ('{"prompt_ids": [1], "answer_ids": [1, 99, 2, 3]}\n', "Line 1 of .*ids below 40"),
        ('{"prompt_ids": [1], "answer_ids": [1]}\n', "Line 1 of .*fewer than 3 tokens"),
        ('{"question": "?"}\n', "Line 1 of .*no answer_ids"),
    ],
)
def test_bad_data_is_named_by_line_and_nothing_is_written(world, tmp_path, lines, fault):
    (tmp_path / "bad.jsonl").write_text(lines, encoding="latin-1")
    with pytest.raises(DataError, match=fault):
        train(world, tmp_path / "run", f"data.sources=[{{ path = '{tmp_path / 'bad.jsonl'}' }}]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("train.setps=3", "Did you mean 'train.steps'|steps"),
        ("train.steps=many", "train.steps must be a whole number"),
        ("objective=adaptor", "objective must be one of"),
        ("adapter.parts=['querry']", "An adapter's parts are some of"),
        ("data.max_tokens=4000", "exceeds the base's context"),
    ],
)
def test_a_bad_recipe_is_one_clear_line(world, tmp_path, change, fault):
    with pytest.raises((SettingError, TrainingError), match=fault) as caught:
        train(world, tmp_path / "run", change)
    assert "\n" not in str(caught.value)
