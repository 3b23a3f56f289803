"""The embedded model: equal to transformers on the same file, the same text in every exact mode, whole streams, steady memory."""

import json
from pathlib import Path

import psutil
import pytest
import torch

import trimode
from trimode.checkpoint import open_checkpoint
from trimode.engine.request import Request
from trimode.errors import PromptError

PROMPTS = [
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "List five fruits that are red.",
    "Explain what a prime number is to a child.",
    "Translate into French: The train leaves at nine.",
]
SPEC_BENCH = [
    json.loads(line)["prompt"]
    for line in (Path(__file__).parents[1] / "data" / "prompts.jsonl").read_text().splitlines()
]


@pytest.fixture(scope="module")
def model():
    # one thread: with two, each of a hundred products a token waits for whichever core another process holds
    return trimode.load("smollm2-135m", dtype="float32", threads=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_first_64_greedy_ids_are_those_of_transformers_on_the_same_file(model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = open_checkpoint("smollm2-135m").path
    peer = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for prompt in PROMPTS:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out = peer.generate(**rendered, do_sample=False, max_new_tokens=64, pad_token_id=0)
        expected = out[0, rendered["input_ids"].shape[1] :].tolist()
        assert model.generate(prompt, mode="ar", max_new_tokens=64).token_ids == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_greedy_self_speculation_equals_autoregression_on_20_prompts_of_five_kinds(model, kind):
    expected = model.generate([Request(p) for p in SPEC_BENCH], mode="ar", max_new_tokens=64)
    actual = model.generate(
        [Request(p) for p in SPEC_BENCH], mode="self_spec", self_spec_kind=kind, block_length=4, max_new_tokens=64
    )
    assert [a.token_ids for a in actual] == [e.token_ids for e in expected]


@pytest.mark.parametrize("mode", ["ar", "diffusion", "self_spec"])
def test_streamed_pieces_joined_are_the_whole_text(model, mode):
    whole = model.generate(PROMPTS[0], mode=mode, max_new_tokens=24)
    events = list(model.stream(PROMPTS[0], mode=mode, max_new_tokens=24, canvas=True))
    assert "".join(event.text for event in events) == whole.text
    assert [t for event in events for t in event.token_ids] == whole.token_ids


@pytest.mark.parametrize("mode", ["ar", "self_spec"])
def test_a_stop_string_ends_the_answer_and_no_part_of_it_leaks(model, mode):
    free = model.generate(PROMPTS[2], mode=mode, max_new_tokens=24)
    stop = free.text[9:15]
    shown = ""
    for event in model.stream(PROMPTS[2], mode=mode, max_new_tokens=24, stop=["never in it", stop]):
        shown += event.text
        assert free.text.startswith(shown)
    assert shown == free.text[: free.text.index(stop)]
    assert event.output.finish_reason == "stop"
    assert event.output.text == shown


def test_a_text_scores_higher_than_its_words_in_disorder(model):
    assert model.score("The cat sat on the mat.") > model.score("mat the on. sat cat The")


def test_messages_strings_and_rendered_ids_are_the_same_prompt(model):
    seen = []
    for prompt in (PROMPTS[0], [{"role": "user", "content": PROMPTS[0]}]):
        model.generate(prompt, mode="ar", max_new_tokens=1, observe=lambda g, *_: seen.append(g.prompt))
    model.generate(list(seen[0]), mode="ar", max_new_tokens=1, observe=lambda g, *_: seen.append(g.prompt))
    assert seen[0] == seen[1] == seen[2]
    model.generate(PROMPTS[0], raw=True, mode="ar", max_new_tokens=1, observe=lambda g, *_: seen.append(g.prompt))
    assert len(seen[3]) < len(seen[0])


def test_infilling_returns_the_fixed_text_around_its_spans(model):
    out = model.infill("The capital of {} is Paris, and {} is nice.", span_length=[1, 2])
    assert len(out.spans) == 2
    assert out.text == f"The capital of{out.spans[0]} is Paris, and{out.spans[1]} is nice." or (
        out.text == f"The capital of {out.spans[0]} is Paris, and {out.spans[1]} is nice."
    )


def test_memory_does_not_grow_over_50_generations(model):
    process = psutil.Process()

    def run(count):
        for i in range(count):
            model.generate(PROMPTS[i % 5], mode=("ar", "diffusion", "self_spec")[i % 3], max_new_tokens=4)

    run(15)
    before = process.memory_info().rss
    run(50)
    # the allocator's own play; one key-value cache of these prompts alone is 5 MB, and 50 of them would be 250 MB
    assert process.memory_info().rss - before < 20e6


def test_spans_side_by_side_come_back_each_on_its_own(model):
    filled = model.infill("The capital of France is {}{}, of course.", span_length=[2, 3], threshold=1.0)
    assert len(filled.spans) == 2
    between = model.tokenizer.decode(filled.token_ids).removeprefix("The capital of France is ")
    assert between.startswith(filled.spans[0] + filled.spans[1])


def test_fixed_text_is_never_filled_in_though_it_spells_the_mask(model):
    mask = model.tokenizer.id_to_token(model.config.mask_token_id)
    with pytest.raises(PromptError, match="mask token itself"):
        model.infill(f"One {{}} and {mask} more.")


def test_a_stop_string_that_only_the_end_completes_still_stops(model):
    out = model.generate("Say hello.", mode="ar", max_new_tokens=8)
    for num in range(1, 9):
        cut = model.generate("Say hello.", mode="ar", max_new_tokens=num)
        whole = model.tokenizer.decode(out.token_ids[:num])
        stopped = model.generate("Say hello.", mode="ar", max_new_tokens=num, stop=[whole[-2:]])
        assert cut.text == whole
        assert stopped.finish_reason == "stop"
        assert whole[-2:] not in stopped.text


def test_a_model_that_is_int8_by_default_is_saved_as_the_numbers_that_it_was_loaded_from(tmp_path):
    loaded = trimode.load("smollm2-135m")
    assert loaded.precision == "int8"
    loaded.save(tmp_path / "plain")
    again = trimode.load(tmp_path / "plain")
    assert again.precision == "float32"
    ids = [5, 6, 7, 8]
    expected = trimode.load("smollm2-135m", dtype="float32").logits(ids)
    assert (again.logits(ids) - expected).abs().max() < 2e-3  # sums in another order


def test_a_knob_that_diffusion_alone_has_is_no_matter_for_auto(model):
    knobs = {"max_new_tokens": 16, "editing_threshold": 0.5}
    out = model.generate("Name three colours.", **knobs)
    assert (out.stats.mode, out.stats.choices) == ("diffusion", None)
    assert out.token_ids == model.generate("Name three colours.", mode="diffusion", **knobs).token_ids
