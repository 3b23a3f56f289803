"""A model that needs no weights: it answers with a few known words, token by token, through the library's surface.

Run as a program it is the command line with this model behind it, for the tests that need a process of their own.
"""

import dataclasses
import sys
import time
from types import SimpleNamespace

from trimode.errors import ContextLengthError, PromptError, SettingError, nearest

KNOWN = {
    "mode",
    "max_new_tokens",
    "threshold",
    "temperature",
    "seed",
    "stop",
    "block_length",
    "ignore_eos",
    "draft_lora",
}
ANSWER = ["The", " sky", " scatters", " blue", " light", ".", "\nThat", " is", " all", "."]


@dataclasses.dataclass(frozen=True)
class Stats:
    mode: str
    tokens: int
    prompt_tokens: int = 5
    nfe_prefill: int = 1
    nfe_decode: int = 4
    decode_tpf: float = 2.5
    e2e_tpf: float = 2.0
    acceptance_length: float | None = None
    revised: int = 0
    seconds: float = 0.5
    tokens_per_second: float = 20.0
    notice: str | None = None

    def as_dict(self):
        return dataclasses.asdict(self)


class FakeModel:
    """What `trimode.load` gives back; `asked` keeps every request."""

    def __init__(
        self,
        name="fake",
        *,
        tokenizer=True,
        pause_s=0.0,
        answer=ANSWER,
        interrupt_after=None,
        differs=None,
        mask=3,
        auto=None,
    ):
        self.name = name
        self.config = SimpleNamespace(trained_for_blocks=False, mask_token_id=mask, block_length=8, max_positions=64)
        self.precision, self.device, self.adapter = "float32", "cpu", None
        self.rows_stand_alone, self.auto = True, auto or {}
        self.forward = SimpleNamespace(describe=lambda: "fake float32, 2 threads")
        self.tokenizer = object() if tokenizer else None
        self.num_parameters = 134_515_008
        self.pause_s, self.words, self.interrupt_after, self.differs = pause_s, answer, interrupt_after, differs
        self.asked = []

    def measure(self):
        """Nothing has a cost here."""

    def notice(self, mode):
        return None if mode in ("ar", "auto") else "nobody trained this checkpoint's block view, so its drafts are poor"

    def _check(self, prompt, knobs):
        for knob in knobs:
            if knob not in KNOWN:
                raise SettingError(f"Unknown knob {knob!r}.{nearest(knob, KNOWN)}")
        if knobs.get("mode") == "ar" and "threshold" in knobs:
            raise SettingError("threshold has no effect in mode ar.\nLeave it out.")
        if prompt == "refuse me":
            raise PromptError("This prompt is refused.\nAsk another.")
        if isinstance(prompt, str) and self.tokenizer is None:
            raise PromptError("This checkpoint has no tokenizer. Give ids.")
        if isinstance(prompt, list) and len(prompt) > 6:
            raise ContextLengthError("99 tokens do not fit the context of 64.")

    def _generated(self, knobs):
        words = self.words[: knobs.get("max_new_tokens", len(self.words))]
        mode = knobs.get("mode", "auto")
        ids = [10 + i for i in range(len(words))]
        if self.differs == mode:
            ids[-1] += 1
        return SimpleNamespace(
            text="".join(words) if self.tokenizer else "",
            token_ids=ids,
            finish_reason="stop" if len(words) == len(self.words) else "length",
            stats=Stats(
                mode="ar" if mode == "auto" else mode,
                tokens=len(words),
                acceptance_length=2.5 if mode == "self_spec" else None,
            ),
        )

    def generate(self, prompt, *, raw=False, **knobs):
        self.asked.append((prompt, raw, knobs))
        self._check(prompt, knobs)
        return self._generated(knobs)

    def stream(self, prompt, *, raw=False, canvas=False, **knobs):
        self.asked.append((prompt, raw, knobs))
        self._check(prompt, knobs)
        output = self._generated(knobs)
        words = self.words[: len(output.token_ids)]
        for start in range(0, len(words), 2):
            two = words[start : start + 2]
            if canvas:
                for shown in ([None] * len(two), [two[0]] + [None] * (len(two) - 1)):
                    yield SimpleNamespace(kind="canvas", text="", token_ids=[], canvas=shown, output=None)
                    time.sleep(self.pause_s)
            time.sleep(self.pause_s)
            if self.interrupt_after is not None and start >= self.interrupt_after:
                raise KeyboardInterrupt
            text = "".join(two) if self.tokenizer else ""
            yield SimpleNamespace(
                kind="text", text=text, token_ids=output.token_ids[start : start + 2], canvas=None, output=None
            )
        yield SimpleNamespace(kind="finish", text="", token_ids=(), canvas=None, output=output)


if __name__ == "__main__":
    import trimode
    from trimode.cli import main

    pause_s = float(sys.argv.pop(1))
    trimode.load = lambda name, **_: FakeModel(name, pause_s=pause_s)
    main()
