"""Law 6, for any checkpoint: the decoders give what the reference's loops give, here written out over whole forwards.

No cache, no batch, no early ends: each loop asks the model for the logits of everything so far and follows the reference's
pseudo-code line by line. Two things are left out on purpose, as in trimode: the mask token never wins a choice, and a thinking budget
puts no second `</think>` behind an anchor that is one.
"""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.worlds import random_lora, tiny_config, tiny_model
from trimode.model.config import RopeConfig

EOS, MASK, END_THINK, V = 2, 3, 7, 14
ROPE = RopeConfig(kind="yarn", factor=4.0, original_max_positions=8, llama4_beta=0.1)
LORA = random_lora(tiny_config(vocab_size=V, rope=ROPE), scale=6.0)
# few tokens, so that ends of text and `</think>` really occur; flat and peaked models, so that thresholds cut both ways
MODELS = {
    (seed, scale): tiny_model(seed, vocab_size=V, rope=ROPE, lora=LORA, weight_scale=scale)
    for seed in range(4)
    for scale in (0.2, 0.35, 0.6)
}


def causal(model, ids):
    """The choice after all of them, and the row that it came from."""
    row = model.logits(ids)[-1]
    row[MASK] = float("-inf")
    return int(row.argmax())


def block(model, prefix, x, adapter=False):
    """Choices at the places of x behind a causal prefix, and their probabilities in the plain softmax."""
    rows = model.logits([*prefix, *x], view="block", prefix=len(prefix), draft_lora=adapter)[len(prefix) :]
    p = rows.softmax(-1)
    rows[:, MASK] = float("-inf")
    best = rows.argmax(-1)
    return best.tolist(), p.gather(-1, best[:, None])[:, 0].tolist()


def ar_generate(model, prompt, max_new_tokens, eos, budget=None):
    gen = []
    for step in range(max_new_tokens):
        token = causal(model, [*prompt, *gen])
        if budget is not None and step >= budget and END_THINK not in gen:
            token = END_THINK
        gen.append(token)
        if token == eos:
            break
    return gen, len(gen)


def diffusion_generate(model, prompt, max_new_tokens, B, threshold, eos, budget=None):
    assert max_new_tokens % B == 0
    text, nfe = list(prompt), 0
    anchor = causal(model, text)
    for nb in range(max_new_tokens // B):
        x = [anchor, *[MASK] * (B - 1)]
        before = nb * B
        done = text[len(prompt) :]
        if budget is not None and before + B > budget and END_THINK not in (*done, anchor):
            x[max(0, budget - before)] = END_THINK
        base, extra = divmod(x.count(MASK), B)
        for i in range(B):
            masked = [j for j in range(B) if x[j] == MASK]
            if not masked:
                break
            nfe += 1
            tokens, confidence = block(model, text, x)
            by_confidence = sorted(masked, key=lambda j: -confidence[j])
            if threshold is None:
                commit = by_confidence[: base + (i < extra)]
            else:
                commit = by_confidence[:1] + [j for j in by_confidence[1:] if confidence[j] >= threshold]
            for j in commit:
                x[j] = tokens[j]
            if eos in x and MASK not in x[: x.index(eos)]:
                break
        text += x
        nfe += 1
        if eos in text[len(prompt) :]:
            gen = text[len(prompt) :]
            return gen[: gen.index(eos) + 1], nfe
        anchor = causal(model, text)
    return text[len(prompt) :], nfe


def linear_spec_generate(model, prompt, max_new_tokens, B, threshold, eos, adapter):
    s = causal(model, prompt)
    gen, nfe = [s], 1
    if s == eos:
        return gen, nfe
    while len(gen) < max_new_tokens:
        prefix = [*prompt, *gen[:-1]]
        x = [s, *[MASK] * (B - 1)]
        while MASK in x:
            tokens, confidence = block(model, prefix, x, adapter)
            nfe += 1
            masked = [j for j in range(B) if x[j] == MASK]
            sure = [j for j in masked if threshold == 0 or confidence[j] >= threshold]
            for j in sure or [max(masked, key=lambda j: confidence[j])]:
                x[j] = tokens[j]
        nfe += 1
        accepted = 0
        while True:
            token = causal(model, [*prefix, *x[: accepted + 1]])
            gen.append(token)
            if accepted == B - 1 or token != x[accepted + 1]:
                break
            accepted += 1
        s = gen[-1]
        if eos in gen:
            return gen[: gen.index(eos) + 1], nfe
    return gen, nfe


models = st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__)
prompts = st.lists(st.sampled_from([t for t in range(V) if t != MASK]), min_size=1, max_size=12)
thresholds = st.sampled_from([None, 0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0])
budgets = st.none() | st.integers(0, 12)


def thinking(budget):
    return {} if budget is None else {"max_thinking_tokens": budget, "end_think_token_id": END_THINK}


@settings(max_examples=60, deadline=None)
@given(models, prompts, st.integers(1, 12), st.booleans(), budgets)
def test_autoregression_is_the_references(model, prompt, max_new_tokens, ignore_eos, budget):
    expected, nfe = ar_generate(model, prompt, max_new_tokens, None if ignore_eos else EOS, budget)
    out = model.generate(prompt, mode="ar", max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, **thinking(budget))
    assert out.token_ids == expected
    assert out.stats.nfe_prefill + out.stats.nfe_decode == nfe


@settings(max_examples=150, deadline=None)
@given(models, prompts, st.integers(1, 3), st.integers(1, 9), thresholds, st.booleans(), budgets, st.integers(0, 8))
# a block of an anchor and `</think>`, with nothing to denoise
@example(MODELS[0, 0.35], [5, 6], 3, 2, 0.9, True, 1, 0)
def test_block_diffusion_is_the_references(
    model, prompt, num_blocks, block_length, threshold, ignore_eos, budget, fewer
):
    limit = num_blocks * block_length
    eos = None if ignore_eos else EOS
    expected, nfe = diffusion_generate(model, prompt, limit, block_length, threshold, eos, budget)
    knobs = {"unmasking": "fixed", "max_denoising_steps": block_length} if threshold is None else {}
    knobs |= {"threshold": threshold} if threshold is not None else {}
    knobs |= {"mode": "diffusion", "block_length": block_length, "ignore_eos": ignore_eos, **thinking(budget)}
    out = model.generate(prompt, max_new_tokens=limit, **knobs)
    assert out.token_ids == expected
    # the last block's commit is left out, and an anchor that ends the text costs nothing more
    assert out.stats.nfe_decode <= nfe - 1
    if EOS not in out.token_ids or ignore_eos:
        assert out.stats.nfe_decode == nfe - 1
    # the reference takes whole blocks only; a shorter limit is a prefix
    limit = max(1, limit - fewer)
    assert model.generate(prompt, max_new_tokens=limit, **knobs).token_ids == expected[:limit]


@settings(max_examples=100, deadline=None)
@given(
    models,
    prompts,
    st.integers(1, 14),
    st.integers(2, 8),
    st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    st.booleans(),
    st.booleans(),
)
def test_linear_self_speculation_is_the_references(
    model, prompt, max_new_tokens, block_length, threshold, ignore_eos, adapter
):
    eos = None if ignore_eos else EOS
    expected, nfe = linear_spec_generate(model, prompt, max_new_tokens, block_length, threshold, eos, adapter)
    knobs = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
    out = model.generate(
        prompt, mode="self_spec", block_length=block_length, threshold=threshold, draft_lora=adapter, **knobs
    )
    assert out.token_ids == expected[:max_new_tokens]
    # fewer where a single token is left: it is not drafted for
    ours = out.stats.nfe_prefill + out.stats.nfe_decode
    assert ours <= nfe
    if threshold == 0:
        assert nfe - ours <= 1


def test_the_worlds_are_wide_enough_to_tell_thresholds_apart_and_to_end_texts():
    """Else the laws above would hold for a decoder that knows no threshold and no end."""
    ended, steps = 0, set()
    for model in MODELS.values():
        for first in range(4, V):
            ended += EOS in model.generate([first], mode="diffusion", block_length=6, max_new_tokens=12).token_ids
        costs = [
            model.generate([5], mode="diffusion", block_length=8, threshold=t, max_new_tokens=16, ignore_eos=True)
            for t in (0.1, 0.5, 0.9)
        ]
        steps.add(tuple(out.stats.nfe_decode for out in costs))
    assert ended > 20
    assert len(steps) > 6
