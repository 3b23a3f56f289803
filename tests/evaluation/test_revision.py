"""Planted errors and what the decoder's revision makes of them."""

import pytest
import torch

from tests.worlds import random_transformer, tiny_config
from trimode.diffusion.corruption import SampleNoise, plant_errors
from trimode.engine.language_model import LanguageModel
from trimode.errors import DataError
from trimode.evaluation.revision import measure_revision

B = 4


def make_model(**changes) -> LanguageModel:
    return LanguageModel("tiny", random_transformer(tiny_config(**changes), 3))


def texts_of(model: LanguageModel) -> list[tuple[list[int], int]]:
    prompts = [[5, 6, 7], [9, 10], [20, 21, 22, 23]]
    outs = model.generate(prompts, mode="ar", max_new_tokens=10, ignore_eos=True)
    return [([*prompt, *out.token_ids], len(prompt)) for prompt, out in zip(prompts, outs, strict=True)]


EXACT = {"known_tokens_are_causal": True, "block_predicts": "next", "adapter_acts_on": "masks"}


@pytest.mark.parametrize("changes", [{}, EXACT], ids=["anchored", "exact"])
def test_without_confidence_nothing_is_repaired_and_nothing_harmed(changes):
    model = make_model(**changes)
    found = measure_revision(model, texts_of(model), threshold=1.0, passes=1, block_length=B, error_ratio=0.5)
    assert found.planted + found.right == 3 * 2 * B
    assert found.planted > 3
    assert found.repaired == found.harmed == 0


def test_with_any_confidence_each_pass_mends_the_leftmost_error_and_harms_nothing():
    """The texts are the model's own greedy answers, so up to the leftmost error the causal view says just what is right."""
    model = make_model(**EXACT)
    texts = texts_of(model)
    errors = []
    for ids, start in texts:
        for place in range(start, len(ids) - B + 1, B):
            right = torch.tensor(ids[place : place + B])
            may = torch.ones(B, dtype=torch.bool)
            mask = model.config.mask_token_id
            _, hit = plant_errors(right, may, 0.5, model.config.vocab_size, mask, SampleNoise(0).of(len(errors)))
            errors.append(int(hit.sum()))
    assert max(errors) > 1
    for passes in (1, 2, B):
        found = measure_revision(model, texts, threshold=0.0, passes=passes, block_length=B, error_ratio=0.5)
        assert found.planted == sum(errors)
        assert found.repaired == sum(min(number, passes) for number in errors)
        assert found.harmed == 0


def test_a_text_without_a_whole_block_is_refused():
    with pytest.raises(DataError, match="No text has an answer of 4 tokens"):
        measure_revision(make_model(), [([1, 2, 3, 4], 2)], threshold=0.5, passes=1, block_length=B)
