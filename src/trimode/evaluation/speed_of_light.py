"""Speed of light: how few forwards an ideal sampler would need for the text that a careful one writes (arXiv 2607.05722, section 4).

Diffusion: the target is serial denoising, the single surest place a forward. The ideal sampler commits in each forward a set of places
that the model fills as in the target, so chosen that the block is done soonest; the real policy starts from the same prefix.
Self-speculation: the target is the autoregressive text, drafts may take several forwards whose commits an oracle chooses, and an oracle
says when to verify. Text before a block is always the target's. Everything greedy.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from trimode.errors import SettingError
from trimode.evaluation.blocks import BlockAsk, BlockReader
from trimode.evaluation.lattice import Lattice, fewest_passes, longest_runs

__all__ = [
    "BlockLight",
    "SpeculationLight",
    "as_record",
    "diffusion_light",
    "ratio",
    "speculation_light",
    "summarise_light",
]

MOST_DRAFT_PASSES = 4
"""Forwards that the oracle may spend on one draft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLight:
    """One block of diffusion."""

    block: int
    """Its number in the answer."""
    tokens: int
    """Of the target, up to an end of text; the anchor included."""
    serial_passes: int
    """Denoising forwards of the target."""
    ideal_passes: int
    ideal_at_least: int
    """What the search could prove; equal to `ideal_passes` where it ended within its budget."""
    real_tokens: int
    real_passes: int
    is_real_target: bool
    """The real policy filled this block as the target."""
    commits: int
    """Forwards beside denoising: 1 where a block is cached by one of its own."""
    num_looked: int
    """States of the block that were looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationLight:
    """One answer of linear self-speculation; forwards include the prompt's."""

    tokens: int
    real_forwards: int
    """Of the decoder itself."""
    one_pass_forwards: int
    """With one forward a draft, and an oracle that decodes plainly where a draft would not pay."""
    ideal_forwards: int
    """With a perfect order of drafting, in up to four forwards a draft."""
    is_proven: bool
    """Every draft's search ended within its budget."""
    num_looked: int


def diffusion_light(
    model: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    budget: int,
    knobs: Mapping[str, Any],
    rows: int = 16,
) -> Iterator[BlockLight]:
    """Block after block of the serial target behind a prompt, until an end of text or whole blocks for `max_new_tokens`.

    knobs: of the real policy; `block_length` and `draft_lora` hold for the target too.
    """
    _check(knobs, budget)
    reader = _reader(model, len(prompt) + max_new_tokens, {"mode": "diffusion", **knobs}, rows)
    new = list(prompt)
    for number in range(max(max_new_tokens // reader.block_length, 1)):
        num_anchors = 0
        for _, logits in reader.read(new, last_only=True):
            if not reader.traits.first_is_exact:
                anchor = _guess(reader, logits)[0][0]
                if anchor in reader.traits.eos_token_ids:
                    return
                num_anchors = 1
                for _ in reader.read([anchor], last_only=True):
                    pass
        light, new = _block(reader, number, num_anchors, budget)
        yield light
        if any(token in reader.traits.eos_token_ids for token in new):
            return


def _block(reader: BlockReader, number: int, num_anchors: int, budget: int) -> tuple[BlockLight, list[int]]:
    prefix = len(reader.text)
    block = _Block(reader, prefix, "denoise")
    order = block.denoise_serially()
    target = block.target
    ends = [i for i, token in enumerate(target) if token in reader.traits.eos_token_ids]
    num_needed = ends[0] + 1 if ends else len(target)
    goal = (1 << num_needed) - 1
    lattice = Lattice(len(target), block.look, budget)
    found = fewest_passes(lattice, order, goal)
    real, real_passes = reader.decode_block(prefix)
    done, serial_passes = 0, 0
    for place in order:
        serial_passes += bool(goal & ~done)
        done |= 1 << place
    light = BlockLight(
        block=number,
        tokens=num_needed + num_anchors,
        serial_passes=serial_passes,
        ideal_passes=found.passes,
        ideal_at_least=found.at_least,
        real_tokens=len(real) + num_anchors,
        real_passes=real_passes,
        is_real_target=real[:num_needed] == target[:num_needed],
        commits=num_anchors,
        num_looked=found.num_looked,
    )
    return light, target[:num_needed]


class _Block:
    """The block behind a prefix, state by state."""

    def __init__(self, reader: BlockReader, prefix: int, purpose: Any, target: Sequence[int] = ()) -> None:
        self.target = list(target)
        self._reader, self._prefix, self._purpose = reader, prefix, purpose
        self._seen: dict[int, list[tuple[float, int, int]]] = {}

    def denoise_serially(self) -> list[int]:
        """Fill the surest place, one a forward, which makes the target. Returns the places in that order."""
        num_places = self._reader.num_places
        self.target = [self._reader.traits.mask_token_id] * num_places
        order: list[int] = []
        state = 0
        for _ in range(num_places):
            best = max(self._guesses([state])[0], key=lambda g: (g[0], -g[1]))
            order.append(best[1])
            self.target[best[1]] = best[2]
            state |= 1 << best[1]
        return order

    def look(self, states: Sequence[int]) -> list[list[tuple[float, int]]]:
        """For the search: confidence and place of what each state would fill as in the target."""
        return [
            [(sure, place) for sure, place, token in guesses if token == self.target[place]]
            for guesses in self._guesses(states)
        ]

    def _guesses(self, states: Sequence[int]) -> list[list[tuple[float, int, int]]]:
        new = [s for s in states if s not in self._seen]
        asks = [BlockAsk(prefix=self._prefix, canvas=self._canvas(s), purpose=self._purpose) for s in new]
        mask = self._reader.traits.mask_token_id
        for state, ask, logits in zip(new, asks, self._reader.look(asks), strict=True):
            tokens, sure = _guess(self._reader, logits)
            places = [i for i, token in enumerate(ask.canvas) if token == mask]
            self._seen[state] = list(zip(sure, places, tokens, strict=True))
        return [self._seen[s] for s in states]

    def _canvas(self, state: int) -> tuple[int, ...]:
        mask = self._reader.traits.mask_token_id
        return tuple(token if state >> i & 1 else mask for i, token in enumerate(self.target))


def speculation_light(
    model: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    budget: int,
    knobs: Mapping[str, Any],
    rows: int = 16,
) -> SpeculationLight:
    """The autoregressive answer, in as few forwards as linear self-speculation with a perfect order of drafting could write it.

    budget: states looked at for each place where a draft may start.
    """
    _check(knobs, budget)
    own = {k: v for k, v in knobs.items() if k in ("block_length", "draft_lora")}
    real = model.generate(list(prompt), mode="self_spec", max_new_tokens=max_new_tokens, seed=0, **own)
    answer = list(real.token_ids)
    reader = _reader(model, len(prompt) + len(answer), {"mode": "self_spec", **own}, rows)
    for _ in reader.read([*prompt, *answer], last_only=True):
        pass
    exact = reader.traits.first_is_exact
    # an exact kind's first draft reads the prompt; the others spend a forward on it, which gives one token
    start = 0 if exact else 1
    runs: dict[int, list[int]] = {}
    proven, num_looked = True, 0
    for place in range(start, len(answer)):
        runs[place], is_proven, looked = _draft_runs(reader, len(prompt) + place, answer[place:], budget)
        proven, num_looked = proven and is_proven, num_looked + looked
    return SpeculationLight(
        tokens=len(answer),
        real_forwards=real.stats.nfe_prefill + real.stats.nfe_decode,
        one_pass_forwards=start + _fewest_forwards(runs, start, len(answer), most_passes=1),
        ideal_forwards=start + _fewest_forwards(runs, start, len(answer), most_passes=MOST_DRAFT_PASSES),
        is_proven=proven,
        num_looked=num_looked,
    )


def _draft_runs(reader: BlockReader, prefix: int, rest: Sequence[int], budget: int) -> tuple[list[int], bool, int]:
    """Right drafts behind a prefix after 1, 2, ... forwards; whether that is proven; states looked at."""
    num_places = reader.num_places
    # what lies beyond the text is never drafted rightly: -1 is no token
    target = [*rest[:num_places], *[-1] * (num_places - len(rest))]
    block = _Block(reader, prefix, "draft", target)
    if not reader.traits.first_is_exact:
        lattice = Lattice(num_places, block.look, budget)
        runs, is_proven = longest_runs(lattice, MOST_DRAFT_PASSES)
        return runs, is_proven, lattice.num_looked

    def look(states: Sequence[int]) -> list[list[tuple[float, int]]]:
        # the first place is final after the first forward, whatever else is
        shown = block.look([s << 1 | (s > 0) for s in states])
        return [[(sure, place - 1) for sure, place in one if place] for one in shown]

    lattice = Lattice(num_places - 1, look, budget)
    runs, is_proven = longest_runs(lattice, MOST_DRAFT_PASSES)
    return [run + 1 for run in runs], is_proven, lattice.num_looked


def _fewest_forwards(runs: Mapping[int, Sequence[int]], start: int, end: int, *, most_passes: int) -> int:
    """The shortest way through the answer: p forwards of drafting and one of verifying lead `run + 1` tokens on; so does one causal
    forward by one token."""
    fewest = {start: 0}
    for place in range(start, end):
        if place not in fewest:
            continue
        steps = [(1, 1), *((p + 1, run + 1) for p, run in enumerate(runs[place][:most_passes], 1))]
        for cost, tokens in steps:
            reached = min(place + tokens, end)
            fewest[reached] = min(fewest.get(reached, fewest[place] + cost), fewest[place] + cost)
    return fewest[end]


def summarise_light(blocks: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows by block length and category ("all" first): tokens a forward, the prompt as the unit of chance.

    blocks: `BlockLight` records, answers: `SpeculationLight` records, each with `prompt`, `category`, `block_length` added.
    """
    rows = []
    both = [*blocks, *answers]
    for length in sorted({r["block_length"] for r in both}):
        here = [r for r in both if r["block_length"] == length]
        for category in ["all", *sorted({r["category"] for r in here})]:
            row = _row(_of(blocks, length, category), _of(answers, length, category))
            rows.append({"block_length": length, "category": category, **row})
    return rows


def _of(records: Sequence[Mapping[str, Any]], length: int, category: str) -> list[Mapping[str, Any]]:
    return [r for r in records if r["block_length"] == length and category in ("all", r["category"])]


def _row(blocks: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompts": len({r["prompt"] for r in (*blocks, *answers)}),
        "diffusion": None,
        "self_spec": None,
    }
    if blocks:
        row["diffusion"] = {
            "blocks": len(blocks),
            "ideal_per_pass": ratio(blocks, "tokens", "ideal_passes"),
            "real_per_pass": ratio(blocks, "real_tokens", "real_passes"),
            "ideal_per_forward": ratio(blocks, "tokens", "ideal_passes", "commits"),
            "real_per_forward": ratio(blocks, "real_tokens", "real_passes", "commits"),
            "at_most_per_pass": ratio(blocks, "tokens", "ideal_at_least"),
            "proven": sum(b["ideal_at_least"] == b["ideal_passes"] for b in blocks) / len(blocks),
            "real_equals_target": sum(b["is_real_target"] for b in blocks) / len(blocks),
        }
    if answers:
        row["self_spec"] = {
            "real_per_forward": ratio(answers, "tokens", "real_forwards"),
            "one_pass_per_forward": ratio(answers, "tokens", "one_pass_forwards"),
            "ideal_per_forward": ratio(answers, "tokens", "ideal_forwards"),
            "proven": sum(a["is_proven"] for a in answers) / len(answers),
        }
    return row


def ratio(records: Sequence[Mapping[str, Any]], above: str, *below: str) -> dict[str, float | None]:
    """A ratio of sums and its standard error over prompts (linearised), None for a single prompt."""
    by_prompt: dict[Any, tuple[float, float]] = {}
    for r in records:
        a, b = by_prompt.get(r["prompt"], (0.0, 0.0))
        by_prompt[r["prompt"]] = (a + r[above], b + sum(r[name] for name in below))
    pairs = list(by_prompt.values())
    total = sum(b for _, b in pairs)
    value = sum(a for a, _ in pairs) / total
    n = len(pairs)
    error = None
    if n > 1:
        error = (n / (n - 1) * sum((a - value * b) ** 2 for a, b in pairs)) ** 0.5 / total
    return {"value": value, "standard_error": error}


def _guess(reader: BlockReader, logits: Tensor) -> tuple[list[int], list[float]]:
    """The likeliest token of each row but the mask, and its probability as the decoders see it."""
    scores = logits.float().clone()
    probabilities = scores.softmax(dim=-1)
    scores[:, reader.traits.mask_token_id] = float("-inf")
    tokens = scores.argmax(dim=-1)
    sure = probabilities.gather(-1, tokens[:, None])[:, 0].to(logits.dtype)
    return tokens.tolist(), sure.tolist()


def _reader(model: Any, length: int, knobs: Mapping[str, Any], rows: int) -> BlockReader:
    block_length = knobs.get("block_length") or model.config.block_length
    return BlockReader(model, length + block_length, knobs, rows=rows)


def _check(knobs: Mapping[str, Any], budget: int) -> None:
    if knobs.get("temperature"):
        raise SettingError(
            f"The speed of light is that of greedy decoding; got temperature={knobs['temperature']}. Leave it out."
        )
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise SettingError(f"budget must be a whole number of 1 or more; got {budget!r}.")


def as_record(light: BlockLight | SpeculationLight) -> dict[str, Any]:
    """Plain values, for JSON."""
    return asdict(light)
