"""int8 weights of the PyTorch engine, as a GPU holds them: a scale for each output, widened for the product."""

import torch

from tests.model.test_static import forward, inputs_of, on_a_pretended_gpu
from tests.worlds import random_tensors, tiny_config
from trimode.engine import language_model
from trimode.engine.language_model import LanguageModel
from trimode.model.forward import TorchForward
from trimode.model.graphs import Rehearsal
from trimode.model.linear import Linear
from trimode.model.static import StaticShape
from trimode.model.transformer import Transformer
from trimode.model.views import BlockOverCausal

CONFIG = tiny_config(qkv_bias=True)


def quantized(dtype=torch.float32):
    transformer = Transformer(CONFIG)
    tensors = ((name, tensor.to(dtype)) for name, tensor in random_tensors(CONFIG))
    transformer.load(tensors, quantize=True, pack=False)
    return transformer.eval()


def test_a_weight_is_off_by_half_a_step_of_its_output_at_most():
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 16, generator=random) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0.0
    linear = Linear(16, 7)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    linear.quantize()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((linear.dense_weight() - weight).abs() <= step * 0.5001).all())
    x = torch.randn(3, 16, generator=random)
    torch.testing.assert_close(linear(x), x @ linear.dense_weight().T)


def test_forwards_are_those_of_the_numbers_that_int8_stands_for():
    rounded = quantized()
    plain = Transformer(CONFIG)
    plain.load(rounded.dense_tensors(), pack=False)
    inputs = inputs_of([(0, 6, BlockOverCausal(2))])
    found, expected = (
        engine(inputs, engine.make_cache([6])).logits(0, 6)
        for engine in (TorchForward(rounded, capture=Rehearsal()), TorchForward(plain))
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    exact = TorchForward(forward(config=CONFIG).transformer)
    assert not torch.allclose(found, exact(inputs, exact.make_cache([6])).logits(0, 6), atol=1e-3)


def test_all_linear_maps_but_the_head_are_held_in_int8():
    transformer = quantized()
    maps = {name: m for name, m in transformer.named_modules() if isinstance(m, Linear)}
    assert {name for name, m in maps.items() if m.weight is not None} == {"head"}
    assert len(maps) == 4 * CONFIG.num_layers + 1


def test_an_int8_forward_stays_on_the_gpu(monkeypatch):
    def quantize_all(self, *args, **kwargs):
        make(self, *args, **kwargs)
        for layer in self.layers:
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
                linear._int8 = linear.weight.detach().to(torch.int8), linear.weight.detach()[:, 0].clone()
                linear.weight, linear._product = None, linear._int8_product

    make = Transformer.__init__
    monkeypatch.setattr(Transformer, "__init__", quantize_all)
    ops = on_a_pretended_gpu(StaticShape(num_rows=1, length=4, num_keys=256, num_asked=4))
    assert ops.devices == {"cuda"}


def test_a_loaded_model_says_int8_and_saves_the_numbers_that_it_came_from(tmp_path):
    LanguageModel("tiny", forward(captured=False).transformer).save(tmp_path / "tiny")
    checkpoint = language_model.open_checkpoint(tmp_path / "tiny")
    engine = language_model._torch_forward(checkpoint, torch.device("cpu"), torch.float32, None, None, int8=True)
    model = LanguageModel("tiny", engine, checkpoint=checkpoint)
    assert model.precision == "int8"
    assert len(model.generate([5, 6, 7], mode="self_spec", max_new_tokens=8).token_ids) == 8
    model.save(tmp_path / "again")
    again = language_model.open_checkpoint(tmp_path / "again")
    for (name, tensor), (_, other) in zip(
        checkpoint.tensors(dtype=torch.float32), again.tensors(dtype=torch.float32), strict=True
    ):
        assert torch.equal(tensor, other), name
