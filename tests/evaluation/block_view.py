"""Kinds of checkpoints, and what their block view says by `model.logits` alone: the oracle of what reads blocks faster."""

from tests.worlds import MASK, random_lora, tiny_config, tiny_model

KINDS = {
    "its own place": {},
    "the next place": {"block_predicts": "next"},
    "gated adapter": {"known_tokens_are_causal": True, "block_predicts": "next", "adapter_acts_on": "masks"},
    "gated adapter, its own place": {"known_tokens_are_causal": True, "adapter_acts_on": "masks"},
}


def kind_of_model(kind, seed=0, **more):
    """A tiny model with an adapter."""
    changes = {**KINDS[kind], **more}
    return tiny_model(seed, lora=random_lora(tiny_config(**changes)), **changes)


def logprob(row, token):
    """log p of a token."""
    return float(row.log_softmax(-1)[token])


def block_row(model, final, canvas, place):
    """The logits at a masked place of a block behind final tokens, from `model.logits` alone."""
    config = model.config
    gated = config.adapter_acts_on == "masks"
    anchor = len(final) - 1
    if config.known_tokens_are_causal and config.block_predicts == "next":
        # what leads the canvas is final, and a mask at the end is left out
        lead = canvas.index(MASK)
        known = final + canvas[:lead]
        rest = canvas[lead:-1] if canvas[-1] == MASK else canvas[lead:]
        rows = model.logits(known + rest, view="block", prefix=len(known), draft_lora=gated and MASK in rest)
        return rows[anchor + place]
    prefix = anchor + 1 if config.known_tokens_are_causal else anchor
    rows = model.logits(final + canvas, view="block", prefix=prefix, draft_lora=gated)
    return rows[anchor + place + (config.block_predicts == "self")]
