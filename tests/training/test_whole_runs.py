"""Runs of the other objectives, conversion in one command, and two processes that are one run."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trimode
from tests.training.test_run import RECIPE, factors, train, world  # noqa: F401
from tests.worlds import random_tensors, random_transformer, tiny_config
from trimode.checkpoint import open_checkpoint, save_checkpoint
from trimode.cli.app import run as program
from trimode.cli.train import run
from trimode.errors import MissingMaskTokenError, SettingError, TrainingError
from trimode.text.ngrams import count_ngrams
from trimode.training.convert import choose_mask, make_objective
from trimode.training.memory import num_trained, training_memory
from trimode.training.recipe import make_recipe, read_recipe
from trimode.training.trainable import AdapterParameters, TrainableModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WHOLE = RECIPE.replace('"adapter"', '"joint"').split("[adapter]")[0] + RECIPE[RECIPE.index("[train]") :]


def recipe_file(directory: Path, name: str, text: str) -> Path:
    path = directory / f"{name}.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_a_joint_run_writes_a_checkpoint_that_decodes_in_every_mode(world, tmp_path, weights):  # noqa: F811
    recipe = read_recipe(
        recipe_file(world, "joint", WHOLE),
        [f"weights={weights}", "train.steps=30", "train.rate=3e-3", "data.held_out=0"],
    )
    run(recipe, tmp_path / "run", "cpu", None)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    model = trimode.load(tmp_path / "run" / "checkpoint", dtype="float32")
    assert model.config.trained_for_blocks
    assert model.config.block_length == 4
    outs = {mode: model.generate([5, 6, 7], mode=mode, max_new_tokens=12) for mode in ("ar", "diffusion", "self_spec")}
    assert outs["ar"].token_ids == outs["self_spec"].token_ids
    before = dict(open_checkpoint(world / "base").tensors(dtype=torch.float32))
    after = dict(open_checkpoint(tmp_path / "run" / "checkpoint").tensors(dtype=torch.float32))
    assert any(not torch.equal(before[name].bfloat16().float(), after[name]) for name in before)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5_000


def test_a_lora_multiplied_in_gives_the_trained_models_own_logits():
    from trimode.model.attention import SelfAttention
    from trimode.model.transformer import Transformer
    from trimode.model.views import Causal
    from trimode.training.trainable import merged_tensors

    config = tiny_config()
    adapter = AdapterParameters(random_transformer(config, 1), rank=4, alpha=8.0, mask_embedding=False)
    for B in adapter.B.values():
        torch.nn.init.normal_(B, std=0.1)
    model = TrainableModel(random_transformer(config, 1, pack=False), adapter)
    ids = torch.tensor([5, 6, 7, 8])
    attend = SelfAttention(Causal(), 1, 4, "plain", "cpu")
    expected = model.logits(model(ids, torch.arange(4), attend, adapted=torch.arange(4)))
    merged = Transformer(config)
    merged.load(merged_tensors(model), pack=False)
    torch.testing.assert_close(merged.logits(merged(ids, torch.arange(4), attend)), expected, atol=1e-4, rtol=1e-4)


def test_a_drafter_is_trained_for_a_tri_mode_checkpoint_and_for_no_other(world, tmp_path):  # noqa: F811
    config = tiny_config(eos_token_ids=())
    save_checkpoint(tmp_path / "tri", config, random_tensors(config, seed=5, scale=0.15))
    text = RECIPE.replace('"adapter"', '"drafter"').replace("[blocks]", "[drafter]")
    text = text.replace("block_lengths = [4]\n", "").replace('"base"', f'"{tmp_path / "tri"}"')
    path = recipe_file(world, "drafter", text)
    changes = ['adapter.parts=["output"]', "train.steps=3", "adapter.alpha=64.0"]
    run(read_recipe(path, changes), tmp_path / "run", "cpu", None)
    (tmp_path / "run" / "adapter").rename(tmp_path / "tri" / "linear_spec_lora")
    model = trimode.load(tmp_path / "tri", dtype="float32")
    assert model.config.adapter_acts_on == "draft"
    assert model.adapter.parts == {"output"}
    ar = model.generate([5, 6, 7], mode="ar", max_new_tokens=12)
    assert model.generate([5, 6, 7], mode="self_spec", max_new_tokens=12).token_ids == ar.token_ids
    with pytest.raises(TrainingError, match="takes no drafter"):
        run(read_recipe(path, [*changes, f"base={world / 'base'}"]), tmp_path / "no", "cpu", None)


def test_one_command_converts_a_base_and_continues_where_it_was(world, tmp_path, capsys):  # noqa: F811
    command = ["convert", str(world / "base"), "-o", str(tmp_path / "new"), "--data", str(world / "answers.jsonl")]
    command += ["--block-length", "4", "--max-tokens", "64", "--steps", "20", "--set", "dtype=float32", "--json"]
    assert program(command) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 20
    model = trimode.load(tmp_path / "new", dtype="float32")
    ar = trimode.load(world / "base", dtype="float32").generate([5, 6, 7], mode="ar", max_new_tokens=20)
    for kind in ("linear", "quadratic"):
        out = model.generate([5, 6, 7], mode="self_spec", self_spec_kind=kind, max_new_tokens=20)
        assert out.token_ids == ar.token_ids
    assert model.generate([5, 6, 7], mode="diffusion", max_new_tokens=20).token_ids
    # what the documents say is drafted without a forward
    documents = [json.loads(line) for line in (world / "answers.jsonl").read_text().splitlines()]
    texts = [([*d["prompt_ids"], *d["answer_ids"]][:64], len(d["prompt_ids"])) for d in documents]
    counted = count_ngrams(texts, model.config.vocab_size)
    assert open_checkpoint(tmp_path / "new").ngrams().slots.tolist() == counted.slots.tolist()
    assert program(command) == 0  # it is there already
    out, err = capsys.readouterr()
    assert "is finished" in err
    assert json.loads(out)["checkpoint"] == str(tmp_path / "new")
    for other in (
        ["--set", "train.seed=3"],
        ["--steps", "30"],
        ["--mask-token", "7"],
    ):  # another run, or more of this one
        assert program([*command, *other]) == 2
        assert "not empty" in capsys.readouterr().err
    (tmp_path / "new" / "config.json").unlink()  # what lies there now is something else
    assert program(command) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_converted_checkpoint_appears_whole_in_whatever_folder_is_there(world, tmp_path, monkeypatch):  # noqa: F811
    """An empty one, a link to one, the one that the command runs in; what lies beside it stays."""
    command = [
        "convert",
        str(world / "base"),
        "--data",
        str(world / "answers.jsonl"),
        "--steps",
        "1",
        "--max-tokens",
        "64",
    ]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty", target_is_directory=True)
    (tmp_path / "link.draft").mkdir()
    (tmp_path / "link.draft" / "mine").write_text("")
    assert program([*command, "-o", str(tmp_path / "link")]) == 0
    assert trimode.load(tmp_path / "empty").generate([5, 6], mode="self_spec", max_new_tokens=2).token_ids
    assert (tmp_path / "link.draft" / "mine").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert program([*command, "-o", "."]) == 0
    assert trimode.load(tmp_path / "here").generate([5, 6], mode="self_spec", max_new_tokens=2).token_ids


def test_one_command_counts_what_a_model_says_into_its_directory(world, tmp_path, capsys):  # noqa: F811
    home = tmp_path / "model"
    shutil.copytree(world / "base", home)
    answers = world / "answers.jsonl"
    command = ["ngrams", str(answers), "--model", str(home)]
    assert open_checkpoint(home).ngrams() is None
    assert program([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    table = open_checkpoint(home).ngrams()
    assert (told["contexts"], told["output"]) == (table.num_contexts, str(home / "ngrams.safetensors"))
    # answers that were counted are drafted from the table
    first = json.loads(answers.read_text().splitlines()[0])["prompt_ids"]
    plain, drafting = trimode.load(world / "base", dtype="float32"), trimode.load(home, dtype="float32")
    kwargs = {"mode": "self_spec", "self_spec_kind": "lookup", "max_new_tokens": 12, "block_length": 4}
    ar = plain.generate(first, mode="ar", max_new_tokens=12)
    out = drafting.generate(first, **kwargs)
    assert out.token_ids == ar.token_ids
    assert out.stats.nfe_decode < plain.generate(first, **kwargs).stats.nfe_decode
    # it goes where the model goes
    drafting.save(tmp_path / "saved")
    assert open_checkpoint(tmp_path / "saved").ngrams().slots.tolist() == table.slots.tolist()
    # lines that hold nothing are left out; the last file replaces the first
    (tmp_path / "few.jsonl").write_text('{"prompt_ids": [5], "answer_ids": [6, 7, 8]}\n{"nothing": 1}\n')
    assert program(["ngrams", str(tmp_path / "few.jsonl"), "--model", str(home)]) == 0
    assert "1 lines skipped; the first: line 2" in capsys.readouterr().err
    assert open_checkpoint(home).ngrams().num_contexts < table.num_contexts
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    for bad, fault in (
        (["ngrams", str(tmp_path / "prompts.jsonl"), "--model", str(home)], "it has no answer_ids"),
        (["ngrams", str(tmp_path / "none.jsonl"), "--model", str(home)], "There is no file"),
        (["ngrams", str(answers), "--model", str(home), "--max-tokens", "x"], "--max-tokens"),
        (["ngrams", str(answers), "--model", str(home), "-o", str(tmp_path / "no" / "x")], "a directory that is there"),
        (["ngrams", str(answers), "--model", str(home), "-o", ""], "must name a file"),
        (["ngrams", str(answers), "--model", str(home), "-o", str(tmp_path)], "must name a file"),
        (["ngrams", str(answers), "--model", str(home), "-o", str(answers)], "is no table"),
    ):
        assert program(bad) == 2
        assert fault in capsys.readouterr().err


class _Words:
    """A vocabulary."""

    def __init__(self, *words, template=None, unknown="<unk>"):
        self.words = list(words)
        self.chat_template, self.special_tokens = template, {"unk_token": unknown}
        self.special_ids = frozenset(i for i, word in enumerate(words) if word.startswith("<"))

    def id_to_token(self, i):
        return self.words[i] if i < len(self.words) else None

    def token_to_id(self, word):
        return self.words.index(word) if word in self.words else None


def test_a_mask_is_found_in_the_vocabulary_or_asked_for():
    none = tiny_config(mask_token_id=None, vocab_size=4)
    assert choose_mask(none, _Words("a", "<s>", "</s>", "<reserved_7>")) == 3
    assert choose_mask(none, _Words("<s>", "a", "b")) == 3
    assert choose_mask(none, _Words("<s>", "a", "b", "c"), "a") == 1
    assert choose_mask(none, None, "1") == 1
    for tokenizer, wanted in [(_Words("<s>", "a", "b", "c"), None), (None, None), (None, "9"), (None, "x")]:
        with pytest.raises(MissingMaskTokenError):
            choose_mask(none, tokenizer, wanted)


def test_the_bare_file_of_the_embedded_model_gets_the_mask_of_its_preset():
    preset = open_checkpoint("smollm2-135m")
    bare = open_checkpoint(preset.path)
    assert bare.config.mask_token_id is None
    assert choose_mask(bare.config, bare.tokenizer()) == preset.config.mask_token_id


def test_where_no_mask_is_found_control_tokens_that_no_text_holds_are_named():
    words = _Words("<s>", "<unk>", "<user>", "<image>", template="{{ '<user>' }}")
    with pytest.raises(MissingMaskTokenError, match=r"--mask-token, such as '<image>'\.$"):
        choose_mask(tiny_config(mask_token_id=None, vocab_size=4, bos_token_id=0), words)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("objective=ar", r"\[blocks\] has no effect"),
        ("weights=full", "weights = 'full' does not go with"),
        ("objective=rl", "objective must be one of"),
    ],
)
def test_a_setting_that_another_disconnects_is_refused(world, change, said):  # noqa: F811
    with pytest.raises(SettingError, match=said):
        read_recipe(world / "recipe.toml", [change])


def test_all_that_a_recipe_lacks_is_told_at_once(world):  # noqa: F811
    written = tomllib.loads((world / "recipe.toml").read_text())
    del written["base"], written["data"]["sources"], written["train"]["steps"], written["train"]["documents_per_step"]
    with pytest.raises(SettingError) as error:
        make_recipe(written, world)
    assert "lacks base, data.sources, train.steps, train.documents_per_step. " in str(error.value)
    del written["data"], written["train"]
    told = "base, data.sources, train.steps, train.documents_per_step, train.documents_per_forward"
    with pytest.raises(SettingError) as error:
        make_recipe(written, world)
    assert f"lacks {told}. " in str(error.value)
    with pytest.raises(SettingError, match=r"Unknown key 'train\.stpes'"):  # more help than that steps are missing
        make_recipe({**written, "train": {"stpes": 3}}, world)


# A process that gets no turn for a while on a busy machine is not a node that died: by default 15 seconds are its end.
PATIENT = "keep_alive_interval=30,keep_alive_max_attempt=20,read_timeout=600"


def two_processes(recipe: Path, output: Path, *changes: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--local-addr=127.0.0.1", f"--rdzv-conf={PATIENT}"]
    command += ["-m", "trimode", "train", str(recipe), "-o", str(output)]
    for change in changes:
        command += ["--set", change]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]


def losses(run_directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_directory / "log.jsonl").read_text().splitlines()]


def test_two_processes_get_one_processs_losses_and_adapter(world, tmp_path):  # noqa: F811
    changes = ["train.steps=3", "train.documents_per_forward=2", "data.held_out=0"]
    train(world, tmp_path / "one", *changes)
    two_processes(world / "recipe.toml", tmp_path / "two", *changes)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = factors(tmp_path / "one", world), factors(tmp_path / "two", world)
    for name in one:
        torch.testing.assert_close(one[name].float(), two[name].float(), atol=2e-3, rtol=2e-2)


def test_two_processes_that_share_the_weights_get_one_processs_losses_and_weights(world, tmp_path):  # noqa: F811
    path = recipe_file(world, "sharded", WHOLE)
    changes = ["weights=full", "train.rate=1e-3", "data.held_out=0", "train.clip=0.5", "train.schedule=constant"]
    run(read_recipe(path, [*changes, "train.steps=3"]), tmp_path / "one", "cpu", None)
    two_processes(path, tmp_path / "two", *changes, "train.shard=true", "train.steps=2")
    # the state of two ranks is whole: one goes on with it
    run(read_recipe(path, [*changes, "train.steps=3"]), tmp_path / "two", "cpu", None)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (
        dict(open_checkpoint(tmp_path / name / "checkpoint").tensors(dtype=torch.float32)) for name in ("one", "two")
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=4e-3, rtol=2e-2)


def test_recomputing_changes_memory_and_nothing_else(world, tmp_path):  # noqa: F811
    path = recipe_file(world, "recompute", WHOLE)
    changes = ["weights=full", "train.steps=3", "train.rate=1e-3", "data.held_out=0"]
    for name in ("plain", "recomputed"):
        run(
            read_recipe(path, [*changes, f"train.recompute={str(name == 'recomputed').lower()}"]),
            tmp_path / name,
            "cpu",
            None,
        )
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "recomputed"), rel=1e-6)


def shaped(objective: str, weights: str, **train) -> object:
    raw = {
        "base": "base",
        "objective": objective,
        "weights": weights,
        "dtype": "float32",
        "data": {"sources": [{"path": "x"}], "max_tokens": 64},
        "train": {"steps": 1, "documents_per_step": 1, "documents_per_forward": 1, **train},
    }
    return make_recipe(raw, Path("."))


@pytest.mark.parametrize(
    ("objective", "weights", "dtype"),
    [
        ("ar", "full", "float32"),
        ("ar", "full", "bfloat16"),
        ("ar", "lora", "float32"),
        ("joint", "full", "float32"),
        ("joint", "full", "bfloat16"),
        ("joint", "lora", "float32"),
        ("adapter", "lora", "float32"),
        ("drafter", "lora", "float32"),
    ],
)
def test_the_memory_formula_counts_what_is_there(objective, weights, dtype):
    from trimode.diffusion.corruption import SampleNoise
    from trimode.training.data import Document, pack
    from trimode.training.optim import adamw

    config = tiny_config(width=64, mlp_width=96, num_layers=4)
    recipe = replace(shaped(objective, weights), dtype=dtype)
    transformer = random_transformer(config, 1, pack=False)
    shape = recipe.adapter
    adapter = None
    if weights == "lora":
        masks = objective == "adapter"
        adapter = AdapterParameters(transformer, rank=shape.rank, alpha=1.0, mask_embedding=masks)
    model = TrainableModel(transformer, adapter)
    memory = training_memory(config, recipe)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert memory.weights == 4 * sum(p.numel() for p in model.parameters())
    assert memory.gradients == 4 * sum(p.numel() for p in trained)
    if weights == "lora":
        assert num_trained(config, recipe) == sum(p.numel() for p in trained)
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss = make_objective(recipe)(model, pack([Document((5,) * 64, 1)], [0]), SampleNoise(0))
    assert memory.activations == pytest.approx(sum(size for size, _ in kept.values()), rel=0.2)
    loss.total.backward()
    optimizer = adamw(model.named_parameters(), rate=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim > 0]
    assert memory.optimizer == sum(t.numel() * t.element_size() for t in moments)


def test_more_ranks_hold_less_each_and_recomputing_keeps_less():
    config = tiny_config(width=64, mlp_width=96, num_layers=8)
    one = training_memory(config, shaped("joint", "full"))
    shared = training_memory(config, shaped("joint", "full", shard=True), num_ranks=4)
    assert shared.optimizer < 0.5 * one.optimizer
    assert training_memory(config, shaped("joint", "full", recompute=True)).activations < 0.5 * one.activations
