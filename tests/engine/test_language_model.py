"""The library's face: prompts, counts, streams, scores, and what mistakes get."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import trimode
from tests.worlds import EOS, random_lora, tiny_config, tiny_model
from trimode.decoding.interface import Rows
from trimode.errors import ContextLengthError, MissingMaskTokenError, PromptError, SettingError, TrimodeError

MODEL = tiny_model(1)


def test_a_list_of_prompts_gives_a_list_and_one_prompt_gives_one():
    one = MODEL.generate([5, 6], mode="ar", max_new_tokens=4)
    many = MODEL.generate([[5, 6], [7]], mode="ar", max_new_tokens=4)
    assert isinstance(one, trimode.Generated)
    assert [type(out) for out in many] == [trimode.Generated] * 2
    assert many[0].token_ids == one.token_ids
    assert len(MODEL.generate([[5, 6]], mode="ar", max_new_tokens=4)) == 1


@pytest.mark.parametrize("make", [tuple, torch.tensor], ids=["tuple", "tensor"])
def test_ids_may_come_as_tuples_and_tensors(make):
    assert MODEL.generate(make([5, 6]), mode="ar", max_new_tokens=4).token_ids == (
        MODEL.generate([5, 6], mode="ar", max_new_tokens=4).token_ids
    )


@pytest.mark.parametrize("mode", ["ar", "diffusion", "self_spec"])
def test_the_counts_add_up(mode):
    kinds = []
    out = MODEL.generate(
        [5, 6, 7],
        mode=mode,
        max_new_tokens=17,
        ignore_eos=True,
        observe=lambda g, step, outcome: kinds.append(step.kind),
    )
    stats = out.stats
    assert stats.mode == mode
    assert stats.tokens == len(out.token_ids) == 17
    assert stats.prompt_tokens == 3
    assert stats.nfe_prefill == kinds.count("prefill") == 1
    assert stats.nfe_decode == len(kinds) - 1
    assert stats.decode_tpf == 17 / stats.nfe_decode
    assert stats.e2e_tpf == 17 / (stats.nfe_decode + 1)
    assert (stats.acceptance_length is not None) == (mode == "self_spec")
    assert 0 < stats.first_token_seconds <= stats.seconds
    assert set(stats.as_dict()) >= {
        "mode",
        "tokens",
        "nfe_prefill",
        "nfe_decode",
        "decode_tpf",
        "e2e_tpf",
        "tokens_per_second",
    }


def test_the_token_that_ends_the_text_is_in_the_ids_and_ends_them():
    for seed in range(40):
        out = tiny_model(seed % 4).generate([5, seed % 40], mode="ar", max_new_tokens=40, temperature=1.0, seed=seed)
        if out.finish_reason == "stop":
            assert out.token_ids[-1] == EOS
            assert EOS not in out.token_ids[:-1]
            return
    pytest.fail("no seed ended a text")


@pytest.mark.parametrize("mode", ["ar", "diffusion", "self_spec"])
def test_streamed_ids_joined_are_the_answer_and_the_canvas_is_optional(mode):
    whole = MODEL.generate([5, 6, 7], mode=mode, max_new_tokens=20)
    for canvas in (False, True):
        events = list(MODEL.stream([5, 6, 7], mode=mode, max_new_tokens=20, canvas=canvas))
        assert [t for e in events for t in e.token_ids] == whole.token_ids
        assert events[-1].kind == "finish"
        assert events[-1].output.token_ids == whole.token_ids
        assert ("canvas" in {e.kind for e in events}) == (canvas and mode != "ar")


def test_closing_a_stream_stops_the_work():
    forwards = []
    stream = MODEL.stream([5], mode="ar", max_new_tokens=100, ignore_eos=True, observe=lambda *_: forwards.append(1))
    next(stream)
    stream.close()
    assert len(forwards) == 1


def test_auto_is_self_speculation_where_the_block_view_was_trained_and_autoregression_elsewhere():
    assert MODEL.generate([5], max_new_tokens=4).stats.mode == "self_spec"
    assert tiny_model(1, trained_for_blocks=False).generate([5], max_new_tokens=4).stats.mode == "ar"
    assert tiny_model(1, mask_token_id=None).generate([5], max_new_tokens=4).stats.mode == "ar"


def test_numbers_of_numpy_are_numbers():
    given = {"max_new_tokens": np.int64(4), "temperature": np.float32(0.5), "seed": np.int32(3)}
    plain = {"max_new_tokens": 4, "temperature": 0.5, "seed": 3}
    assert MODEL.generate([5, 6], mode="ar", **given).token_ids == MODEL.generate([5, 6], mode="ar", **plain).token_ids


def test_a_knob_that_one_mode_alone_has_chooses_it():
    for knobs in ({"editing_threshold": 0.5}, {"remasking": "margin"}, {"max_denoising_steps": 2, "threshold": 0.5}):
        out = MODEL.generate([5], max_new_tokens=4, **knobs)
        assert out.stats.mode == "diffusion"
        assert out.token_ids == MODEL.generate([5], mode="diffusion", max_new_tokens=4, **knobs).token_ids
    assert MODEL.generate([5], max_new_tokens=4, self_spec_kind="quadratic").stats.mode == "self_spec"
    assert MODEL.generate([5], max_new_tokens=4, block_length=2).stats.mode == "self_spec"
    with pytest.raises(SettingError, match="no effect in mode"):
        MODEL.generate([5], max_new_tokens=4, editing_threshold=0.5, self_spec_kind="quadratic")


def test_an_untrained_block_view_is_said_in_one_line():
    out = tiny_model(1, trained_for_blocks=False).generate([5], mode="self_spec", max_new_tokens=4)
    assert "\n" not in out.stats.notice
    assert MODEL.generate([5], mode="self_spec", max_new_tokens=4).stats.notice is None


def test_a_score_is_the_sum_of_the_causal_log_probabilities():
    ids = [5, 9, 11, 30, 2, 8]
    logprobs = MODEL.logits(ids).log_softmax(-1)
    expected = sum(float(logprobs[i, token]) for i, token in enumerate(ids[1:]))
    assert math.isclose(MODEL.score(ids), expected, rel_tol=1e-5)


def test_repetition_penalty_and_bias_do_what_they_say():
    plain = MODEL.generate([5], mode="ar", max_new_tokens=30, ignore_eos=True).token_ids
    penalised = MODEL.generate([5], mode="ar", max_new_tokens=30, ignore_eos=True, repetition_penalty=5.0).token_ids
    assert len(set(penalised)) > len(set(plain))
    assert set(MODEL.generate([5], mode="ar", max_new_tokens=5, ignore_eos=True, logit_bias={17: 100.0}).token_ids) == {
        17
    }


def test_the_mask_never_wins_even_if_the_model_wants_it():
    config = tiny_config()
    for mode in ("ar", "diffusion", "self_spec"):
        for temperature in (0.0, 1.5):
            out = MODEL.generate(
                [5],
                mode=mode,
                max_new_tokens=20,
                ignore_eos=True,
                logit_bias={config.mask_token_id: 100.0},
                temperature=temperature,
            )
            assert config.mask_token_id not in out.token_ids


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"blok_length": 4}, "block_length"),
        ({"mode": "diffussion"}, "diffusion"),
        ({"threshold": 1.5, "mode": "diffusion"}, "1.5"),
        ({"threshold": float("nan"), "mode": "diffusion"}, "nan"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -3}, "-3"),
        ({"max_new_tokens": 10**12}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "2.5"),
        ({"max_new_tokens": True}, "True"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "hot"),
        ({"temperature": 1e-40}, "at least"),
        ({"temperature": 10**400}, "temperature"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {5: 1e308}}, "logit_bias"),
        ({"logit_bias": {5.7: 1.0}}, "logit_bias"),
        ({"mode": "self_spec", "self_spec_kind": "quadratic", "block_length": 65}, "64"),
        ({"mode": "self_spec", "self_spec_kind": "quadratic", "threshold": 0.5}, "no effect"),
        ({"mode": "diffusion", "block_length": 600}, "context"),
        ({"top_k": 1}, "no effect at temperature 0"),
        ({"end_think_token_id": 5}, "max_thinking_tokens"),
        ({"top_p": 0.0, "temperature": 1}, "top_p"),
        ({"top_p": 0.5}, "no effect at temperature 0"),
        ({"seed": -1}, "seed"),
        ({"mode": "ar", "block_length": 8}, "no effect in mode 'ar'"),
        ({"mode": "ar", "threshold": 0.5}, "no effect in mode 'ar'"),
        ({"mode": "self_spec", "unmasking": "fixed"}, "no effect in mode 'self_spec'"),
        ({"mode": "diffusion", "self_spec_kind": "linear"}, "no effect in mode 'diffusion'"),
        ({"mode": "diffusion", "unmasking": "fixed", "threshold": 0.5}, "no effect"),
        ({"mode": "diffusion", "max_post_steps": 2}, "editing_threshold"),
        ({"mode": "diffusion", "block_length": 0}, "block_length"),
        ({"mode": "diffusion", "block_length": 10**9}, "block_length"),
        ({"mode": "diffusion", "block_length": 4, "block_size": 4}, "twice"),
        ({"mode": "self_spec", "draft_lora": True}, "no draft adapter"),
        ({"max_thinking_tokens": 5}, "</think>"),
        ({"stop": "x"}, "tokenizer"),
        ({"logit_bias": {400: 1.0}}, "400"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
    ],
)
def test_a_mistaken_knob_gets_one_clear_line(knobs, says):
    with pytest.raises(SettingError) as caught:
        MODEL.generate([5], **knobs)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", PromptError),
        ([], PromptError),
        ([5, 40], PromptError),
        ([5, -1], PromptError),
        ([5, 2.5], PromptError),
        ("text", PromptError),
        ([{"role": "user", "content": "hi"}], PromptError),
        (None, PromptError),
        (5, PromptError),
        ([[5], []], PromptError),
        ([5] * 512, ContextLengthError),
        ([5] * 5000, ContextLengthError),
    ],
)
def test_a_mistaken_prompt_gets_one_clear_line(prompt, error):
    with pytest.raises(error) as caught:
        MODEL.generate(prompt, max_new_tokens=4)
    assert "\n" not in str(caught.value)


def test_an_answer_that_cannot_fit_is_refused_and_the_default_length_is_cut_to_fit():
    with pytest.raises(ContextLengthError, match="Use at most 12"):
        MODEL.generate([5] * 500, mode="ar", max_new_tokens=13)
    assert len(MODEL.generate([5] * 500, mode="ar", ignore_eos=True).token_ids) == 12


@pytest.mark.parametrize("mode", ["diffusion", "self_spec"])
def test_a_checkpoint_without_a_mask_token_says_so(mode):
    model = tiny_model(1, mask_token_id=None)
    with pytest.raises(MissingMaskTokenError):
        model.generate([5], mode=mode)
    with pytest.raises(MissingMaskTokenError):
        model.infill([5, None])


def test_what_a_text_itself_suggests_needs_no_mask_token():
    model = tiny_model(1, mask_token_id=None, weight_scale=0.05)
    kwargs = {"max_new_tokens": 40, "ignore_eos": True}
    out = model.generate([5], mode="self_spec", self_spec_kind="lookup", **kwargs)
    assert out.token_ids == model.generate([5], mode="ar", **kwargs).token_ids
    assert out.stats.notice is None
    assert out.stats.decode_tpf > 1.1


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.infill([5, 6]),
        lambda m: m.infill([5, None], max_new_tokens=4),
        lambda m: m.infill("a {} b"),
        lambda m: m.infill([]),
        lambda m: m.infill(None),
        lambda m: m.infill([5, None], mode="ar"),
        lambda m: m.infill([5, None], block_size=2),
        lambda m: m.logits(5),
        lambda m: m.logits([5] * 600),
        lambda m: m.logits([5, 6], view="block", prefix=1.5),
        lambda m: trimode.load(None),
        lambda m: trimode.load("smollm2-135m", device="meta"),
        lambda m: m.score([5]),
        lambda m: m.logits([5, 6], view="sideways"),
        lambda m: m.logits([5, 6], view="block", prefix=3),
        lambda m: m.logits([5, 6], draft_lora=True, view="block"),
        lambda m: m.stream([[5], [6]]),
        lambda m: trimode.load("smollm2-135m", quantize="int3"),
        lambda m: trimode.load("smollm2-135m", dtype="float31"),
        lambda m: trimode.load("smollm2-135m", threads=0),
        lambda m: trimode.load("smollm2-135m", device="warp"),
        lambda m: trimode.load("smolm2-135m"),
    ],
)
def test_other_mistakes_raise_errors_of_ours(call):
    with pytest.raises(TrimodeError) as caught:
        call(MODEL)
    assert "\n" not in str(caught.value)


def test_a_draft_adapter_that_only_drafts_is_refused_for_diffusion():
    model = tiny_model(1, lora=random_lora(tiny_config()))
    with pytest.raises(SettingError, match="no effect"):
        model.generate([5], mode="diffusion", draft_lora=True)


def test_requests_share_nothing():
    """A generation in one mode leaves nothing behind that changes the next in another."""
    before = [
        MODEL.generate([5, 6], mode=mode, max_new_tokens=12).token_ids for mode in ("ar", "diffusion", "self_spec")
    ]
    MODEL.generate([9] * 30, mode="diffusion", max_new_tokens=30)
    after = [
        MODEL.generate([5, 6], mode=mode, max_new_tokens=12).token_ids for mode in ("ar", "diffusion", "self_spec")
    ]
    assert before == after


def test_top_k_keeps_k_tokens_even_where_they_tie_and_min_p_cuts_at_its_share():
    from trimode.decoding.sampling import truncated_distribution
    from trimode.decoding.settings import Settings

    tied = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    kept = truncated_distribution(tied, Settings(temperature=1.0, top_k=2))
    torch.testing.assert_close(kept, torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64))
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = truncated_distribution(logits, Settings(temperature=1.0, min_p=0.5))
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_batch_takes_the_memory_of_its_requests_not_of_its_longest_one(monkeypatch):
    made = []
    make_cache = MODEL.forward.make_cache

    def watched(lengths):
        cache = make_cache(lengths)
        made.append(cache.num_bytes)
        return cache

    monkeypatch.setattr(MODEL.forward, "make_cache", watched)
    prompts = [[5]] * 7 + [[7] * 400] + [[6, 7]] * 8
    together = MODEL.generate(prompts, mode="ar", max_new_tokens=5)
    alone = [MODEL.generate(prompt, mode="ar", max_new_tokens=5) for prompt in prompts]
    assert made[0] < 1.2 * sum(made[1:])
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    # equal lengths share one kernel call, and take no more than they need
    MODEL.generate([[5, 6]] * 3, mode="ar", max_new_tokens=5)
    assert made[-1] == 3 * made[-2]


def test_a_penalty_does_not_make_a_filled_token_a_repetition_of_itself():
    from trimode.decoding.block_diffusion import Progress, denoise
    from trimode.decoding.reading import read

    model = tiny_model(1)
    mask = model.config.mask_token_id
    settings = {"mode": "diffusion", "repetition_penalty": 50.0, "editing_threshold": 0.0, "max_post_steps": 1}
    g = model.open_answer([5], settings).generation
    g.canvas = [9, 11]
    logits = torch.ones(2, model.config.vocab_size)
    logits[0, 9], logits[1, 11] = 4.0, 4.0
    logits[:, mask] = -9.0
    assert read(denoise(g, Progress(num_masked=2, num_steps=2), Rows(logits))) == 0
    assert g.canvas == [9, 11]
    # a token that stands elsewhere in the block is one
    g.canvas = [9, 9]
    logits[1] = logits[0]
    assert read(denoise(g, Progress(num_masked=2, num_steps=2), Rows(logits))) == 2


def test_one_tensor_in_a_list_is_a_batch_of_one():
    outs = MODEL.generate([torch.tensor([5])], mode="ar", max_new_tokens=2)
    assert isinstance(outs, list)
    assert outs[0].token_ids == MODEL.generate([5], mode="ar", max_new_tokens=2).token_ids


def test_a_mistake_in_a_batch_names_its_prompt():
    with pytest.raises(PromptError, match=r"Prompt 1 of the batch: .*outside the vocabulary"):
        MODEL.generate([[5], [5, 99_999], [6]], mode="ar")


@pytest.mark.parametrize(
    "mistake",
    [
        lambda m: m.generate([5], mode="ar", template=["thinking"]),
        lambda m: m.generate([]),
        lambda m: m.save(None),
        lambda m: m.save("a\0b"),
        lambda m: m.infill("a {} b", span_length=None),
        lambda m: m.score([{"role": "user", "content": "hello"}]),
        lambda m: m.generate([5], max_thinking_tokens=3, end_think_token_id=m.config.mask_token_id),
    ],
)
def test_careless_calls_get_one_line(mistake):
    with pytest.raises(TrimodeError) as caught:
        mistake(MODEL)
    assert "\n" not in str(caught.value)


def test_weights_that_can_never_fit_are_refused_before_any_is_read(monkeypatch):
    from trimode import device
    from trimode.errors import MachineTooSmallError

    golden = Path(__file__).parents[1] / "golden" / "nld_tiny"
    monkeypatch.setattr(device, "memory_bytes", lambda: 4 * 111_936 - 1)
    monkeypatch.setattr("trimode.engine.language_model.Transformer", None)  # nothing is made of them
    with pytest.raises(MachineTooSmallError, match=r"this machine has 0\.0 GB"):
        trimode.load(golden, backend="torch")
    monkeypatch.undo()
    monkeypatch.setattr(device, "memory_bytes", lambda: 4 * 111_936 - 1)
    assert trimode.load(golden, dtype="bfloat16", backend="torch").dtype == torch.bfloat16
    monkeypatch.setattr(device, "memory_bytes", lambda: None)  # a system that does not say
    assert trimode.load(golden, backend="torch").dtype == torch.float32
