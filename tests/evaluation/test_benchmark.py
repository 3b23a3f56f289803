"""The benchmark counts rightly, and catches figures that would mislead."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import trimode
from tests.worlds import random_lora, tiny_config, tiny_model
from trimode.cli.app import run
from trimode.decoding.autoregressive import Autoregressive
from trimode.decoding.block_diffusion import BlockDiffusion
from trimode.decoding.generate import run_to_end
from trimode.decoding.interface import Generation, Predictions, Rows, Traits
from trimode.decoding.self_speculation import LinearSelfSpeculation
from trimode.decoding.settings import Settings
from trimode.errors import MeasurementError
from trimode.evaluation.benchmark import Own, Setting, measure, probe_adapter, summarise
from trimode.evaluation.metrics import Watch
from trimode.evaluation.prompts import BenchPrompt, read_bench_prompts

MASK, VOCAB = 3, 16
PROMPT = (5, 6, 7)
ASK = [BenchPrompt(prompt=PROMPT)]


def truth(position):
    return 4 + position % 10


def watched(decoder, wrong=(), **settings):
    """A model that knows the text; as a drafter it errs at the positions `wrong`."""

    def rows(tokens):
        return Rows(torch.nn.functional.one_hot(torch.tensor(tokens, dtype=torch.long), VOCAB).float() * 50)

    def answer(generations, steps):
        predictions = []
        for g, s in zip(generations, steps, strict=True):
            at = [truth(g.cached + i) + ((g.cached + i) in wrong) for i in s.at]
            predictions.append(Predictions(after=rows([truth(g.cached + i + 1) for i in s.after]), at=rows(at)))
        return predictions

    g = Generation(
        prompt=PROMPT,
        settings=Settings(**settings),
        traits=Traits(mask_token_id=MASK, eos_token_ids=frozenset(), block_length=4),
        random=torch.Generator(),
        decoder=decoder,
    )
    watch = Watch()
    list(run_to_end([g], answer, observe=watch))
    return watch


def test_autoregressive_forwards_are_one_a_token_and_the_prompt_is_no_output():
    w = watched(Autoregressive(), max_new_tokens=5)
    assert (w.tokens, w.prompt_tokens, w.nfe_prefill, w.nfe_decode, w.rounds) == (5, 3, 1, 4, 0)


def test_a_round_counts_its_accepted_drafts_its_bonus_and_an_early_end():
    # prefill: 1 token (position 3). Round: drafts 4, 5, 6, the second wrong: accepts 1, bonus 1.
    # Round: drafts 6, 7, 8 all right: 3 and a bonus, of which max_new_tokens leaves 2.
    w = watched(LinearSelfSpeculation(), wrong={5}, max_new_tokens=5)
    assert (w.tokens, w.nfe_prefill, w.nfe_decode) == (5, 1, 4)
    assert (w.rounds, w.round_tokens, w.accepted) == (2, 4, [1, 2])


def test_diffusion_counts_denoising_and_committing_alike():
    # anchor by the prefill, one sure denoising step, one commit with the next anchor, one denoising step
    w = watched(BlockDiffusion(), max_new_tokens=8)
    assert (w.tokens, w.nfe_prefill, w.nfe_decode, w.rounds) == (8, 1, 3, 0)


class Lying:
    """A model whose answers are changed on the way."""

    def __init__(self, change, model=None):
        self.inner, self.change = model or tiny_model(), change
        self.dtype, self.adapter, self.config = torch.float32, self.inner.adapter, self.inner.config

    def generate(self, *args, **kwargs):
        return self.change(self.inner.generate(*args, **kwargs))


def measured(model, mode="ar"):
    return list(measure({"trimode": Own(model)}, [Setting(mode=mode)], ASK, max_new_tokens=6))


def test_a_counted_prompt_token_is_caught():
    def change(out):
        return dataclasses.replace(out, stats=dataclasses.replace(out.stats, tokens=out.stats.tokens + 3))

    with pytest.raises(MeasurementError, match="tokens="):
        measured(Lying(change))
    with pytest.raises(MeasurementError, match="prompt tokens"):
        measured(Lying(lambda out: dataclasses.replace(out, token_ids=[*PROMPT, *out.token_ids])))


def test_a_counted_warm_up_is_caught():
    def change(out):
        return dataclasses.replace(out, stats=dataclasses.replace(out.stats, nfe_decode=out.stats.nfe_decode + 7))

    with pytest.raises(MeasurementError, match="warm-up"):
        measured(Lying(change))
    records = measured(tiny_model())
    with pytest.raises(MeasurementError, match="warm-up"):
        summarise([dataclasses.replace(records[0], round=-1), *records])


def test_a_silently_disabled_adapter_is_caught():
    config = tiny_config()
    model = tiny_model(lora=random_lora(config))
    probe_adapter(model)
    assert measured(model, "self_spec")
    with pytest.raises(MeasurementError, match="silently off"):
        probe_adapter(tiny_model(lora=random_lora(config, scale=0.0)))
    without = Lying(lambda out: out)
    without.adapter = object()
    with pytest.raises(MeasurementError, match="adapter acted in none"):
        measured(without, "self_spec")


def test_a_baseline_of_another_dtype_is_caught():
    peers = {"trimode": Own(tiny_model()), "peer": SimpleNamespace(dtype="bfloat16")}
    with pytest.raises(MeasurementError, match="different dtypes"):
        list(measure(peers, [Setting(mode="ar")], ASK, max_new_tokens=2))
    records = measured(tiny_model())
    with pytest.raises(MeasurementError, match="different dtypes"):
        summarise([*records, dataclasses.replace(records[0], label="other", dtype="bfloat16")])


def test_the_built_in_prompts_are_of_five_kinds():
    assert len({p.category for p in read_bench_prompts(limit=5)}) == 5


def test_the_command_writes_its_report_and_goes_on_after_ctrl_c(tmp_path, monkeypatch, capfd):
    model = tiny_model()
    monkeypatch.setitem(vars(trimode), "load", lambda name, **_: model)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": [5, 6, 7]}\n{"prompt": [8, 9], "category": "b"}\n')
    command = ["bench", "tiny", "--prompts", str(file), "--max-new-tokens", "6", "-o", str(tmp_path / "out")]
    whole, calls = model.generate, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(model, "generate", stopped)
    assert run(command) == 130
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (report["partial"], len(report["requests"])) == (True, 3)
    assert run(command) == 2
    assert run([*command, "--resume"]) == 0
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (report["partial"], len(report["requests"])) == (False, 16)
    rows = {row["label"]: row for row in report["results"]}
    assert rows["self_spec"]["agreement_with_ar"]["share_equal"] == 1
    assert rows["ar"]["e2e_tpf"]["total"] == 1
    out = capfd.readouterr().out
    assert max(len(line) for line in out.splitlines() if "self_spec" in line or "tokens" in line) <= 80
    assert "tokens/" in out
    assert "…" not in out


@pytest.mark.parametrize("text", ["", "\n", "{", '{"prompt": ""}', "[]"])
def test_bad_prompt_files_are_one_line_and_exit_2(tmp_path, capfd, text):
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    assert run(["bench", "tiny", "--prompts", str(file)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "line 1" in error or "holds no prompts" in error
