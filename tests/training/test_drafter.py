"""The drafter's objective, against the library's own forwards and formulas written out."""

import pytest
import torch

from tests.worlds import random_transformer, tiny_config
from trimode.diffusion.corruption import SampleNoise
from trimode.engine.language_model import LanguageModel
from trimode.training.data import Document, pack
from trimode.training.drafter import DrafterSettings, accepted_drafts, draft_and_verify, draft_loss, train_drafter
from trimode.training.trainable import AdapterParameters, TrainableModel

B = 4


def make_model(seed=3):
    transformer = random_transformer(tiny_config(), seed, pack=False)
    adapter = AdapterParameters(transformer, rank=4, alpha=16.0, parts=("output",), mask_embedding=False)
    torch.manual_seed(0)
    for B_ in adapter.B.values():
        torch.nn.init.normal_(B_, std=0.3)
    return TrainableModel(transformer, adapter)


def documents(num=3):
    generator = torch.Generator().manual_seed(1)
    return [Document(tuple(torch.randint(4, 40, (9 + i,), generator=generator).tolist()), 3) for i in range(num)]


@pytest.mark.parametrize("sampled", [0.0, 1.0])
def test_a_round_is_what_the_decoder_would_draft_and_verify(sampled):
    model = make_model()
    texts = documents()
    batch = pack(texts, [0, 1, 2])
    found = draft_and_verify(model, batch, SampleNoise(0), block_length=B, blocks_per_document=99, sampled=sampled)
    library = LanguageModel("tiny", model.transformer, adapter=model.adapter.lora())
    mask = model.config.mask_token_id
    row = 0
    for document in texts:
        ids = list(document.ids)
        for place in range(document.num_prompt, len(ids)):
            block = [ids[place], *[mask] * (B - 1)]
            drafted = library.logits(ids[:place] + block, view="block", prefix=place, draft_lora=True)[place + 1 :]
            verified = library.logits(ids[: place + 1] + found.drafts[row].tolist())[place:-1]
            keep = torch.arange(40) != mask
            torch.testing.assert_close(found.drafted[row][:, keep], drafted[:, keep], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.verified[row][:, keep], verified[:, keep], atol=1e-4, rtol=1e-4)
            if sampled == 0.0:
                assert found.drafts[row].tolist() == drafted.masked_fill(~keep, -1e9).argmax(-1).tolist()
            row += 1
    assert row == len(found.drafts)
    assert not (found.drafts == mask).any()


def test_the_loss_over_the_whole_vocabulary_is_the_formula():
    drafted, verified = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9)
    settings = DrafterSettings(temperature=3.0, top=9, sharpness=0.5)
    p, q = (verified / 3).softmax(-1), (drafted / 3).softmax(-1)
    overlap = torch.minimum(verified.softmax(-1), drafted.softmax(-1)).sum(-1).detach()
    w = torch.exp(-0.5 * overlap)
    entropy = -drafted.log_softmax(-1).gather(-1, verified.argmax(-1)[:, None])[:, 0]
    expected = entropy + w * (p * (p / q).log()).sum(-1) + (1 - w) * 0.5 * (p - q).abs().sum(-1)
    got = draft_loss(drafted, verified, settings)
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(x.sum(), drafted, retain_graph=True)[0] for x in (got, expected))
    torch.testing.assert_close(ours, theirs)


def test_the_support_is_the_union_of_both_tops_each_token_once():
    drafted, verified = torch.tensor([[5.0, 4.0, 0.0, 1.0]]), torch.tensor([[5.0, 0.0, 4.0, 1.0]])
    settings = DrafterSettings(temperature=1.0, top=2, sharpness=0.0)  # KL alone
    p, q = verified[:, :3].softmax(-1), drafted[:, :3].softmax(-1)
    expected = torch.nn.functional.cross_entropy(drafted, torch.tensor([0])) + (p * (p / q).log()).sum()
    torch.testing.assert_close(draft_loss(drafted, verified, settings)[0], expected)


def test_training_makes_the_causal_view_accept_more_and_leaves_it_alone():
    model = make_model(5)
    for B_ in model.adapter.B.values():
        torch.nn.init.zeros_(B_)
    library = LanguageModel("tiny", model.transformer)
    outs = library.generate([[5 + i, 6, 7] for i in range(6)], mode="ar", max_new_tokens=24, ignore_eos=True)
    texts = [Document((5 + i, 6, 7, *out.token_ids), 3) for i, out in enumerate(outs)]
    batch = pack(texts, range(len(texts)))
    before = accepted_drafts(model, batch, block_length=B)["matched"]
    weights = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=3e-2, weight_decay=0.0)
    objective = train_drafter(DrafterSettings(top=40), B)
    for step in range(60):
        loss = objective(model, batch, SampleNoise(step))
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = accepted_drafts(model, batch, block_length=B)["matched"]
    assert after > before + 0.3
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(value, weights[name])
