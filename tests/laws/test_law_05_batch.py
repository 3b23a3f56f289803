"""Law 5, the part that the reference loop owns: a mixed batch equals each request alone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import random_lora, tiny_config, tiny_model
from trimode.engine.request import Request

MODEL = tiny_model(1, lora=random_lora(tiny_config()))

KNOBS = [
    {"mode": "ar"},
    {"mode": "ar", "temperature": 0.9, "top_p": 0.9},
    {"mode": "diffusion", "threshold": 0.3},
    {"mode": "diffusion", "unmasking": "random", "max_denoising_steps": 2, "block_length": 6},
    {"mode": "diffusion", "temperature": 0.7, "editing_threshold": 0.2, "max_post_steps": 2},
    {"mode": "self_spec", "block_length": 5},
    {"mode": "self_spec", "temperature": 1.0},
    {"mode": "self_spec", "self_spec_kind": "quadratic", "block_length": 3},
    {"mode": "self_spec", "self_spec_kind": "quadratic", "temperature": 0.8, "top_k": 5},
    {"mode": "self_spec", "self_spec_kind": "lookup"},
    {"mode": "self_spec", "self_spec_kind": "lookup", "temperature": 0.8, "block_length": 3},
]

requests = st.lists(
    st.builds(
        lambda prompt, knobs, seed, n: (prompt, {**knobs, "seed": seed, "max_new_tokens": n}),
        st.one_of(
            st.lists(st.integers(0, 39), min_size=1, max_size=9), st.lists(st.integers(8, 10), min_size=4, max_size=12)
        ),
        st.sampled_from(KNOBS),
        st.integers(0, 1000),
        st.integers(1, 30),
    ),
    min_size=2,
    max_size=6,
)


REPEATING = tiny_model(2, weight_scale=0.06)
"""Its answers run in circles, so that texts suggest something."""


@settings(max_examples=40, deadline=None)
@given(requests, st.sampled_from([MODEL, REPEATING]))
def test_a_mixed_batch_equals_each_request_alone(batch, model):
    together = model.generate([Request(prompt, **knobs) for prompt, knobs in batch])
    for (prompt, knobs), out in zip(batch, together, strict=True):
        alone = model.generate(prompt, **knobs)
        assert out.token_ids == alone.token_ids
        assert out.finish_reason == alone.finish_reason
        assert (out.stats.nfe_prefill, out.stats.nfe_decode) == (alone.stats.nfe_prefill, alone.stats.nfe_decode)


def test_a_seed_gives_the_same_sample_again_and_another_seed_another():
    def sample(seed):
        return MODEL.generate(
            [5, 6], mode="ar", temperature=2.0, seed=seed, max_new_tokens=20, ignore_eos=True
        ).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
