"""Law 2: every attention kernel agrees for each view. Law 3: block length 1 is causal, block = length is bidirectional."""

import pytest
import torch

from trimode.model.attention import KERNELS
from trimode.model.views import (
    Bidirectional,
    BlockCausal,
    BlockOverCausal,
    Causal,
    NoisyAndClean,
    VerifyAndPredraft,
    visible_matrix,
)

VIEWS = [
    Causal(),
    Bidirectional(),
    BlockOverCausal(5),
    BlockCausal(4),
    NoisyAndClean(length=6, block_length=2),
    VerifyAndPredraft(num_verified=3, num_masks=3),
]
T = 12


def heads(seed, num_rows, num_keys):
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(num_rows, 6, T, 16, generator=random)
    k = torch.randn(num_rows, 2, num_keys, 16, generator=random)
    v = torch.randn(num_rows, 2, num_keys, 16, generator=random)
    return q, k, v


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
@pytest.mark.parametrize("view", VIEWS, ids=lambda v: type(v).__name__)
def test_each_kernel_agrees_with_the_plain_formula(kernel, view):
    q, k, v = heads(0, 2, T)
    visible = visible_matrix(view, T)[None]
    expected = KERNELS["plain"](q, k, v, visible)
    torch.testing.assert_close(KERNELS[kernel](q, k, v, visible), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_each_kernel_agrees_where_everything_is_seen_and_over_a_prefix(kernel):
    q, k, v = heads(1, 1, T + 7)
    torch.testing.assert_close(KERNELS[kernel](q, k, v, None), KERNELS["plain"](q, k, v, None), atol=1e-5, rtol=1e-5)


def test_the_plain_formula_is_attention_one_query_at_a_time():
    q, k, v = heads(2, 1, T)
    visible = visible_matrix(Causal(), T)[None]
    out = KERNELS["plain"](q, k, v, visible)
    for h in (0, 2, 3, 5):
        for t in (0, 4, 11):
            weights = (k[0, h // 3, : t + 1] @ q[0, h, t] / 4.0).softmax(dim=0)
            torch.testing.assert_close(out[0, h, t], weights @ v[0, h // 3, : t + 1], atol=1e-5, rtol=1e-5)


def test_blocks_of_one_are_causal_and_one_block_is_bidirectional():
    assert torch.equal(visible_matrix(BlockCausal(1), T), visible_matrix(Causal(), T))
    assert torch.equal(visible_matrix(BlockCausal(T), T), visible_matrix(Bidirectional(), T))
    assert torch.equal(visible_matrix(BlockOverCausal(T), T), visible_matrix(Causal(), T))
    assert torch.equal(visible_matrix(BlockOverCausal(0), T), visible_matrix(Bidirectional(), T))


def test_the_training_view_is_the_rule_of_the_reference():
    n, B = 6, 2
    visible = visible_matrix(NoisyAndClean(length=n, block_length=B), 2 * n)
    for q in range(2 * n):
        for k in range(2 * n):
            bq, bk = (q % n) // B, (k % n) // B
            expected = (
                (q < n and k < n and bq == bk) or (q < n and k >= n and bq > bk) or (q >= n and k >= n and q >= k)
            )
            assert bool(visible[q, k]) == expected, (q, k)
    assert NoisyAndClean(length=n, block_length=B).offsets(2 * n) == [*range(n), *range(n)]


def test_the_quadratic_view_shows_each_group_what_it_would_see_after_its_acceptance():
    n, m = 3, 2
    view = VerifyAndPredraft(num_verified=n, num_masks=m)
    visible = visible_matrix(view, n + n * m)
    for g in range(n):
        for j in range(m):
            row = visible[n + g * m + j].tolist()
            assert row[:n] == [i <= g for i in range(n)]
            assert row[n:] == [(i // m) == g for i in range(n * m)]
    assert view.offsets(n + n * m) == [0, 1, 2, 1, 2, 2, 3, 3, 4]
    assert [view.predecessor(i) for i in range(n, n + n * m)] == [0, 3, 1, 5, 2, 7]
    assert view.num_causal(n + n * m) == n
