"""Damaged and strange files end in CheckpointError with one line, and in nothing else."""

import json
import pickle
import random
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.families import SIZES
from trimode.checkpoint import open_checkpoint
from trimode.checkpoint.gguf_files import read_gguf
from trimode.checkpoint.names import layout
from trimode.checkpoint.safetensors_files import read_directory, read_header
from trimode.errors import CheckpointError, UnsupportedModelError


def message(call, *arguments) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def is_refused(call, path) -> bool:
    """A flipped letter of a name may leave a sound file; any exception but CheckpointError is a failure."""
    try:
        call(path)
    except CheckpointError as error:
        told = str(error)
    else:
        return False
    assert "\n" not in told
    return True


def write_safetensors(path, header, body=b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


@pytest.fixture
def safetensors_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.bfloat16)}, path)
    return path


def test_safetensors_cut_anywhere_are_refused_by_name(safetensors_file):
    whole = safetensors_file.read_bytes()
    for length in range(len(whole)):
        safetensors_file.write_bytes(whole[:length])
        assert str(safetensors_file) in message(read_header, safetensors_file)
    safetensors_file.write_bytes(whole + b"\0")
    assert "no tensor owns" in message(read_header, safetensors_file)


def test_flipped_bytes_in_a_safetensors_header_are_refused_or_harmless(safetensors_file):
    whole = safetensors_file.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for position in range(header_bytes):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            safetensors_file.write_bytes(damaged)
            refused += is_refused(read_header, safetensors_file)
    assert refused > header_bytes


@pytest.mark.parametrize(
    ("header", "body", "told"),
    [
        (b"", b"", "damaged header"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": 1}', b"", "a has no description"),
        (b'{"a":{},"a":{}}', b"", "occurs twice"),
        (b"[" * 100_000, b"", "damaged header"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "damaged header"),
        (b"\xff\xfe", b"", "damaged header"),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "F99"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"1234", "dtype"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", "shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234", "shape"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"1234", "shape"),
        ({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"1234", "shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234", "bytes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"1234", "offsets"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", "needs 8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", "gap"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            b"12345678",
            "b overlaps",
        ),
        ({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, b"1234", "cut off"),
    ],
)
def test_every_fault_of_a_header_is_named(header, body, told, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", header, body)
    assert told in message(read_header, tmp_path / "x.safetensors")


def test_pickled_weights_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "pickled" in message(open_checkpoint, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    assert "model.safetensors" in message(open_checkpoint, tmp_path)


def test_an_index_must_agree_with_its_shards(tmp_path):
    def shards(weight_map):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert "neither" in message(read_directory, tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "two.safetensors")
    shards({"a": "one.safetensors", "b": "two.safetensors"})
    assert read_directory(tmp_path).keys() == {"a", "b"}
    shards({"a": "one.safetensors", "b": "three.safetensors"})
    assert "lacks 1 of 2 shards: three.safetensors" in message(read_directory, tmp_path)
    shards({"a": "two.safetensors", "b": "two.safetensors"})
    assert "promises tensors" in message(read_directory, tmp_path)
    shards({"a": "../one.safetensors"})
    assert "not a file beside it" in message(read_directory, tmp_path)
    shards({"a": 3})
    assert "not a file beside it" in message(read_directory, tmp_path)
    shards({"a": ["one.safetensors"]})
    assert message(read_directory, tmp_path)
    shards({})
    assert "weight_map" in message(read_directory, tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    shards({"a": "one.safetensors", "b": "two.safetensors"})
    assert "repeats" in message(read_directory, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "not valid JSON" in message(read_directory, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\xff", '{"model_type": "llama"}', "[" * 100_000])
def test_a_damaged_config_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in message(open_checkpoint, tmp_path)


def test_a_directory_without_a_config_and_links_that_lead_nowhere_are_said_so(tmp_path):
    assert "no config.json" in message(open_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "neither" in message(open_checkpoint, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    assert "cannot be read" in message(open_checkpoint, tmp_path)


def test_symbolic_links_are_followed(tmp_path):
    from tests.checkpoint.families import foreign_model

    foreign_model("qwen2").save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(tmp_path / "snapshot")
    assert open_checkpoint(tmp_path / "link").config.family == "qwen2"


def test_a_file_that_shrinks_after_it_was_opened_is_said_so(tmp_path):
    from tests.checkpoint.families import foreign_model

    foreign_model("llama").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
    for dtype in (torch.float32, torch.bfloat16):
        assert "cut off" in message(lambda dtype=dtype: list(checkpoint.tensors(dtype=dtype)))


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "ç"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_array("nested", [[1, 2], [3, 4]])
    shapes = {
        **{"token_embd.weight": (3, 8), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,)},
        **{"blk.0.ffn_norm.weight": (8,), "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (4, 8)},
        **{"blk.0.attn_v.weight": (4, 8), "blk.0.attn_output.weight": (8, 8), "blk.0.ffn_gate.weight": (8, 8)},
        **{"blk.0.ffn_up.weight": (8, 8), "blk.0.ffn_down.weight": (8, 8)},
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_cut_anywhere_is_refused_by_name(gguf_file):
    whole = gguf_file.read_bytes()
    assert len(layout(open_checkpoint(gguf_file).config)) == 8
    for length in [*range(0, 1400, 3), *range(1400, len(whole), 101)]:
        gguf_file.write_bytes(whole[:length])
        assert str(gguf_file) in message(read_gguf, gguf_file)


def test_flipped_bytes_in_a_gguf_header_are_refused_or_harmless(gguf_file):
    whole = gguf_file.read_bytes()
    chooser = random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(chooser.choice((1, 1, 2, 8))):
            damaged[chooser.randrange(1400)] = chooser.choice((0, 1, 0x7F, 0x80, 0xFF, chooser.randrange(256)))
        gguf_file.write_bytes(damaged)
        refused += is_refused(open_checkpoint, gguf_file)
    assert refused > 1000


def test_files_that_are_no_gguf_are_said_so(tmp_path, gguf_file):
    whole = gguf_file.read_bytes()
    assert "holds weights alone" in message(open_checkpoint, _written(tmp_path / "x.safetensors", b"GGUF"))
    assert "is not a GGUF file" in message(open_checkpoint, _written(tmp_path / "x.gguf", b""))
    assert "is not a GGUF file" in message(open_checkpoint, _written(tmp_path / "x.gguf", b"PK\3\4" * 10))
    with pytest.raises(UnsupportedModelError, match="version 1"):
        open_checkpoint(_written(tmp_path / "x.gguf", whole[:4] + struct.pack("<I", 1) + whole[8:]))
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        open_checkpoint(_written(tmp_path / "x.gguf", whole[:4] + struct.pack(">I", 3) + whole[8:]))


def _written(path, content):
    path.write_bytes(content)
    return path
