"""The training path of an adapter, and the weights that follow what a draft reaches, against the formulas written out."""

import torch

from tests.worlds import random_transformer, tiny_config
from trimode.diffusion.corruption import SampleNoise
from trimode.model.lora import Lora
from trimode.training.data import Document, pack
from trimode.training.objectives import ConversionSettings, convert_adapter
from trimode.training.trainable import AdapterParameters, TrainableModel


def test_the_product_and_its_gradients_are_those_of_the_sum_written_out():
    def numbers(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=random, requires_grad=True)

    random = torch.Generator().manual_seed(0)
    x, weight, bias = numbers(7, 6), numbers(9, 6).detach(), numbers(9).detach()
    factors = {(0, "gate"): (numbers(3, 6), numbers(5, 3)), (0, "up"): (numbers(3, 6), numbers(4, 3))}
    leaves = [x, *(factor for pair in factors.values() for factor in pair)]
    for rows in (torch.arange(7), torch.tensor([0, 2, 5])):
        acts = torch.zeros(7, 1, dtype=torch.float64).index_fill_(0, rows, 1)
        y = Lora(factors, 0.5).product(0, ("gate", "up"), x, weight, bias, acts if len(rows) < 7 else None)
        added = torch.cat([x @ A.T @ B.T for A, B in factors.values()], dim=1)
        expected = x @ weight.T + bias + 0.5 * acts * added
        torch.testing.assert_close(y, expected)
        others = acts[:, 0] == 0
        assert torch.equal(y[others], torch.nn.functional.linear(x, weight, bias)[others])
        upstream = torch.randn(7, 9, dtype=torch.float64, generator=random)
        for got, want in zip(
            torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
        ):
            torch.testing.assert_close(got, want)


def test_a_place_earns_its_weight_by_the_chance_that_the_draft_gets_there():
    transformer = random_transformer(tiny_config(adapter_acts_on="masks", known_tokens_are_causal=True), 3, pack=False)
    model = TrainableModel(transformer, AdapterParameters(transformer, rank=2, alpha=2.0))
    document = Document((5, 6, 7, 8, 9, 10, 11, 12), 2)

    def loss(reach):
        settings = ConversionSettings(
            block_lengths=(4,), blocks_per_document=99, partial=0.0, decay=1e9, distill=0.0, reach=reach
        )
        return convert_adapter(settings)(model, pack([document], [0]), SampleNoise(0))

    # the same blocks, one forward each: anchors from the last given token to the third from the end
    total = count = plain = 0.0
    mask = model.config.mask_token_id
    ids = list(document.ids)
    from trimode.engine.language_model import LanguageModel

    library = LanguageModel("tiny", transformer, adapter=model.adapter.lora())
    for anchor in range(document.num_prompt - 1, len(ids) - 2):
        logits = library.logits(
            [*ids[: anchor + 1], mask, mask, mask], view="block", prefix=anchor + 1, draft_lora=True
        )
        reached = 1.0
        for j in range(1, 4):
            if anchor + j + 1 >= len(ids):
                break
            logprob = float(logits[anchor + j].log_softmax(-1)[ids[anchor + j + 1]])
            total, count, plain = total - reached * logprob, count + reached, plain - logprob
            reached *= torch.tensor(logprob).exp().item()
    torch.testing.assert_close(loss(1.0).total.item(), total, rtol=1e-4, atol=1e-4)
    assert abs(loss(1.0).count - count) < 1e-4 * count
    torch.testing.assert_close(loss(0.0).total.item(), plain, rtol=1e-4, atol=1e-4)
