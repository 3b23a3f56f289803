"""The speed of light equals brute force on blocks of length 6, whose forwards are `model.logits` one state at a time."""

from functools import cache

import pytest

from tests.evaluation.block_view import KINDS, block_row, kind_of_model
from tests.worlds import MASK
from trimode.errors import SettingError
from trimode.evaluation.speed_of_light import (
    _draft_runs,
    _fewest_forwards,
    _reader,
    as_record,
    diffusion_light,
    ratio,
    speculation_light,
    summarise_light,
)

PROMPT = [5, 6, 7]
LENGTH = 6


def shown(model, final, canvas):
    """(confidence, place, token) of each masked place."""
    found = []
    for place, token in enumerate(canvas):
        if token == MASK:
            row = block_row(model, final, canvas, place)
            probabilities = row.softmax(-1)
            row = row.clone()
            row[MASK] = float("-inf")
            best = int(row.argmax())
            found.append((float(probabilities[best]), place, best))
    return found


def serial_target(model, final, num_places):
    canvas = [MASK] * num_places
    while MASK in canvas:
        _, place, token = max(shown(model, final, canvas), key=lambda f: (f[0], -f[1]))
        canvas[place] = token
    return canvas


def brute_force(model, final, target):
    """Fewest forwards over every choice of every subset of right places."""

    @cache
    def least(known):
        if len(known) == len(target):
            return 0
        canvas = [t if i in known else MASK for i, t in enumerate(target)]
        right = [place for _, place, token in shown(model, final, canvas) if token == target[place]]
        subsets = [frozenset(p for i, p in enumerate(right) if c >> i & 1) for c in range(1, 1 << len(right))]
        return 1 + min((least(known | s) for s in subsets), default=99)

    return least(frozenset())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_ideal_sampler_equals_brute_force_on_blocks_of_length_six(kind, seed):
    model = kind_of_model(kind, seed, eos_token_ids=())
    lights = list(diffusion_light(model, PROMPT, max_new_tokens=12, budget=200, knobs={"block_length": LENGTH}))
    assert len(lights) == 2
    text = list(PROMPT)
    exact = model.config.known_tokens_are_causal and model.config.block_predicts == "next"
    for light in lights:
        if not exact:
            text += model.generate(text, mode="ar", max_new_tokens=1).token_ids
        target = serial_target(model, text, LENGTH - (not exact))
        assert light.ideal_at_least == light.ideal_passes == brute_force(model, text, target)
        assert (light.tokens, light.serial_passes) == (LENGTH, len(target))
        real = model.generate(text, mode="diffusion", block_length=LENGTH, max_new_tokens=len(target)).token_ids
        if exact:
            assert light.is_real_target == (real == target)
        text += target


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_policy_is_the_decoders_own(kind):
    model = kind_of_model(kind, eos_token_ids=())
    knobs = {"block_length": LENGTH, "threshold": 0.1}
    light = next(diffusion_light(model, PROMPT, max_new_tokens=6, budget=8, knobs=knobs))
    stats = model.generate(PROMPT, mode="diffusion", max_new_tokens=6, **knobs).stats
    # its first forward reads the prompt: alone for the anchor, or together with the first denoising
    assert light.real_passes + light.commits == stats.nfe_prefill + stats.nfe_decode
    assert light.real_tokens == 6
    careful = next(diffusion_light(model, PROMPT, max_new_tokens=6, budget=8, knobs={**knobs, "threshold": 1.0}))
    assert light.real_passes < careful.real_passes


def test_a_text_that_ends_is_counted_up_to_its_end():
    model = kind_of_model("gated adapter", eos_token_ids=())
    first = next(diffusion_light(model, PROMPT, max_new_tokens=6, budget=100, knobs={"block_length": LENGTH}))
    target = serial_target(model, PROMPT, LENGTH)
    place = next(i for i, t in enumerate(target) if i and t not in target[:i])
    ending = kind_of_model("gated adapter", eos_token_ids=(target[place],))
    lights = list(diffusion_light(ending, PROMPT, max_new_tokens=18, budget=100, knobs={"block_length": LENGTH}))
    assert len(lights) == 1
    assert lights[0].tokens == place + 1
    assert lights[0].ideal_passes <= first.ideal_passes


@pytest.mark.parametrize("kind", KINDS)
def test_one_forward_a_draft_without_an_oracle_is_the_decoder_itself(kind):
    model = kind_of_model(kind, eos_token_ids=())
    knobs = {"block_length": 4}
    num = 14
    answer = model.generate(PROMPT, mode="ar", max_new_tokens=num).token_ids
    stats = model.generate(PROMPT, mode="self_spec", max_new_tokens=num, **knobs).stats
    reader = _reader(model, len(PROMPT) + num, {"mode": "self_spec", **knobs}, 8)
    list(reader.read(PROMPT + answer, last_only=True))
    exact = reader.traits.first_is_exact
    place, forwards = (0, 0) if exact else (1, 1)
    while place < num:
        if num - place == 1:  # a single token is not worth a draft
            forwards, place = forwards + 1, num
            continue
        runs, _, _ = _draft_runs(reader, len(PROMPT) + place, answer[place:], 1)
        place, forwards = min(place + runs[0] + 1, num), forwards + 2
    assert forwards == stats.nfe_prefill + stats.nfe_decode
    light = speculation_light(model, PROMPT, max_new_tokens=num, budget=100, knobs=knobs)
    assert light.real_forwards == forwards
    assert light.ideal_forwards <= light.one_pass_forwards <= forwards
    assert (light.tokens, light.is_proven) == (num, True)


def test_the_shortest_way_through_an_answer_weighs_drafts_against_what_they_lead_on():
    always = {n: [4] for n in range(20)}
    assert _fewest_forwards(always, 0, 20, most_passes=1) == 8
    never = {n: [0] for n in range(20)}
    assert _fewest_forwards(never, 0, 20, most_passes=1) == 20
    second_pass_pays = {n: [1, 5] for n in range(12)}
    assert _fewest_forwards(second_pass_pays, 0, 12, most_passes=2) == 6
    assert _fewest_forwards(second_pass_pays, 0, 12, most_passes=1) == 12


def test_ratios_take_the_prompt_as_the_unit_of_chance():
    one = ratio([{"prompt": 0, "a": 6, "b": 2}, {"prompt": 0, "a": 3, "b": 1}], "a", "b")
    assert one == {"value": 3.0, "standard_error": None}
    records = [{"prompt": i, "a": a, "b": 2, "c": 1} for i, a in enumerate([3, 6, 9])]
    two = ratio(records, "a", "b", "c")
    assert two["value"] == 2.0
    # equal denominators: the standard error of a mean of 1, 2, 3
    assert two["standard_error"] == pytest.approx(1 / 3**0.5)


def test_rows_come_by_block_length_and_category():
    model = kind_of_model("gated adapter", eos_token_ids=())
    blocks, answers = [], []
    for prompt, category in ((0, "a"), (1, "b")):
        for length in (2, 4):
            about = {"prompt": prompt, "category": category, "block_length": length}
            ids, knobs = [5, 6, 7 + prompt], {"block_length": length}
            blocks += [
                as_record(b) | about for b in diffusion_light(model, ids, max_new_tokens=8, budget=50, knobs=knobs)
            ]
            answers.append(as_record(speculation_light(model, ids, max_new_tokens=8, budget=50, knobs=knobs)) | about)
    rows = summarise_light(blocks, answers)
    assert [(r["block_length"], r["category"]) for r in rows] == [(n, c) for n in (2, 4) for c in ("all", "a", "b")]
    for row in rows:
        assert row["diffusion"]["ideal_per_pass"]["value"] >= 1
        assert row["self_spec"]["ideal_per_forward"]["value"] >= row["self_spec"]["real_per_forward"]["value"]


def test_sampling_and_empty_budgets_are_refused():
    model = kind_of_model("its own place")
    with pytest.raises(SettingError, match="greedy"):
        list(diffusion_light(model, PROMPT, max_new_tokens=4, budget=5, knobs={"temperature": 0.5}))
    with pytest.raises(SettingError, match="budget"):
        speculation_light(model, PROMPT, max_new_tokens=4, budget=0, knobs={})
