"""trimode as a model of EleutherAI's lm-evaluation-harness: every task of theirs, by mode.

    lm_eval --model trimode --model_args pretrained=smollm2-135m,mode=diffusion --tasks arc_easy

Versions of the harness that look for plugins find the model by our package's entry point. Older ones know only their own models: there,
`python -m trimode.evaluation.harness` takes the same arguments and registers ours first.

Likelihoods follow the mode: `ar` and `self_spec` (whose text is `ar`'s) give the exact autoregressive one, `diffusion` the bound of
`likelihood.diffusion_score`.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from trimode.engine.request import Request
from trimode.errors import SettingError
from trimode.evaluation.likelihood import autoregressive_score, diffusion_score

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise SettingError("lm-evaluation-harness is not installed. Run `pip install 'trimode[eval]'`.") from None

__all__ = ["TrimodeLM", "main"]

BOUND_KNOBS = ("block_length", "draft_lora")
SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@register_model("trimode")
class TrimodeLM(TemplateLM):
    """A loaded checkpoint in one mode. Arguments beyond these are knobs of `generate`."""

    def __init__(
        self,
        pretrained: str,
        mode: str = "ar",
        dtype: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        quantize: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int = 256,
        samples: int = 4,
        seed: int = 0,
        add_bos_token: bool = False,
        **knobs: Any,
    ) -> None:
        """samples: of the diffusion bound, for each number of masks. batch_size: prompts that generate together ("auto": 1).
        add_bos_token: begin texts as the tokenizer would, which the harness itself leaves out by default."""
        super().__init__()
        import torch

        import trimode

        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's own default, which it passes whether or not there is such a device
        self.model: Any = trimode.load(pretrained, dtype=dtype, device=device, threads=threads, quantize=quantize)
        if self.model.tokenizer is None:
            raise SettingError(f"{pretrained} has no tokenizer, and the harness asks in text.")
        # knobs are checked now and not after an hour of likelihoods
        answer = self.model.open_answer([0], {**knobs, "mode": mode, "max_new_tokens": 1})
        self.mode = answer.mode
        self._knobs, self._add_bos = knobs, add_bos_token
        self._asked_mode = mode
        self._batch = 1 if str(batch_size).startswith("auto") else int(batch_size)
        self._most, self._samples, self._seed = max_new_tokens, samples, seed
        self._device = self.model.device

    # ---- text and ids ---------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """What stands before a text without a context."""
        config = self.model.config
        if config.bos_token_id is not None:
            return config.bos_token_id
        if not config.eos_token_ids:
            raise SettingError(f"{self.model.name} names no token that begins or ends a text.")
        return config.eos_token_ids[0]

    @property
    def max_length(self) -> int:
        return self.model.config.max_positions

    @property
    def max_gen_toks(self) -> int:
        return self._most

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        add = self._add_bos if add_special_tokens is None else add_special_tokens
        return list(self.model.tokenizer.encode(string, add_special_tokens=add))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        tokenizer = self.model.tokenizer
        if tokenizer.chat_template is None:
            raise SettingError(f"{self.model.name} has no chat template. Leave out --apply_chat_template.")
        from trimode.text.chat_template import render_chat

        return render_chat(
            tokenizer.chat_template,
            chat_history,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            add_generation_prompt=add_generation_prompt,
        )

    # ---- likelihood -------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for texts, context, target in _shown(requests, disable_tqdm):
            result = self._score(self._fitting(context, len(target)), target)
            results.append(result)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _fitting(self, context: Sequence[int], num_target: int) -> list[int]:
        """The context's end, as much as the model has room for."""
        return list(context[-max(self.max_length - num_target, 1) :])

    def _score(self, context: list[int], target: list[int]) -> tuple[float, bool]:
        if self.mode != "diffusion":
            score = autoregressive_score(self.model, context, target)
            return score.total, score.is_greedy
        return self._total(context, target), self._is_what_it_writes(context, target)

    def _is_what_it_writes(self, context: list[int], target: list[int]) -> bool:
        """Whether greedy diffusion writes this continuation. It has to be tried: no forward over the true text tells."""
        greedy = {k: v for k, v in self._knobs.items() if k not in SAMPLING}
        out = self.model.generate(
            context, mode="diffusion", max_new_tokens=len(target), ignore_eos=True, seed=self._seed, **greedy
        )
        return list(out.token_ids) == list(target)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in _shown(requests, disable_tqdm):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            totals.append(sum(self._total(list(context), list(target)) for context, target in pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _total(self, context: list[int], target: list[int]) -> float:
        if self.mode != "diffusion":
            return autoregressive_score(self.model, context, target).total
        knobs = {k: v for k, v in self._knobs.items() if k in BOUND_KNOBS}
        return diffusion_score(self.model, context, target, samples=self._samples, seed=self._seed, knobs=knobs).total

    # ---- text -------------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = []
        groups = [requests[i : i + self._batch] for i in range(0, len(requests), self._batch)]
        for group in _shown(groups, disable_tqdm):
            asked = [Request(self._prompt(r.args), **self._knobs_of(r.args[1])) for r in group]
            for request, out in zip(group, self.model.generate(asked, raw=True), strict=True):
                texts.append(out.text)
                self.cache_hook.add_partial("generate_until", request.args, out.text)
        return texts

    def _prompt(self, arguments: tuple[str, Mapping[str, Any]]) -> list[int]:
        most = self._most_of(arguments[1])
        return self._fitting(self.tok_encode(arguments[0]), most)

    def _most_of(self, asked: Mapping[str, Any]) -> int:
        most = asked.get("max_gen_toks", asked.get("max_new_tokens", asked.get("max_tokens", self._most)))
        return min(int(most), self.max_length - 1)

    def _knobs_of(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        knobs = {"mode": self._asked_mode, "seed": self._seed, **self._knobs, "max_new_tokens": self._most_of(asked)}
        until = asked.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        if stops := [s for s in stops if s]:
            knobs["stop"] = stops
        if asked.get("do_sample") or asked.get("temperature"):
            sampling = {k: asked[k] for k in SAMPLING if k in asked}
            knobs |= {"temperature": 1.0, **sampling} if asked.get("temperature", 1.0) else {}
        return knobs


def _shown(items: Sequence[Any], silent: bool) -> Any:
    from tqdm import tqdm

    return tqdm(items, disable=silent)


def main() -> None:
    """lm_eval's own command line with our model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    # the class registered under the module's real name, so that the harness and our callers see one
    sys.modules["trimode.evaluation.harness"] = sys.modules["__main__"]
    main()
