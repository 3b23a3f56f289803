"""Law 6, the reference's part: every vector in tests/golden is met, alone and all in one batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trimode
from trimode.engine.request import Request
from trimode.model import native

GOLDEN = Path(__file__).parents[1] / "golden" / "nld_tiny"
CASES = json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="module", params=["sdpa", "plain", "native"])
def model(request):
    if request.param == "native":
        if not native.available():
            pytest.skip("the native engine was not built")
        return trimode.load(GOLDEN, backend="native")
    return trimode.load(GOLDEN, attention=request.param)


def knobs_of(case) -> dict:
    options = dict(case["options"])
    knobs = {"mode": case["mode"]}
    if options.pop("eos_token_id", None) == -1:
        knobs["ignore_eos"] = True
    if "threshold" in options and options["threshold"] is None:
        del options["threshold"]
        knobs |= {"unmasking": "fixed", "max_denoising_steps": options["block_length"]}
    if case["mode"] == "self_spec":
        knobs["draft_lora"] = case["draft_lora"]
    return knobs | options


def test_logits_of_both_views_are_the_references(model):
    vectors = load_file(GOLDEN / "logits.safetensors")
    indices = sorted({name.split("/")[1] for name in vectors})
    assert indices
    for i in indices:
        for view, ids, expected in (("causal", "ids", "causal"), ("block", "masked_ids", "bidirectional")):
            logits = model.logits(vectors[f"logits/{i}/{ids}"].flatten().tolist(), view=view)
            torch.testing.assert_close(logits, vectors[f"logits/{i}/{expected}"].squeeze(0), atol=1e-4, rtol=0)


def check(case, out, quadratic=False):
    limit = case["options"]["max_new_tokens"]
    assert out.token_ids == case["output"][:limit]
    stats = out.stats
    # the reference leaves prefill out of diffusion's count and takes it into the others'
    ours = stats.nfe_decode + (stats.nfe_prefill if case["mode"] != "diffusion" else 0)
    if case["mode"] == "ar":
        assert ours == case["nfe"]
    elif case["mode"] == "diffusion":
        # one lower: the last block's commit, whose keys nobody needs, is left out
        assert ours == case["nfe"] - 1 or (ours < case["nfe"] and len(out.token_ids) < limit)
    elif quadratic:
        assert ours <= case["nfe"]
    else:
        # one lower where a single token is left: it is verified without a draft
        assert case["nfe"] - 1 <= ours <= case["nfe"]


def test_every_case_alone_gives_the_references_ids_at_its_cost_or_less(model):
    for case in CASES:
        check(case, model.generate(case["prompt"], **knobs_of(case)))


def test_all_cases_in_one_mixed_batch_give_the_same(model):
    outs = model.generate([Request(case["prompt"], **knobs_of(case)) for case in CASES])
    for case, out in zip(CASES, outs, strict=True):
        check(case, out)


def test_quadratic_self_speculation_gives_the_same_ids_in_as_many_forwards_or_fewer(model):
    for case in CASES:
        if case["mode"] == "self_spec":
            check(case, model.generate(case["prompt"], **knobs_of(case), self_spec_kind="quadratic"), quadratic=True)


def test_the_drafter_adapter_of_the_reference_is_used_only_when_asked(model):
    case = next(c for c in CASES if c["draft_lora"])
    ids = [*case["prompt"], *[model.config.mask_token_id] * 4]
    on = model.logits(ids, view="block", prefix=len(case["prompt"]) - 1, draft_lora=True)
    off = model.logits(ids, view="block", prefix=len(case["prompt"]) - 1)
    assert not torch.allclose(on[-4:], off[-4:], atol=1e-3)
