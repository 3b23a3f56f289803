"""Law 7: an adapter merged = unmerged; off = the base bit for bit; drafts differ with it on and off; clean rows never notice it; and a
captured graph draws the same drafts as an eager forward."""

from dataclasses import replace

import pytest
import torch

from tests.worlds import MASK, random_lora, random_tensors, tiny_config, tiny_model
from trimode.model.attention import SelfAttention, Span
from trimode.model.forward import Inputs, TorchForward
from trimode.model.graphs import CudaCapture, Rehearsal
from trimode.model.lora import ADAPTED_PARTS
from trimode.model.transformer import Transformer
from trimode.model.views import BlockOverCausal, Causal

CONFIG = tiny_config()
IDS = [5, 6, 7, 8, MASK, MASK, MASK]


def forward(model, rows, lora, view=None):
    with torch.inference_mode():
        attend = SelfAttention(view or BlockOverCausal(4), 1, len(IDS), "sdpa", "cpu")
        rows = None if rows is None else torch.tensor(rows, dtype=torch.long)
        return model(torch.tensor(IDS), torch.arange(len(IDS)), attend, lora=lora, lora_rows=rows)


def merged(lora):
    """Weights with scale * B A added to every part."""
    config = CONFIG
    K, H, G = config.head_size, config.num_heads, config.num_kv_heads
    tensors = dict(random_tensors(config))
    rows = {
        "query": ("qkv", slice(0, H * K)),
        "key": ("qkv", slice(H * K, (H + G) * K)),
        "value": ("qkv", slice((H + G) * K, None)),
        "output": ("output", slice(None)),
        "gate": ("gate_up", slice(0, config.mlp_width)),
        "up": ("gate_up", slice(config.mlp_width, None)),
        "down": ("down", slice(None)),
    }
    for (layer, part), (A, B) in lora.factors.items():
        name, where = rows[part]
        tensors[f"layers.{layer}.{name}.weight"][where] += lora.scale * B @ A
    model = Transformer(config)
    model.load(tensors.items())
    return model


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("parts", [("output",), ADAPTED_PARTS])
def test_an_adapter_on_all_rows_equals_merged_weights(parts, pack):
    lora = random_lora(CONFIG, parts)
    model = Transformer(CONFIG)
    model.load(random_tensors(CONFIG), pack=pack)
    torch.testing.assert_close(
        forward(model, range(len(IDS)), lora), forward(merged(lora), None, None), atol=2e-5, rtol=1e-4
    )


def test_an_adapter_on_no_rows_is_the_base_bit_for_bit():
    model = Transformer(CONFIG)
    model.load(random_tensors(CONFIG))
    lora = random_lora(CONFIG, ADAPTED_PARTS)
    assert torch.equal(forward(model, [], lora), forward(model, None, None))


def test_causal_rows_before_a_block_are_the_base_bit_for_bit_while_the_block_is_adapted():
    model = Transformer(CONFIG)
    model.load(random_tensors(CONFIG))
    adapted = forward(model, [4, 5, 6], random_lora(CONFIG, ADAPTED_PARTS))
    base = forward(model, None, None)
    assert torch.equal(adapted[:4], base[:4])
    assert not torch.allclose(adapted[4:], base[4:], atol=1e-2)


def test_unpacked_and_packed_weights_agree_and_a_packed_row_does_not_depend_on_its_neighbours():
    plain, packed = Transformer(CONFIG), Transformer(CONFIG)
    plain.load(random_tensors(CONFIG), pack=False)
    packed.load(random_tensors(CONFIG), pack=True)
    torch.testing.assert_close(
        forward(plain, None, None, Causal()), forward(packed, None, None, Causal()), atol=1e-5, rtol=1e-4
    )
    linear = packed.layers[0].gate_up
    x = torch.randn(33, CONFIG.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = linear(x)
        for n in (1, 2, 7, 32):
            assert torch.equal(linear(x[:n]), together[:n])


def test_drafts_differ_with_the_adapter_on_and_off_and_the_answer_does_not():
    lora = random_lora(CONFIG, scale=20.0)
    model = tiny_model(lora=lora)
    ids = [5, 6, 7, 8, MASK, MASK, MASK]
    on = model.logits(ids, view="block", prefix=3, draft_lora=True)
    off = model.logits(ids, view="block", prefix=3)
    assert torch.equal(on[:3], off[:3])
    assert not torch.allclose(on[3:], off[3:], atol=1e-2)
    drafts = {}
    answers = {}
    for use in (True, False):
        canvases = []
        answers[use] = model.generate(
            [5, 6, 7],
            mode="self_spec",
            draft_lora=use,
            max_new_tokens=24,
            observe=lambda g, step, outcome, seen=canvases: (
                seen.append(list(g.canvas)) if step.kind == "draft" else None
            ),
        )
        drafts[use] = canvases
    assert answers[True].token_ids == answers[False].token_ids
    assert drafts[True] != drafts[False]


def test_dense_tensors_are_what_was_loaded_packed_or_not():
    tensors = dict(random_tensors(CONFIG))
    for pack in (False, True):
        model = Transformer(CONFIG)
        model.load(((name, tensor.clone()) for name, tensor in tensors.items()), pack=pack)
        assert {name: True for name, _ in model.dense_tensors()} == dict.fromkeys(tensors, True)
        for name, tensor in model.dense_tensors():
            assert torch.equal(tensor, tensors[name]), name


def test_an_adapted_row_does_not_depend_on_how_many_rows_share_the_product():
    """Else a sampled draft, and with it the answer of a seed, would differ alone and in a batch."""
    lora = random_lora(CONFIG, ADAPTED_PARTS, rank=16)
    random = torch.Generator().manual_seed(0)
    for part in ADAPTED_PARTS:
        A, B = lora.factors[0, part]
        x = torch.randn(300, A.shape[1], generator=random)
        y = torch.randn(300, B.shape[0], generator=random)
        with torch.inference_mode():
            (together,) = lora.add(0, [part], x, [y])
            for n in (1, 3, 7, 48, 299):
                assert torch.equal(lora.add(0, [part], x[:n], [y[:n]])[0], together[:n]), (part, n)


DEVICES = [
    pytest.param("cpu", id="rehearsed"),
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(),
            reason="a graph can only be captured on a CUDA device; on the CPU its stand-in runs",
        ),
    ),
]


@pytest.mark.parametrize("acts_on", ["draft", "masks"])
@pytest.mark.parametrize("device", DEVICES)
def test_draft_logits_are_the_same_eager_and_captured_with_the_adapter_on_and_off(device, acts_on):
    """One graph would serve both if the adapter were not in it: so on, off and on again, replaying each time."""
    known = 3
    adapted = list(range(len(IDS))) if acts_on == "draft" else [i for i, token in enumerate(IDS) if token == MASK]
    embedding = None if acts_on == "draft" else torch.linspace(-1, 1, CONFIG.width)
    lora = replace(random_lora(CONFIG, ADAPTED_PARTS, scale=20.0), mask_embedding=embedding).to(torch.device(device))
    # float32 on a GPU too: the law is about what is computed, not about rounding
    transformer = Transformer(CONFIG)
    transformer.load(((name, tensor.to(device)) for name, tensor in random_tensors(CONFIG)), pack=False)
    capture = CudaCapture(torch.device(device)) if device == "cuda" else Rehearsal()
    eager = TorchForward(transformer, lora=lora, device=device)
    captured = TorchForward(transformer, lora=lora, device=device, capture=capture)

    def draft(forward, cache, adapted):
        def run(tokens, cached, view, adapted):
            span = Span(0, len(tokens), 0, cached, view)
            positions = [cached + i for i in range(len(tokens))]
            inputs = Inputs(tokens=tokens, positions=positions, spans=[span], adapted=adapted, asked=range(len(tokens)))
            return forward(inputs, cache).logits(0, len(tokens)).cpu().clone()

        run(IDS[:known], 0, Causal(), [])
        return run(IDS[known:], known, BlockOverCausal(1), [i - known for i in adapted if i >= known])

    caches = {forward: forward.make_cache([len(IDS)]) for forward in (eager, captured)}
    on, off = (draft(eager, caches[eager], which) for which in (adapted, []))
    assert not torch.allclose(on, off, atol=1e-2)
    if acts_on == "masks":
        assert torch.equal(on[0], off[0])
    for _ in range(4):
        torch.testing.assert_close(draft(captured, caches[captured], adapted), on, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(draft(captured, caches[captured], []), off, atol=1e-4, rtol=1e-4)
    graphs = captured._static_of[caches[captured]].graphs
    assert graphs.refusal is None
    # one without the adapter, which serves the known tokens too, and one with it
    assert len(graphs) == 2
