"""What rounding changes: a variant's distributions beside float32's on fixed text, in the causal and in the block view.

The text (`report_text.txt`, written for this purpose: prose, mathematics, code) is read in windows that start anew, so that windows are
the unit of chance. KL is that of the variant from float32, in nats, at every place.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimode.errors import SettingError, nearest
from trimode.evaluation.evaluate import mean

__all__ = ["VARIANTS", "check_variants", "compare", "load_variant", "report_windows"]

TEXT = Path(__file__).with_name("report_text.txt")
WINDOW = 128
BLOCKS_PER_WINDOW = 2
VARIANTS = {
    "bfloat16": "weights and arithmetic",
    "float16": "weights and arithmetic",
    "int8": "the engine for the CPU",
    "q8_0": "weights alone, in llama.cpp's format",
    "llama.cpp": "llama.cpp itself on q8_0 weights",
}

Logits = Callable[..., Tensor]
"""`LanguageModel.logits`, or the same of another engine."""


def check_variants(names: Sequence[str]) -> None:
    """Raises SettingError for a variant that there is not."""
    for name in names:
        if name not in VARIANTS:
            raise SettingError(
                f"There is no variant {name!r}.{nearest(name, VARIANTS)} There are {', '.join(VARIANTS)}."
            )
    if not names:
        raise SettingError(f"--variants names none. There are {', '.join(VARIANTS)}.")
    if "llama.cpp" in names:
        _llama_cpp()


def load_variant(reference: Any, name: str) -> Logits:
    """The logits of a variant of the same checkpoint. Raises SettingError, CheckpointError."""
    if name == "q8_0":
        return _through_q8_0(reference).logits
    if name == "llama.cpp":
        return _LlamaCpp(reference).logits
    import trimode

    if name == "int8":
        model = trimode.load(reference.name, device="cpu", quantize="int8")
        if model.precision != "int8":
            raise SettingError(
                f"The variant int8 needs the native engine, and here it runs in {model.precision}. Leave it out."
            )
        return model.logits
    return trimode.load(reference.name, device=reference.device, dtype=name).logits


def report_windows(model: Any, length: int = WINDOW) -> list[list[int]]:
    """The fixed text as this model's tokens, in windows of equal length. Raises SettingError without a tokenizer."""
    if model.tokenizer is None:
        raise SettingError(f"{model.name} has no tokenizer, and the report reads text.")
    ids = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def compare(
    reference: Any, variant: Logits, name: str, windows: Sequence[Sequence[int]] | None = None
) -> list[dict[str, Any]]:
    """Rows for the causal view and, where the checkpoint has masks and the variant has a block view, for the block view."""
    windows = report_windows(reference) if windows is None else windows
    causal = [_measure(reference.logits(list(w)), variant(list(w)), [*w[1:], None]) for w in windows]
    rows = [_row(name, "causal", causal)]
    mask = reference.config.mask_token_id
    if mask is not None and name != "llama.cpp":
        num_masks = reference.config.block_length - 1
        # the adapter is part of the block view where it acts on masks; one that only drafts is another view's business
        use = reference.adapter is not None and reference.config.adapter_acts_on == "masks"
        rows.append(
            _row(name, "block", [_blocks(reference.logits, variant, list(w), [mask] * num_masks, use) for w in windows])
        )
    return rows


def _blocks(
    reference: Logits, variant: Logits, window: list[int], masks: list[int], use_adapter: bool
) -> list[dict[str, Any]]:
    found = []
    for number in range(1, BLOCKS_PER_WINDOW + 1):
        prefix = number * len(window) // BLOCKS_PER_WINDOW - len(masks)
        if prefix < 1:
            continue
        ids = window[:prefix] + masks
        asked = {"view": "block", "prefix": prefix, "draft_lora": use_adapter}
        expected, other = (logits(ids, **asked)[prefix:] for logits in (reference, variant))
        found += _measure(expected, other, [None] * len(masks))
    return found


def _measure(expected: Tensor, found: Tensor, targets: Sequence[int | None]) -> list[dict[str, Any]]:
    """One record a row: agreement, KL, and log p of the target on both sides where there is one."""
    p, q = expected.log_softmax(dim=-1), found.log_softmax(dim=-1)
    kl = (p.exp() * (p - q)).sum(dim=-1).clamp(min=0.0).tolist()
    same = (expected.argmax(dim=-1) == found.argmax(dim=-1)).tolist()
    return [
        {
            "same": float(same[i]),
            "kl": kl[i],
            "logprobs": None if target is None else (float(p[i, target]), float(q[i, target])),
        }
        for i, target in enumerate(targets)
    ]


def _row(name: str, view: str, windows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    windows = [w for w in windows if w]
    places = [place for window in windows for place in window]
    pairs = [place["logprobs"] for place in places if place["logprobs"] is not None]
    # windows hold equally many places, so the mean of their means is the mean
    by_window = lambda key: mean([math.fsum(p[key] for p in w) / len(w) for w in windows])  # noqa: E731
    return {
        "variant": name,
        "what": VARIANTS.get(name, ""),
        "view": view,
        "places": len(places),
        "agreement": by_window("same"),
        "kl": by_window("kl"),
        "kl_worst": max(place["kl"] for place in places),
        "perplexity": math.exp(-math.fsum(q for _, q in pairs) / len(pairs)) if pairs else None,
        "reference_perplexity": math.exp(-math.fsum(p for p, _ in pairs) / len(pairs)) if pairs else None,
    }


def _through_q8_0(reference: Any) -> Any:
    """The same model in PyTorch with each linear map's weights rounded to q8_0 and back."""
    from trimode.checkpoint import open_checkpoint
    from trimode.engine.language_model import LanguageModel
    from trimode.model.transformer import Transformer

    tensors = open_checkpoint(reference.name).tensors(dtype=torch.float32, device=torch.device("cpu"))
    rounded = Transformer(reference.config, dtype=torch.float32)
    rounded.load((name, _rounded(tensor) if _is_linear(name) else tensor) for name, tensor in tensors)
    return LanguageModel(reference.name, rounded.eval(), reference.tokenizer, adapter=reference.adapter)


def _is_linear(name: str) -> bool:
    return name.endswith(".weight") and "norm" not in name


def _rounded(tensor: Tensor) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    if tensor.ndim != 2 or tensor.shape[-1] % 32:
        return tensor
    back = quants.dequantize(quants.quantize(tensor.float().cpu().numpy(), kind), kind)
    return torch.from_numpy(back).to(tensor)


def _llama_cpp() -> Any:
    try:
        import llama_cpp  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SettingError("The variant llama.cpp is not installed. Run `pip install llama-cpp-python`.") from None
    return llama_cpp


class _LlamaCpp:
    """llama.cpp over the same file, its linear weights stored as q8_0."""

    def __init__(self, reference: Any) -> None:
        from trimode.checkpoint import open_checkpoint

        path = Path(open_checkpoint(reference.name).path)
        if path.suffix != ".gguf":
            raise SettingError(
                f"The variant llama.cpp reads GGUF files; {reference.name} is {path.name}. Leave it out."
            )
        self._folder = tempfile.TemporaryDirectory(prefix="trimode-q8_0-")
        copy = Path(self._folder.name) / "model.gguf"
        rewrite_as_q8_0(path, copy)
        self._model = _llama_cpp().Llama(
            str(copy), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False, n_threads=torch.get_num_threads()
        )

    def logits(self, ids: Sequence[int], **_: Any) -> Tensor:
        self._model.reset()
        self._model.eval(list(ids))
        return torch.tensor(self._model.scores[: len(ids)], dtype=torch.float32)


def rewrite_as_q8_0(source: Path, target: Path) -> None:
    """A copy of a GGUF file with every matrix in q8_0 and everything else as it was."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if field.types[0] == GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, field.types[0])
    for tensor in reader.tensors:
        data = quants.dequantize(tensor.data, tensor.tensor_type)
        if data.ndim == 2 and data.shape[-1] % 32 == 0:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
