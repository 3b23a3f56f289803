"""The library's face: a loaded checkpoint that generates, streams, fills in and scores.

Each call runs the reference loop over a batch of its own, with a cache allocated for just that batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trimode.checkpoint import Checkpoint, open_checkpoint, save_checkpoint, save_packed_checkpoint
from trimode.checkpoint.packing import packed_weights
from trimode.decoding.auto import Auto
from trimode.decoding.autoregressive import Autoregressive
from trimode.decoding.block_diffusion import BlockDiffusion, Infill
from trimode.decoding.generate import Observer, run_to_end
from trimode.decoding.interface import Constraint, Decoder, Generation, Traits
from trimode.decoding.lookup import LookupSelfSpeculation
from trimode.decoding.self_speculation import LinearSelfSpeculation, QuadraticSelfSpeculation
from trimode.decoding.settings import (
    Settings,
    check_for_mode,
    check_with_constraint,
    mode_of,
    parse_settings,
    turns_a_mode,
)
from trimode.decoding.trace import traced
from trimode.device import check_memory, pick_device, pick_dtype, set_threads
from trimode.engine.answer import Answer, AnswerText
from trimode.engine.cost import MeasuredChooser, cost_table, kept_table
from trimode.engine.prompts import check_ids, encode_prompt, is_batch
from trimode.engine.request import Generated, Infilled, Request, StreamEvent
from trimode.engine.runner import Runner
from trimode.errors import (
    CheckpointError,
    ContextLengthError,
    GrammarError,
    MissingMaskTokenError,
    PromptError,
    SettingError,
    TrimodeError,
)
from trimode.model import native
from trimode.model.attention import KernelName, Span
from trimode.model.config import ModelConfig
from trimode.model.forward import Cache, Forward, Inputs, Scores, TorchForward
from trimode.model.graphs import CudaCapture
from trimode.model.lora import Lora
from trimode.model.native import NativeForward, Precision
from trimode.model.transformer import Transformer
from trimode.model.views import BlockOverCausal, Causal
from trimode.text.grammar import Grammar, GrammarKind, Grammars
from trimode.text.ngrams import NgramTable
from trimode.text.tokenizer import Tokenizer

__all__ = ["LanguageModel", "load", "num_positions"]

Backend = Literal["auto", "native", "torch"]

DEFAULT_SPAN_LENGTH = 16
_NATIVE_DTYPES: dict[torch.dtype, Precision] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_NOT_FOR_INFILL = {
    "mode",
    "logprobs",
    "block_length",
    "block_size",
    "max_new_tokens",
    "max_thinking_tokens",
    "end_think_token_id",
    "ignore_eos",
    "stop",
}
_SCORE_ROWS = 128
"""Rows of logits that scoring holds at once: 128 rows of a 131,072-token vocabulary are 67 MB."""


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    quantize: str | None = None,
    attention: KernelName | None = None,
    backend: Backend = "auto",
) -> "LanguageModel":
    """Load a preset, a Hugging Face directory, a GGUF file or a hub id (`owner/name` or `owner/name@revision`).

    dtype: "float32", "bfloat16" or "float16"; None takes the checkpoint's own, float32 for quantised GGUF files.
    quantize: "int8", or "none"; None is "int8" on the CPU unless a dtype is given or the checkpoint is in float32. Where the native
    engine was not built, "int8" runs in bfloat16 through PyTorch (`precision` says so). On a GPU "int8" holds the layers' weights in
    int8, with a scale for each output, and computes in bfloat16: half the memory.
    threads: of the forwards on the CPU. attention: PyTorch's kernel, for backend "torch"; None on a GPU: what measures best there.
    backend: "native" (C++, on the CPU), "torch", or "auto": native where it runs. Raises CheckpointError or SettingError in one line.
    """
    if backend not in get_args(Backend):
        raise SettingError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}.")
    if quantize not in (None, "none", "int8"):
        raise SettingError(f"quantize must be 'int8' or 'none'; got {quantize!r}.")
    if attention is not None and attention not in get_args(KernelName):
        raise SettingError(f"attention must be one of plain, sdpa, flex; got {attention!r}.")
    if not isinstance(name, str | Path):
        raise SettingError(f"load takes a preset, a path or a hub id; got {name!r}.")
    set_threads(threads)
    target = pick_device(device)
    checkpoint = open_checkpoint(name)
    wanted = pick_dtype(dtype, checkpoint.stored_dtype)
    if quantize == "int8" and dtype is not None:
        raise SettingError(f"quantize='int8' and dtype={dtype!r} contradict one another. Leave one of them out.")
    why_not = native.why_not(checkpoint.config)
    use_native = _use_native(backend, target, wanted, dtype, attention, why_not)
    asks_for_torch = backend == "torch" or attention is not None or target.type != "cpu"
    holds_int8 = quantize == "int8" and target.type == "cuda"
    if quantize == "int8" and not use_native and asks_for_torch and not holds_int8:
        raise SettingError(
            f"quantize='int8' needs the native engine, which does not run here: {_why_not_native(target, why_not)}"
        )
    if not use_native and dtype is None and (quantize == "int8" or checkpoint.stored_dtype == "int8"):
        wanted = torch.bfloat16 if quantize != "none" else wanted
    is_int8 = use_native and dtype is None and quantize != "none" and checkpoint.stored_dtype != "float32"
    if target.type == "cpu":
        # else the system ends the process without a word, minutes later
        check_memory(
            str(name),
            checkpoint.config.num_parameters
            * (1 if is_int8 or (use_native and quantize == "int8") else wanted.itemsize),
        )
    lora = checkpoint.adapter()
    if use_native:
        precision: Precision = "int8" if quantize == "int8" or is_int8 else _NATIVE_DTYPES[wanted]
        engine = NativeForward(checkpoint.config, precision=precision, threads=threads)
        engine.load(packed_weights(checkpoint, precision))
        if lora is not None:
            engine.set_adapter(lora)
        forward: Forward = engine
    else:
        lora = lora if lora is None else lora.to(target)
        forward = _torch_forward(checkpoint, target, wanted, lora, attention, int8=holds_int8)
    packed = use_native and forward.precision == "int8" and (quantize == "int8" or checkpoint.packed is not None)
    return LanguageModel(
        str(name),
        forward,
        checkpoint.tokenizer(),
        adapter=lora,
        checkpoint=checkpoint,
        saves_packed=packed,
        ngrams=checkpoint.ngrams(),
    )


def _torch_forward(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    lora: Lora | None,
    attention: KernelName | None,
    *,
    int8: bool = False,
) -> TorchForward:
    transformer = Transformer(checkpoint.config, dtype=dtype)
    tensors = checkpoint.tensors(dtype=dtype, device=device)
    transformer.load(tensors, pack=device.type == "cpu", quantize=int8)
    return TorchForward(
        transformer.eval(),
        lora=lora,
        kernel=attention,
        dtype=dtype,
        device=device,
        capture=CudaCapture(device) if device.type == "cuda" else None,
        precision="int8" if int8 else None,
    )


def _use_native(
    backend: Backend,
    device: torch.device,
    wanted: torch.dtype,
    dtype: Any,
    attention: KernelName | None,
    why_not: str | None,
) -> bool:
    if backend == "torch":
        return False
    if backend == "auto":
        return device.type == "cpu" and why_not is None and attention is None and wanted in _NATIVE_DTYPES
    if attention is not None:
        raise SettingError(
            "attention chooses a kernel of PyTorch; it has no effect with backend='native'. Leave it out."
        )
    if device.type != "cpu" or why_not is not None:
        raise SettingError(f"backend='native' does not run here: {_why_not_native(device, why_not)}")
    if dtype is not None and wanted not in _NATIVE_DTYPES:
        raise SettingError(f"backend='native' runs float32, bfloat16 and int8; got dtype={dtype!r}.")
    return True


def _why_not_native(device: torch.device, why_not: str | None) -> str:
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}."
    return "attention= or backend='torch' asks for PyTorch." if why_not is None else why_not


def _uses_block_view(mode: str, settings: Settings) -> bool:
    return mode == "diffusion" or (mode == "self_spec" and settings.self_spec_kind != "lookup")


class LanguageModel:
    """A checkpoint in memory. Calls share the weights and nothing else."""

    def __init__(
        self,
        name: str,
        forward: Forward | Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        adapter: Lora | None = None,
        attention: KernelName = "sdpa",
        checkpoint: Checkpoint | None = None,
        saves_packed: bool = False,
        ngrams: NgramTable | None = None,
    ) -> None:
        """forward: what runs the model; a bare `Transformer` runs through PyTorch. checkpoint: where it came from, for `save`, which
        writes the engine's own format if `saves_packed`. ngrams: what the model tends to say, for drafts."""
        self.name = name
        if isinstance(forward, Transformer):
            weight = forward.embedding.weight
            self.forward: Forward = TorchForward(
                forward, lora=adapter, kernel=attention, dtype=weight.dtype, device=weight.device
            )
        else:
            self.forward = forward
        self.config: ModelConfig = self.forward.config
        self.tokenizer = tokenizer
        self.adapter = adapter
        self._checkpoint = checkpoint
        self._saves_packed = saves_packed
        self._ngrams = ngrams
        self.auto = {} if checkpoint is None else _checked_auto(checkpoint)
        """What mode "auto" stands for where somebody tuned it: the mode and its knobs."""
        self._grammars: Grammars | None = None
        self._grammars_lock = Lock()
        self._decoders: dict[str, Decoder] = {
            "ar": Autoregressive(),
            "diffusion": BlockDiffusion(),
            "linear": LinearSelfSpeculation(),
            "quadratic": QuadraticSelfSpeculation(),
            "lookup": LookupSelfSpeculation(ngrams),
            "infill": Infill(),
        }

    @property
    def dtype(self) -> torch.dtype:
        """What logits come in."""
        return self.forward.dtype

    @property
    def device(self) -> torch.device:
        """Where forwards run."""
        return self.forward.device

    @property
    def precision(self) -> str:
        """What the weights are held in: "float32", "bfloat16", "float16" or "int8"."""
        return self.forward.precision

    @property
    def transformer(self) -> Transformer:
        """The PyTorch model, where that is what runs."""
        if not isinstance(self.forward, TorchForward):
            raise SettingError(
                f"{self.name} runs in the native engine and has no transformer. Load it with backend='torch'."
            )
        return self.forward.transformer

    @property
    def rows_stand_alone(self) -> bool:
        """Whether greedy `self_spec` is `ar` to the token: the native engine's rows hang on nothing that shares their forward, and in
        PyTorch's float32 no two choices tie within what does."""
        return isinstance(self.forward, NativeForward) or self.precision == "float32"

    @property
    def num_parameters(self) -> int:
        """Parameters of the base model."""
        return self.config.num_parameters

    def notice(self, mode: str) -> str | None:
        """One line that a user of this checkpoint in this mode should read, if there is one."""
        if mode in ("diffusion", "self_spec") and not self.config.trained_for_blocks:
            poor = "nobody has trained this checkpoint's block view yet, so its drafts are poor: "
            return poor + (
                "self_spec is exact all the same, but slow" if mode == "self_spec" else "diffusion's text is noise"
            )
        return None

    # ---- generating -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Any,
        *,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
        observe: Observer | None = None,
        **knobs: Any,
    ) -> Any:
        """Answer a prompt (string, chat messages or ids), or each of a list of prompts in one batch.

        raw: strings are not put through the chat template. template: variables for it, such as {"enable_thinking": True}.
        grammar: what every answer must match. observe: called with (generation, step, outcome) after each forward.
        Knobs: see `Settings`.
        Returns Generated, or a list of them for a list of prompts.
        """
        many = is_batch(prompt)
        if not many:
            answers = [self.open_answer(prompt, knobs, raw=raw, template=template, grammar=grammar)]
        else:
            answers = [self._answer_of(i, p, knobs, raw, template, grammar) for i, p in enumerate(prompt)]
        for _ in self._run(answers, observe):
            pass
        outputs = [self.output(a) for a in answers]
        return outputs if many else outputs[0]

    def stream(
        self,
        prompt: Any,
        *,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
        canvas: bool = False,
        observe: Observer | None = None,
        **knobs: Any,
    ) -> Iterator[StreamEvent]:
        """The same for one prompt, event by event. Final text is never taken back; with `canvas` the tentative block comes too.

        Mistakes are raised here, before the first event. Closing the iterator stops the generation.
        """
        if is_batch(prompt):
            raise PromptError("stream takes one prompt. Use generate for a list of prompts.")
        answer = self.open_answer(prompt, knobs, raw=raw, template=template, grammar=grammar)
        return self._stream(answer, canvas, observe)

    def _stream(self, answer: Answer, canvas: bool, observe: Observer | None) -> Iterator[StreamEvent]:
        for _ in self._run([answer], observe):
            yield from answer.news(self.token_text if canvas else None)
        yield self.finish_event(answer)

    def _run(self, answers: Sequence[Answer], observe: Observer | None) -> Iterator[None]:
        # longest last: slots of one length then stand side by side
        generations = sorted((a.generation for a in answers), key=num_positions)
        of = {id(a.generation): a for a in answers}
        lengths = _slot_lengths([num_positions(g) for g in generations])
        cache = self.forward.make_cache(lengths)
        runner = self.make_runner(cache)
        runner.seat(generations)

        def is_stopped(g: Generation, token: int) -> bool:
            return of[id(g)].text.push(token)

        for _ in run_to_end(generations, traced(runner, observe), observe=observe, is_stopped=is_stopped):
            for answer in answers:
                answer.look()
            yield

    def make_runner(self, cache: Cache) -> Runner:
        """What runs this model's forwards over a cache."""
        return Runner(self.forward, cache)

    def finish_event(self, answer: Answer) -> StreamEvent:
        """The last event of a stream."""
        return StreamEvent(kind="finish", text=answer.text.take(), output=self.output(answer))

    def output(self, answer: Answer) -> Generated:
        """A finished (or stopped) answer, for whoever asked."""
        g = answer.generation
        return Generated(
            text=answer.text.whole(),
            token_ids=g.new_tokens,
            finish_reason=g.finish_reason or "cancelled",
            stats=answer.stats(),
            logprobs=None if g.settings.logprobs is None else list(g.logprobs),
        )

    def token_text(self, token: int) -> str | None:
        """One token of a canvas, to look at; None for a mask."""
        if token == self.config.mask_token_id:
            return None
        return str(token) if self.tokenizer is None else self.tokenizer.decode([token])

    def grammar(self, kind: GrammarKind, source: Any = None) -> Grammar:
        """A grammar over this checkpoint's tokens: "json_object", "json_schema" (a schema), "regex" or "lark" (a text).

        Raises GrammarError. Needs the package llguidance.
        """
        if self.tokenizer is None or not self.config.eos_token_ids:
            raise GrammarError(
                f"{self.name} has no tokenizer or no end-of-text token, so no grammar can hold its answers."
            )
        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, self.config.vocab_size, self.config.eos_token_ids)
        return self._grammars.compile(kind, source)

    def encode(self, prompt: Any, *, raw: bool = False, template: Mapping[str, Any] | None = None) -> list[int]:
        """The ids that `generate` would read for this prompt."""
        return list(encode_prompt(prompt, self.tokenizer, self.config, raw=raw, variables=template))

    # ---- a request's settings ---------------------------------------------------------------------------------------------

    def open_answer(
        self,
        prompt: Any,
        knobs: Mapping[str, Any],
        *,
        raw: bool = False,
        template: Mapping[str, Any] | None = None,
        grammar: Grammar | None = None,
    ) -> Answer:
        """A request, checked and ready to run: what an engine takes. Raises the user's mistakes."""
        if isinstance(prompt, Request):
            knobs = {**knobs, **prompt.knobs}
            prompt = prompt.prompt
        settings, mode = self._settings(knobs, may_be_tuned=grammar is None)
        if grammar is not None:
            check_with_constraint(knobs, settings)
        ids = encode_prompt(prompt, self.tokenizer, self.config, raw=raw, variables=template)
        settings = self._fit(len(ids), settings, "max_new_tokens" in knobs)
        decoder = self._decoders[settings.self_spec_kind if mode == "self_spec" else mode]
        if settings.mode == "auto" and not turns_a_mode(knobs):  # whoever turns one has chosen already
            decoder = self._auto() or decoder
        return self._begin(ids, settings, mode, decoder, None if grammar is None else grammar.start())

    def _answer_of(
        self,
        i: int,
        prompt: Any,
        knobs: Mapping[str, Any],
        raw: bool,
        template: Mapping[str, Any] | None,
        grammar: Grammar | None,
    ) -> Answer:
        try:
            return self.open_answer(prompt, knobs, raw=raw, template=template, grammar=grammar)
        except TrimodeError as error:
            raise type(error)(f"Prompt {i} of the batch: {error}") from None

    def _begin(
        self,
        ids: tuple[int, ...],
        settings: Settings,
        mode: str,
        decoder: Decoder,
        constraint: Constraint | None = None,
    ) -> Answer:
        random = torch.Generator()
        if settings.seed is None:
            random.seed()
        else:
            random.manual_seed(settings.seed)
        generation = Generation(
            prompt=ids,
            settings=settings,
            traits=self._traits(settings),
            random=random,
            decoder=decoder,
            constraint=constraint,
        )
        notice = self.notice(mode) if _uses_block_view(mode, settings) else None
        return Answer(generation, mode, AnswerText(self.tokenizer, generation), notice)

    def measure(self) -> None:
        """Measure now what forwards cost, if `auto` needs it and this machine has not measured it for this model. Otherwise that
        happens behind the first token of an answer."""
        settings, _ = self._settings({"mode": "auto"})
        if settings.mode == "auto" and self._checkpoint is not None:
            cost_table(self.forward)

    @property
    def _drafts_are_trained(self) -> bool:
        return self.config.trained_for_blocks and self.config.mask_token_id is not None

    def _auto(self) -> Decoder | None:
        """The decoder that chooses by measured cost; None where nothing was loaded that costs could be kept of."""
        if self._checkpoint is None:
            return None
        if "auto" not in self._decoders:
            traits = self._traits(Settings())
            forward = self.forward
            chooser = MeasuredChooser(
                kept_table(forward) or (lambda: cost_table(forward)),
                has_adapter=traits.adapter_on_draft != "none",
                first_is_exact=traits.first_is_exact,
                can_draft=self._drafts_are_trained,
            )
            self._decoders["auto"] = Auto(chooser, self._ngrams)
        return self._decoders["auto"]

    def _settings(self, knobs: Mapping[str, Any], *, may_be_tuned: bool = True) -> tuple[Settings, str]:
        """Checked settings, and the mode that `auto` stands for. may_be_tuned: it may be what somebody tuned."""
        settings = parse_settings(knobs)
        mode = settings.mode
        if mode == "auto" and may_be_tuned and not turns_a_mode(knobs):
            # whoever turns a knob of some mode has a setting of his own in mind
            knobs = {**knobs, **self.auto}
            settings = parse_settings(knobs)
            mode = settings.mode
        if mode == "auto":
            mode = mode_of(knobs) or mode
        if mode == "auto":
            mode = "self_spec" if self._drafts_are_trained or settings.self_spec_kind == "lookup" else "ar"
        check_for_mode(knobs, mode)
        if self.config.mask_token_id is None and _uses_block_view(mode, settings):
            raise MissingMaskTokenError(
                f"{self.name} names no mask token, so it can only decode mode='ar', or 'self_spec' with self_spec_kind='lookup'. "
                "Convert it first, or set mask_token_id under 'trimode' in its config.json."
            )
        if (settings.block_length or 0) > self.config.max_positions:
            raise SettingError(
                f"block_length={settings.block_length:,} exceeds the context of {self.config.max_positions:,}. Use less."
            )
        if settings.draft_lora is not None:
            if self.adapter is None and settings.draft_lora:
                raise SettingError(f"draft_lora=True, but {self.name} has no draft adapter. Leave it out.")
            if mode == "diffusion" and self.config.adapter_acts_on == "draft":
                raise SettingError(
                    "draft_lora has no effect in mode 'diffusion': this adapter only drafts for self_spec."
                )
        if settings.stop and self.tokenizer is None:
            raise SettingError(f"stop needs a tokenizer, and {self.name} has none.")
        for token in settings.logit_bias or {}:
            if not 0 <= token < self.config.vocab_size:
                raise SettingError(
                    f"logit_bias names id {token}, outside the vocabulary of {self.config.vocab_size:,} ids."
                )
        return self._with_end_of_thinking(settings), mode

    def _with_end_of_thinking(self, settings: Settings) -> Settings:
        if settings.max_thinking_tokens is None:
            return settings
        token = settings.end_think_token_id
        if token is None and self.tokenizer is not None:
            token = self.tokenizer.token_to_id("</think>")
        if token is None:
            raise SettingError(
                f"max_thinking_tokens has no effect: {self.name} has no </think> token. Give end_think_token_id, or leave it out."
            )
        if not 0 <= token < self.config.vocab_size:
            raise SettingError(
                f"end_think_token_id {token} is outside the vocabulary of {self.config.vocab_size:,} ids."
            )
        if token == self.config.mask_token_id:
            raise SettingError(f"end_think_token_id {token} is the mask token, which is never text. Give another.")
        return replace(settings, end_think_token_id=token)

    def _fit(self, num_prompt: int, settings: Settings, asked: bool) -> Settings:
        room = self.config.max_positions - num_prompt
        if room < 1:
            raise ContextLengthError(
                f"The prompt has {num_prompt:,} tokens; the context holds {self.config.max_positions:,}, answer included. Shorten it."
            )
        if settings.max_new_tokens <= room:
            return settings
        if asked:
            raise ContextLengthError(
                f"max_new_tokens={settings.max_new_tokens:,} after a prompt of {num_prompt:,} tokens exceeds the context of "
                f"{self.config.max_positions:,}. Use at most {room:,}."
            )
        return replace(settings, max_new_tokens=room)

    def _traits(self, settings: Settings) -> Traits:
        config = self.config
        use = self.adapter is not None and settings.draft_lora is not False
        on_draft = "none" if not use else "masks" if config.adapter_acts_on == "masks" else "all"
        first_is_exact = config.known_tokens_are_causal and config.block_predicts == "next"
        return Traits(
            mask_token_id=-1 if config.mask_token_id is None else config.mask_token_id,
            eos_token_ids=frozenset(config.eos_token_ids),
            block_length=config.block_length,
            known_tokens_are_causal=config.known_tokens_are_causal,
            first_is_exact=first_is_exact,
            adapter_on_draft=on_draft,
            adapter_on_denoise="masks" if use and config.adapter_acts_on == "masks" else "none",
            # a checkpoint as published drafts blocks of the length that it was trained for
            drafts_adapt=first_is_exact and self.forward.device.type == "cpu",
        )

    # ---- filling in -------------------------------------------------------------------------------------------------------

    def infill(
        self,
        text: str | Sequence[Any],
        *,
        span_length: int | Sequence[int] = DEFAULT_SPAN_LENGTH,
        placeholder: str = "{}",
        observe: Observer | None = None,
        **knobs: Any,
    ) -> Infilled:
        """Fill the masked spans of a text, seeing what stands on both sides of them.

        text: a string with `placeholder` where a span is missing; or a list of the fixed texts between spans; or a list of ids
        with None for each masked place. span_length: tokens of each span, one number or one a span. Text is never templated.
        The knobs are those of mode "diffusion".
        """
        answer, spans = self.open_infill(text, span_length=span_length, placeholder=placeholder, **knobs)
        for _ in self._run([answer], observe):
            pass
        return self.infilled(answer, spans)

    def open_infill(
        self,
        text: str | Sequence[Any],
        *,
        span_length: int | Sequence[int] = DEFAULT_SPAN_LENGTH,
        placeholder: str = "{}",
        **knobs: Any,
    ) -> tuple[Answer, list[range]]:
        """A text to fill in, checked and ready to run, and the places of its spans."""
        if self.config.mask_token_id is None:
            raise MissingMaskTokenError(f"{self.name} names no mask token, so it cannot fill in. Convert it first.")
        for name in _NOT_FOR_INFILL & set(knobs):
            raise SettingError(
                f"{name} has no effect in infill: spans have a set length. Leave it out, and set span_length."
            )
        if not isinstance(placeholder, str):
            raise SettingError(f"placeholder must be a string; got {placeholder!r}.")
        if not isinstance(text, Sequence):
            raise PromptError(f"infill takes a string, a list of texts or a list of ids; got {type(text).__name__}.")
        ids, spans = self._masked_ids(text, span_length, placeholder)
        fixed_run = spans[0].start
        settings, _ = self._settings({**knobs, "mode": "diffusion"})
        prompt, canvas = ids[:fixed_run], ids[fixed_run:]
        settings = replace(settings, max_new_tokens=len(canvas), ignore_eos=True, max_thinking_tokens=None)
        if len(ids) > self.config.max_positions:
            raise ContextLengthError(
                f"Text and spans have {len(ids):,} tokens; the context holds {self.config.max_positions:,}. Shorten them."
            )
        answer = self._begin(tuple(prompt), settings, "diffusion", self._decoders["infill"])
        answer.generation.canvas, answer.spans = list(canvas), spans
        return answer, spans

    def _masked_ids(
        self, text: str | Sequence[Any], span_length: int | Sequence[int], placeholder: str
    ) -> tuple[list[int], list[range]]:
        """Ids with the mask at each missing place, and the places of each span."""
        mask = self.config.mask_token_id
        assert mask is not None
        if isinstance(text, str):
            if not placeholder or placeholder not in text:
                raise PromptError(f"The text has no {placeholder!r} to fill. Put it where a span is missing.")
            text = text.split(placeholder)
        if len(text) == 0:
            raise PromptError("There is nothing to fill in: the text is empty.")
        if all(isinstance(part, str) for part in text):
            if self.tokenizer is None:
                raise PromptError("This checkpoint has no tokenizer. Give ids, with None for each masked place.")
            num_spans = len(text) - 1
            if num_spans < 1:
                raise PromptError("A list of fixed texts needs at least two, with a span between them.")
            lengths: list[Any] = [span_length] * num_spans
            if isinstance(span_length, list | tuple):
                lengths = list(span_length)
            elif not isinstance(span_length, int):
                raise SettingError(f"span_length must be a whole number, or one for each span; got {span_length!r}.")
            if len(lengths) != num_spans:
                raise SettingError(f"span_length gives {len(lengths)} lengths for {num_spans} spans.")
            for length in lengths:
                if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= 4096:
                    raise SettingError(f"span_length must be whole numbers from 1 to 4,096; got {length!r}.")
            fixed = [self.tokenizer.encode(part) if part else [] for part in text]
            if any(mask in part for part in fixed):
                raise PromptError(
                    "The fixed text holds the mask token itself. Leave it out, and put a placeholder there."
                )
            ids = list(fixed[0])
            spans = []
            for length, part in zip(lengths, fixed[1:], strict=True):
                spans.append(range(len(ids), len(ids) + length))
                ids += [mask] * length + part
        else:
            ids = list(check_ids([mask if part is None else part for part in text], self.config))
            masked = [i for i, token in enumerate(ids) if token == mask]
            starts = [i for i in masked if i == 0 or ids[i - 1] != mask]
            ends = [i + 1 for i in masked if i + 1 == len(ids) or ids[i + 1] != mask]
            spans = [range(start, end) for start, end in zip(starts, ends, strict=True)]
        if not spans:
            raise PromptError("There is nothing to fill in: no place is masked.")
        if spans[0].start == 0:
            first = self.config.bos_token_id
            if first is None:
                raise PromptError(
                    "The text starts with a span, and this checkpoint has no token that begins a text. Lead with text."
                )
            ids = [first, *ids]
            spans = [range(span.start + 1, span.stop + 1) for span in spans]
        return ids, spans

    def infilled(self, answer: Answer, spans: Sequence[range]) -> Infilled:
        """The filled text; `spans` as `open_infill` gave them."""
        whole = answer.generation.final
        runs = [[whole[i] for i in span] for span in spans]
        stats = answer.stats()
        if self.tokenizer is None:
            return Infilled(text="", spans=[], token_ids=whole, stats=stats)
        return Infilled(
            text=self.tokenizer.decode(whole),
            spans=[self.tokenizer.decode(run) for run in runs],
            token_ids=whole,
            stats=stats,
        )

    # ---- looking at the model ---------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, text: str | Sequence[int]) -> float:
        """Exact autoregressive log-likelihood in nats of a text (never templated) or of ids, given its first token."""
        if isinstance(text, Sequence) and len(text) > 0 and isinstance(text[0], Mapping):
            raise PromptError("score takes a text or ids, not messages. Give encode(messages), then the answer's ids.")
        ids = encode_prompt(text, self.tokenizer, self.config, raw=True)
        if len(ids) < 2:
            raise PromptError("A score needs at least two tokens: the first is given, the others are scored.")
        if len(ids) > self.config.max_positions:
            raise ContextLengthError(
                f"The text has {len(ids):,} tokens; the context holds {self.config.max_positions:,}."
            )
        scores = self._scores(ids, Causal())
        total = 0.0
        for start in range(0, len(ids) - 1, _SCORE_ROWS):
            stop = min(start + _SCORE_ROWS, len(ids) - 1)
            logprobs = scores.logits(start, stop).float().log_softmax(dim=-1)
            targets = torch.tensor(ids[start + 1 : stop + 1], device=logprobs.device)
            total += float(logprobs.gather(-1, targets[:, None]).double().sum())
        return total

    @torch.no_grad()
    def logits(
        self,
        ids: Sequence[int],
        *,
        view: Literal["causal", "block"] = "causal",
        prefix: int = 0,
        draft_lora: bool = False,
    ) -> Tensor:
        """Raw logits of one forward over ids, for checks: float32 [T, V] on the CPU, row j as the model gives it.

        view "block": the first `prefix` ids are the causal, cached prefix; the others see it and one another.
        draft_lora: the draft adapter acts on the block (or on its masks, for converted models).
        """
        known = encode_prompt(ids, self.tokenizer, self.config)
        if len(known) > self.config.max_positions:
            raise ContextLengthError(f"{len(known):,} ids were given; the context holds {self.config.max_positions:,}.")
        if view not in ("causal", "block"):
            raise SettingError(f"view must be 'causal' or 'block'; got {view!r}.")
        if view == "causal" and (prefix or draft_lora):
            raise SettingError("prefix and draft_lora have no effect with view='causal'. Leave them out.")
        if isinstance(prefix, bool) or not isinstance(prefix, int) or not 0 <= prefix <= len(known):
            raise SettingError(f"prefix must be from 0 to the {len(known)} ids given; got {prefix}.")
        rows: list[int] = []
        if draft_lora:
            if self.adapter is None:
                raise SettingError(f"draft_lora=True, but {self.name} has no draft adapter. Leave it out.")
            only_masks = self.config.adapter_acts_on == "masks"
            rows = [i for i in range(prefix, len(known)) if not only_masks or known[i] == self.config.mask_token_id]
        scores = self._scores(known, Causal() if view == "causal" else BlockOverCausal(prefix), rows)
        return scores.logits(0, len(known)).float().cpu().clone()  # a tensor like any other, not one of inference mode

    def _scores(self, ids: Sequence[int], view: Causal | BlockOverCausal, adapted: Sequence[int] = ()) -> Scores:
        """One forward over ids that asks about each of them."""
        places = range(len(ids))
        span = Span(start=0, length=len(ids), slot=0, cached=0, view=view)
        inputs = Inputs(tokens=list(ids), positions=list(places), spans=[span], adapted=adapted, asked=list(places))
        return self.forward(inputs, self.forward.make_cache([len(ids)]))

    def save(self, directory: str | Path) -> None:
        """Write a directory: config, safetensors, adapter, tokenizer and n-grams. Refuses one that holds files.

        A model that was loaded with quantize="int8", or from a packed directory, is written packed (`checkpoint.packed_files`), which
        trimode alone reads; any other as Hugging Face has it, in the numbers that it was loaded from.
        """
        if not isinstance(directory, str | Path) or "\0" in str(directory) or str(directory) == "":
            raise SettingError(f"save takes the path of a directory; got {directory!r}.")
        beside: dict[str, Any] = {"adapter": self.adapter, "tokenizer": self.tokenizer, "ngrams": self._ngrams}
        if self._saves_packed:
            assert self._checkpoint is not None
            weights = packed_weights(self._checkpoint, "int8")
            save_packed_checkpoint(directory, self._checkpoint, weights, **beside)
        else:
            save_checkpoint(directory, self.config, self._dense_tensors(), **beside)

    def _dense_tensors(self) -> Iterable[tuple[str, Tensor]]:
        if isinstance(self.forward, TorchForward) and self.forward.precision != "int8":
            return self.forward.transformer.dense_tensors()
        assert self._checkpoint is not None
        # the numbers that it was loaded from, not those that the engine made of them
        return self._checkpoint.tensors(dtype=pick_dtype(None, self._checkpoint.stored_dtype))


def _checked_auto(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tuned setting of a checkpoint. Raises CheckpointError if it makes no sense."""
    auto = checkpoint.auto
    try:
        settings = parse_settings(auto)
        check_for_mode(auto, settings.mode)
        if auto and settings.mode == "auto":
            raise SettingError("mode must not be auto again.")
    except SettingError as error:
        raise CheckpointError(
            f"trimode.auto in {checkpoint.generation_path}: {error} Run trimode tune again."
        ) from None
    return dict(auto)


def num_positions(g: Generation) -> int:
    """Positions that prompt, answer and scratch of a generation may take in the cache."""
    scratch = g.decoder.num_scratch(g.settings, g.traits)
    return len(g.prompt) + g.settings.max_new_tokens + scratch


def _slot_lengths(needs: Sequence[int]) -> list[int]:
    """Each need, raised to the greatest within the same power of two: neighbours of similar length can share a kernel call,
    and the cache stays below twice what is needed."""
    longest: dict[int, int] = {}
    for need in needs:
        longest[need.bit_length()] = max(need, longest.get(need.bit_length(), 0))
    return [longest[need.bit_length()] for need in needs]
