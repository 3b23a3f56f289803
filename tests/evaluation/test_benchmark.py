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
from trimode.decoding.self_speculation import LinearSelfSpeculation, QuadraticSelfSpeculation
from trimode.decoding.settings import Settings
from trimode.errors import MeasurementError
from trimode.evaluation.benchmark import Own, Setting, compare, measure, probe_adapter, summarise
from trimode.evaluation.metrics import Watch
from trimode.evaluation.prompts import BenchPrompt, read_bench_prompts

MASK, VOCAB = 3, 16
PROMPT = (5, 6, 7)
ASK = [BenchPrompt(prompt=PROMPT)]


def truth(position):
    return 4 + position % 10


def watched(decoder, wrong=(), eos=(), *, errs_once=False, **settings):
    """A model that knows the text; as a drafter it errs at the positions `wrong`, always or in its first draft only."""
    wrong = set(wrong)

    def rows(tokens):
        return Rows(torch.nn.functional.one_hot(torch.tensor(tokens, dtype=torch.long), VOCAB).float() * 50)

    def answer(generations, steps):
        predictions = []
        for g, s in zip(generations, steps, strict=True):
            places = [g.cached + offset for offset in s.view.offsets(len(s.tokens))]
            at = [truth(places[i]) + (places[i] in wrong) for i in s.at]
            predictions.append(Predictions(after=rows([truth(places[i] + 1) for i in s.after]), at=rows(at)))
            if errs_once and s.at:
                wrong.clear()
        return predictions

    g = Generation(
        prompt=PROMPT,
        settings=Settings(**settings),
        traits=Traits(mask_token_id=MASK, eos_token_ids=frozenset(eos), block_length=4),
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


def test_a_quadratic_round_is_one_forward_and_its_prefill_drafts_too():
    # prefill: 1 token and a draft of 3. Two rounds: 3 accepted and a bonus each.
    w = watched(QuadraticSelfSpeculation(), max_new_tokens=9)
    assert (w.tokens, w.nfe_prefill, w.nfe_decode) == (9, 1, 2)
    assert (w.rounds, w.round_tokens, w.accepted) == (2, 8, [3, 3])


@pytest.mark.parametrize(
    ("decoder", "counts"),
    [
        (Autoregressive(), (1, 2, 0, 0, [])),
        # the draft is 4, 5, 6; the text ends with 5: the rest of it is neither accepted nor output
        (LinearSelfSpeculation(), (1, 2, 1, 2, [2])),
        (QuadraticSelfSpeculation(), (1, 1, 1, 2, [2])),
        (BlockDiffusion(), (1, 1, 0, 0, [])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_lies_behind_an_early_end_is_not_counted(decoder, counts):
    w = watched(decoder, eos={truth(5)}, max_new_tokens=9)
    assert w.tokens == 3
    assert (w.nfe_prefill, w.nfe_decode, w.rounds, w.round_tokens, w.accepted) == counts


def test_a_revision_is_counted_once_and_its_forward_too():
    # anchor by the prefill; a denoising step that errs at 5; a revising step that mends it
    w = watched(BlockDiffusion(), wrong={5}, errs_once=True, max_new_tokens=4, editing_threshold=0.9, max_post_steps=1)
    assert (w.tokens, w.nfe_prefill, w.nfe_decode, w.revised) == (4, 1, 2, 1)


def test_watching_costs_less_than_two_percent():
    settings = [Setting(mode=mode) for mode in ("ar", "diffusion", "self_spec")]
    records = list(measure({"trimode": Own(tiny_model())}, settings, ASK, max_new_tokens=40, rounds=2))
    for row in summarise(records):
        assert row["watching_share"] < 0.02
        assert not row["watching_too_dear"]


def with_seconds(records, *seconds):
    return [dataclasses.replace(r, seconds=s) for r, s in zip(records, seconds, strict=True)]


def test_a_second_run_lands_within_the_spread_or_the_machine_is_called_noisy():
    ask = [BenchPrompt(prompt=(5 + i, 6)) for i in range(3)]
    ar = [Setting(mode="ar")]
    records = list(measure({"trimode": Own(tiny_model())}, ar, ask, max_new_tokens=4, rounds=2))
    quiet = summarise(with_seconds(records, 1.0, 1.1, 1.2, 1.02, 1.08, 1.21))
    assert not quiet[0]["noise"]["too_noisy"]
    again = summarise(with_seconds(records, 1.05, 1.1, 1.15, 1.0, 1.1, 1.2))
    assert [one["within"] for one in compare(again, quiet)] == [True]
    # every repetition a fifth slower: no request doubled its time, and still no second run would repeat the first
    drifting = summarise(with_seconds(records, 1.0, 1.01, 1.02, 1.2, 1.21, 1.22))
    assert drifting[0]["noise"]["too_noisy"]
    slower = summarise(with_seconds(records, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0))
    assert [one["within"] for one in compare(slower, quiet)] == [False]


class Lying:
    """A model whose answers are changed on the way."""

    def __init__(self, change, model=None):
        self.inner, self.change = model or tiny_model(), change
        self.precision, self.adapter, self.config = "float32", self.inner.adapter, self.inner.config

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
        list(measure(peers, [Setting(mode="ar"), Setting(mode="ar", engine="peer")], ASK, max_new_tokens=2))
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


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command on a tiny model and two prompts; its report."""
    model = tiny_model()
    monkeypatch.setitem(vars(trimode), "load", lambda name, **_: model)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": [5, 6, 7]}\n{"prompt": [8, 9], "category": "b"}\n')

    def bench(*more, status=0):
        folder = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        small = ["--prompts", str(file), "--max-new-tokens", "6", "-o", str(folder)]
        assert run(["bench", "tiny", *small, *more]) == status
        return folder, json.loads((folder / "bench.json").read_text())

    return bench


def test_a_sweep_measures_every_combination_and_the_report_says_everything(tiny, capfd):
    folder, report = tiny("--modes", "diffusion:threshold=0.2|0.9:block_length=2|4,self_spec")
    labels = {row["label"] for row in report["results"]}
    assert labels == {"ar", "self_spec"} | {
        f"diffusion:threshold={t}:block_length={n}" for t in (0.2, 0.9) for n in (2, 4)
    }
    for row in report["results"]:
        assert row.keys() >= {
            *("engine", "mode", "settings", "tokens_per_second", "decode_tpf", "e2e_tpf", "acceptance_length"),
            "agreement_with_ar",
        }
        for name in ("tokens_per_second", "decode_tpf", "e2e_tpf"):
            assert row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert sum(row["accepted_histogram"].values()) == sum(
            len(r["accepted"]) for r in report["requests"] if r["label"] == row["label"]
        )
    assert report.keys() >= {"requests", "hardware", "versions", "seed", "dtype", "quantize", "partial"}
    assert all(r["settings"]["max_new_tokens"] == 6 for r in report["requests"])
    assert report["forward_cost"]["times_one"][0] == 1
    for name in ("tokens_per_second.png", "acceptance_by_position.png", "forward_cost.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_load_shares_forwards_and_every_answer_is_that_of_the_request_alone(tiny):
    folder, report = tiny("--modes", "ar,self_spec", "--load", "1,3", "--rounds", "1")
    rows = {(row["label"], row["concurrency"]): row for row in report["load"]}
    assert set(rows) == {(mode, num) for mode in ("ar", "self_spec") for num in (1, 3)}
    assert all(row["equal_to_alone"] == 1 for row in rows.values())
    assert [rows["ar", num]["requests"] for num in (1, 3)] == [2, 6]
    assert rows["ar", 1]["tokens_per_forward"] <= 1 < rows["ar", 3]["tokens_per_forward"] <= 3
    assert (folder / "load.png").is_file()


def test_a_trace_holds_the_measured_requests_and_no_warm_up(tiny, tmp_path):
    _, report = tiny("--modes", "ar,diffusion", "--rounds", "1", "--trace", str(tmp_path / "t.jsonl"))
    records = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    for request in report["requests"]:
        mine = [r for r in records if r["request"] == request["trace_request"]]
        assert [token for r in mine for _, token, _ in r["committed"]] == request["token_ids"]
    assert {r["request"] for r in records} == {r["trace_request"] for r in report["requests"]}


def test_an_earlier_report_can_be_compared_with(tiny, capfd):
    folder, _ = tiny("--modes", "ar")
    capfd.readouterr()
    tiny("--modes", "ar", "--compare", str(folder / "bench.json"))
    assert "of the earlier run" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--peer", "vllm"],
        ["--peer", "llama.cpp:float32"],
        ["--peer", "transformers:int4"],
        ["--load", "0"],
        ["--load", "x"],
        ["--load", ","],
        ["--modes", ","],
        ["--modes", "ar,ar"],
        ["--modes", "diffusion:threshold=0.5:threshold=0.6"],
        ["--modes", "diffusion:max_new_tokens=3"],
        ["--modes", "self_spec:self_spec_kind=quadratic:threshold=0.5"],
        ["--compare", "missing.json"],
        ["--rounds", "0"],
        ["--limit", "none"],
        ["--prompts", "missing.jsonl"],
        ["--resume"],
    ],
    ids=" ".join,
)
def test_careless_commands_are_one_line_and_exit_2(words, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(vars(trimode), "load", lambda name, **_: tiny_model())
    assert run(["bench", "tiny", "-o", str(tmp_path / "out"), *words]) == 2
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "\n", "{", '{"prompt": ""}', "[]"])
def test_bad_prompt_files_are_one_line_and_exit_2(tmp_path, capfd, text):
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    assert run(["bench", "tiny", "--prompts", str(file)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "line 1" in error or "holds no prompts" in error
