"""Every attention path agrees with the reference, and the reference with the definition."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consa import Allocation
from consa.attention import masks, portable
from consa.attention.ops import full_attention, hybrid_attention, sliding_attention
from consa.attention.reference import reference_attention
from consa.attention.rows import Rows
from consa.model.plan import Plan
from tests.compare import Elements, assert_close

# The sentence itself.


def sees(query: int, key: int, window: int, num_sink_tokens: int) -> bool:
    """Position i attends to j when `i - window < j <= i`, or when `j < num_sink_tokens`; never to the future."""
    return (query - window < key <= query or key < num_sink_tokens) and key <= query


@pytest.mark.parametrize("num_sink_tokens", [0, 1, 3, 9, 12])
@pytest.mark.parametrize("window", [1, 2, 5, 9, 20])
def test_masks_say_what_the_sentence_says(window: int, num_sink_tokens: int):
    wanted = [[sees(i, j, window, num_sink_tokens) for j in range(9)] for i in range(9)]
    for position in (np.arange(9), torch.arange(9)):
        query, key = position[:, None], position[None, :]
        assert masks.sliding(query, key, window, num_sink_tokens).tolist() == wanted
        assert masks.causal(query, key).tolist() == [[j <= i for j in range(9)] for i in range(9)]
        near = masks.in_window(query, key, window)
        far = masks.beyond_window_sink(query, key, window, num_sink_tokens)
        assert not (near & far).any(), "a sink in the window must count once"
    for i in range(9):
        assert [bool(masks.sliding(i, j, window, num_sink_tokens)) for j in range(9)] == wanted[i]


def by_hand(q, k, v, z, window, num_sink_tokens, scaling, softcap):
    """Attention in float64, one query at a time, of one sequence."""
    out = torch.zeros_like(q, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    offset = k.shape[1] - q.shape[1]
    for head in range(q.shape[0]):
        row = head // (q.shape[0] // k.shape[0])
        for i in range(q.shape[1]):
            for part, share in ((False, z[row]), (True, 1 - z[row])):
                seen = [
                    j
                    for j in range(k.shape[1])
                    if (sees(offset + i, j, window, num_sink_tokens) if part else j <= offset + i)
                ]
                scores = k[row, seen] @ q[head, i] * scaling
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out[head, i] += share * (scores.softmax(0) @ v[row, seen])
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("window", "num_sink_tokens"), [(1, 0), (3, 2), (4, 0), (20, 1), (2, 20)])
def test_reference_is_attention_by_hand(window: int, num_sink_tokens: int, softcap: float | None):
    q, k, v, _ = inputs(2, 2, 3, queries=7, keys=9, head_dim=4, seed=1)
    first = [0, 4]  # the second sequence starts with padding, two of its queries among it
    z = torch.tensor([[0.25, 1.0], [0.0, 0.5]], dtype=torch.float64)
    out = reference_attention(
        q,
        k,
        v,
        z,
        window=window,
        num_sink_tokens=num_sink_tokens,
        scaling=0.5,
        softcap=softcap,
        first=torch.tensor(first),
    )
    options = (window, num_sink_tokens, 0.5, softcap)
    assert_close(out[0], by_hand(q[0], k[0], v[0], z[0].tolist(), *options))
    assert not out[1, :, :2].any()
    assert_close(out[1, :, 2:], by_hand(q[1, :, 2:], k[1, :, 4:], v[1, :, 4:], z[1].tolist(), *options))


# Every path against the reference, forward and backward.


def inputs(batch: int, heads: int, group: int, *, queries: int, keys: int, head_dim: int, seed: int):
    """q, k, v and the gradient of the output, all leaves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, upstream = (draw(batch, heads * group, queries, head_dim) for _ in range(2))
    k, v = (draw(batch, heads, keys, head_dim) for _ in range(2))
    return *(x.requires_grad_() for x in (q, k, v)), upstream


class Case(NamedTuple):
    batch: int
    heads: int
    group: int
    queries: int
    keys: int
    head_dim: int
    window: int
    num_sink_tokens: int
    softcap: float | None
    z: Tensor  # (batch, heads)
    sizes: dict[str, int]
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        return {"scaling": 0.7 * self.head_dim**-0.5, "softcap": self.softcap}

    @property
    def windowed(self) -> dict[str, Any]:
        return self.options | {"window": self.window, "num_sink_tokens": self.num_sink_tokens}

    def draw(self) -> tuple[Tensor, ...]:
        shape = {"queries": self.queries, "keys": self.keys, "head_dim": self.head_dim}
        return inputs(self.batch, self.heads, self.group, **shape, seed=self.seed)


@st.composite
def cases(draw: Any) -> Case:
    batch, heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    queries = draw(st.one_of(st.integers(1, 9), st.integers(10, 80)))
    keys = queries + draw(st.one_of(st.just(0), st.integers(1, 40)))
    reach = st.one_of(st.integers(0, 12), st.integers(0, keys + 3))
    gate = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.05, 0.95))
    z = torch.tensor([[draw(gate) for _ in range(heads)] for _ in range(batch)])
    sizes = {"QUERY_BLOCK": draw(st.sampled_from([5, 16, 512])), "MIN_SLIDING_BLOCK": draw(st.integers(1, 64))}
    return Case(
        batch=batch,
        heads=heads,
        group=group,
        queries=queries,
        keys=keys,
        head_dim=draw(st.sampled_from([1, 4, 8])),
        window=max(1, draw(reach)),
        num_sink_tokens=draw(reach),
        softcap=draw(st.sampled_from([None, None, 1.5])),
        z=z,
        sizes=sizes,
        seed=draw(st.integers(0, 2**31)),
    )


def compare(case: Case, attention: Any, z: Tensor, *, gates: bool = False, tolerance: float = 1e-5) -> None:
    """Compare output and all gradients of `attention(q, k, v, gates)` with the reference in float64."""
    q, k, v, upstream = case.draw()
    mine = z.clone().requires_grad_()
    with mock.patch.multiple(portable, **case.sizes) if case.sizes else nullcontext():
        out = attention(q, k, v, mine)
        out.backward(upstream)
    q2, k2, v2, z2 = (x.detach().double().requires_grad_() for x in (q, k, v, z))
    wanted = reference_attention(q2, k2, v2, z2, **case.windowed)
    wanted.backward(upstream.double())
    assert_close(out, wanted, tolerance, "output")
    for name, x, x2 in (("dq", q, q2), ("dk", k, k2), ("dv", v, v2)):
        # Where a softmax has one key, dq and dk cancel out to zero.
        assert_close(x.grad, x2.grad, 2 * tolerance, name, floor=0.1)
    if gates:
        mixed = (z > 0) & (z < 1)  # exactly 0 or 1: the clip passes nothing
        assert_close(mine.grad, torch.where(mixed, z2.grad, 0), 2 * tolerance, "dz", floor=1.0)
        assert mine.grad is None or not mine.grad[~mixed].any()


@given(cases())
@settings(max_examples=60)
def test_full_attention(case: Case):
    compare(case, lambda q, k, v, z: full_attention(q, k, v, **case.options), torch.ones_like(case.z))


@given(cases())
@settings(max_examples=100)
def test_sliding_attention(case: Case):
    compare(case, lambda q, k, v, z: sliding_attention(q, k, v, **case.windowed), torch.zeros_like(case.z))


@given(cases())
@settings(max_examples=120)
def test_hybrid_attention(case: Case):
    def attention(q, k, v, z):
        return hybrid_attention(q, k, v, Rows.sort(z.detach(), z), **case.windowed)

    compare(case, attention, case.z, gates=True)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("queries", "keys", "window", "num_sink_tokens"),
    [(700, 700, 600, 4), (523, 690, 63, 0), (129, 600, 128, 4), (515, 515, 1, 1), (1, 900, 100, 5)],
)
def test_blocks_as_large_as_they_come(queries, keys, window, num_sink_tokens, softcap):
    sizes = {"QUERY_BLOCK": portable.QUERY_BLOCK, "MIN_SLIDING_BLOCK": portable.MIN_SLIDING_BLOCK}
    z = torch.tensor([[0.3, 1.0, 0.0]])
    case = Case(1, 3, 2, queries, keys, 4, window, num_sink_tokens, softcap, z, sizes, 3)

    def attention(q, k, v, z):
        return hybrid_attention(q, k, v, Rows.sort(z.detach(), z), **case.windowed)

    compare(case, attention, z, gates=True)


@pytest.mark.parametrize("hidden", [-1, 0, 1, 2])
@pytest.mark.parametrize(("window", "num_sink_tokens"), [(1, 0), (5, 0), (1, 6), (4, 3)])
def test_where_the_first_key_goes_out_of_reach(window: int, num_sink_tokens: int, hidden: int):
    keys = max(1, window + num_sink_tokens + hidden)
    case = Case(1, 2, 1, keys, keys, 4, window, num_sink_tokens, None, torch.zeros(1, 2), {}, 0)
    with mock.patch.object(portable, "MIN_SLIDING_BLOCK", 2):
        compare(case, lambda q, k, v, z: sliding_attention(q, k, v, **case.windowed), case.z)


@st.composite
def padded(draw: Any) -> tuple[Case, Tensor]:
    case = draw(cases())
    first = draw(st.lists(st.integers(0, case.keys), min_size=case.batch, max_size=case.batch))
    return case, torch.tensor(first)


@given(padded(), st.booleans())
@settings(max_examples=100)
def test_a_layer_with_left_padding_and_gates_per_sequence(padded: tuple[Case, Tensor], decided: bool):
    """The function that a model's layer calls, also for rows of padding alone. Padding is NaN and must not spread."""
    case, first = padded
    z = (case.z[:1] >= 0.5).float().expand_as(case.z) if decided else case.z
    q, k, v, upstream = case.draw()
    full = np.zeros((2, case.heads), dtype=bool)
    full[1] = z[0].numpy() == 1
    plan = Plan(Allocation(full_attention=full, window=case.window, num_sink_tokens=case.num_sink_tokens))
    padding = (torch.arange(case.keys) < first[:, None])[:, None, :, None]
    ahead = padding[:, :, case.keys - case.queries :]
    inputs = [x.detach().masked_fill(hidden, torch.nan).requires_grad_()
              for x, hidden in ((q, ahead), (k, padding), (v, padding))]  # fmt: skip
    arguments = (1, *inputs, first, case.options["scaling"], case.softcap)
    leaf = None
    if decided:
        out = plan.attend(*arguments)
        if out.requires_grad:  # not so when every query is padding
            out.backward(upstream)
    else:
        with plan.gated(torch.stack([1 - z, z]), torch.device("cpu")) as leaf:
            out = plan.attend(*arguments)
            if out.requires_grad:
                out.backward(upstream)
    wanted_inputs = [x.detach().double().requires_grad_() for x in (q, k, v, z)]
    wanted = reference_attention(*wanted_inputs, **case.windowed, first=first)
    wanted.backward(upstream.double())
    assert_close(out, wanted, floor=0.1)
    for name, x, x2 in zip("qkv", inputs, wanted_inputs, strict=False):
        assert_close(x.grad, x2.grad, 2e-5, f"d{name}", floor=0.1)
    if leaf is not None:
        mixed = (z > 0) & (z < 1)
        wanted_z = torch.where(mixed, wanted_inputs[3].grad, 0)
        assert_close(leaf.grad if leaf.grad is None else leaf.grad[1], wanted_z, 2e-5, "dz", floor=1.0)
        assert leaf.grad is None or not leaf.grad[0].any(), "another layer's gates"


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 9), (1, 6)])
def test_gradients_by_finite_differences(queries: int, keys: int):
    q, k, v, _ = inputs(1, 2, 2, queries=queries, keys=keys, head_dim=2, seed=0)
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    sizes = {"QUERY_BLOCK": 3, "MIN_SLIDING_BLOCK": 2}
    with mock.patch.multiple(portable, **sizes):
        assert torch.autograd.gradcheck(lambda *x: full_attention(*x, scaling=0.7), doubles)
        options = {"window": 3, "num_sink_tokens": 1, "scaling": 0.7}
        assert torch.autograd.gradcheck(lambda *x: sliding_attention(*x, **options), doubles)


def test_gates_at_exactly_0_or_1_have_no_gradient_and_take_none():
    q, k, v, upstream = inputs(1, 3, 2, queries=20, keys=20, head_dim=4, seed=0)
    options = {"window": 3, "num_sink_tokens": 1, "scaling": 0.5}
    for values in ([0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]):
        z = torch.tensor([values], requires_grad=True)
        hybrid_attention(q, k, v, Rows.sort(z.detach(), z), **options).backward(upstream)
        assert z.grad is None or not z.grad.any()
    z = torch.tensor([[0.0, 0.3, 1.0]], requires_grad=True)
    hybrid_attention(q, k, v, Rows.sort(z.detach(), z), **options).backward(upstream)
    assert z.grad is not None
    assert (z.grad != 0).tolist() == [[False, True, False]]
    full = full_attention(q, k, v, scaling=0.5)
    near = sliding_attention(q, k, v, **options)
    wanted = ((full - near) * upstream)[0, 2:4].sum()  # the mix is linear in z
    assert_close(z.grad[0, 1], wanted)


# What it costs.


@pytest.mark.parametrize(
    ("z", "full_rows", "sliding_rows"),
    [
        ([[1.0, 1.0], [1.0, 1.0]], 2, None),  # whole batches go as they are
        ([[0.0, 0.0], [0.0, 0.0]], None, 2),
        ([[0.0, 1.0], [1.0, 1.0]], 3, 1),
        ([[0.4, 0.0], [0.0, 0.0]], 1, 4),
        ([[0.4, 1.0], [0.7, 1.0]], 4, 2),
        ([[0.4, 0.3], [0.7, 0.1]], 4, 4),
    ],
)
def test_a_branch_computes_only_the_rows_that_need_it(z, full_rows, sliding_rows):
    q, k, v, _ = inputs(2, 2, 2, queries=9, keys=9, head_dim=2, seed=0)
    gates = torch.tensor(z)
    with (
        mock.patch.object(portable, "full_attention", wraps=portable.full_attention) as full,
        mock.patch.object(portable, "sliding_attention", wraps=portable.sliding_attention) as sliding,
    ):
        hybrid_attention(q, k, v, Rows.sort(gates, gates), window=2, num_sink_tokens=1, scaling=1.0)
    for branch, rows in ((full, full_rows), (sliding, sliding_rows)):
        assert [len(call.args[0]) for call in branch.call_args_list] == ([] if rows is None else [rows])


def elements_of(attention: Any, queries: int, keys: int, *, backward: bool) -> Elements:
    q, k, v, upstream = inputs(1, 2, 2, queries=queries, keys=keys, head_dim=8, seed=0)
    portable._sliding_mask.cache_clear()
    with Elements() as seen:
        out = attention(*(x if backward else x.detach() for x in (q, k, v)))
        if backward:
            out.backward(upstream)
    return seen


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sliding_attention_never_holds_queries_x_keys(softcap: float | None):
    def attention(q, k, v):
        return sliding_attention(q, k, v, window=64, num_sink_tokens=4, scaling=0.3, softcap=softcap)

    for queries in (4096, 2048):
        seen = elements_of(attention, queries, 4096, backward=True)
        assert 0 < seen.largest < queries * 4096 / 4
    once, twice = (elements_of(attention, size, size, backward=True) for size in (2048, 4096))
    assert twice.total <= 2.1 * once.total, "work must grow with the length, not with its square"
    assert twice.largest <= 2.1 * once.largest
    short, long = (elements_of(attention, 256, size, backward=False) for size in (1024, 4096))
    assert long.total <= 1.05 * short.total, "keys out of reach must cost nothing"


@pytest.mark.parametrize(("softcap", "queries"), [(None, 2048), (5.0, 4096)])
def test_full_attention_never_holds_queries_x_keys(softcap: float | None, queries: int):
    def attention(q, k, v):
        return full_attention(q, k, v, scaling=0.3, softcap=softcap)

    assert 0 < elements_of(attention, queries, 4096, backward=True).largest <= 4 * portable.QUERY_BLOCK * 4096


def test_hybrid_attention_never_holds_queries_x_keys():
    z = torch.tensor([[0.5, 0.0]])

    def attention(q, k, v):
        return hybrid_attention(q, k, v, Rows.sort(z, z), window=64, num_sink_tokens=4, scaling=0.3)

    assert 0 < elements_of(attention, 4096, 4096, backward=True).largest < 4096**2 / 8
