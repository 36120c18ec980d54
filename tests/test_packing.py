"""Packing: nothing is lost, doubled or mixed up, ranks get equal shares, and the budget holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mel_kernels import Stream
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from mel_fast.packing import KINDS, Cost, PackedBatch, balance_metrics, collate, loss_rows, pack
from mel_fast.types import Sample

TOKENS = Cost(token=1.0)
COST = Cost(token=1.0, square=0.001, row=0.25)
QWEN3_4B = Cost.of(
    Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
)


def sample(
    ids: Sequence[int], context: int, tag: float = 1.0, kind: str = "policy", holes: Sequence[int] = ()
) -> Sample:
    """Loss on everything after `context`, but for `holes`; the values of each token are its own."""
    length = len(ids)
    place = np.arange(length, dtype=np.float32)
    stream = np.full(length, Stream.POLICY if kind == "policy" else Stream.NLL, dtype=np.int8)
    stream[:context] = Stream.NONE
    stream[list(holes)] = Stream.NONE
    values = [np.asarray(tag + place / 1024 + base, dtype=np.float32) for base in (0, 100, 200)]
    return Sample(np.asarray(ids, dtype=np.int64), stream, *values, kind=kind, temperature=tag)


Row = tuple[tuple[int, ...], int, int, float, float, float, float, int]


def rows_of_sample(s: Sample) -> list[Row]:
    """What the loss needs of each token: what precedes it in its own sequence, the token, and its values."""
    return [
        (
            tuple(s.ids[:t].tolist()),
            int(s.ids[t]),
            int(s.stream[t]),
            float(s.advantage[t]),
            float(s.weight[t]),
            float(s.rollout_logp[t]),
            float(np.float32(s.temperature)),
            KINDS.index(s.kind),
        )
        for t in range(len(s.ids))
        if s.stream[t] != Stream.NONE
    ]


def rows_of_batch(b: PackedBatch) -> list[Row]:
    rows: list[Row] = []
    ids, starts = b.input_ids.tolist(), b.cu_seqlens.tolist()
    for r, row in enumerate(b.rows.tolist()):
        start = max(s for s in starts if s <= row)
        rows.append(
            (
                tuple(ids[start : row + 1]),
                int(b.target[r]),
                int(b.stream[r]),
                float(b.advantage[r]),
                float(b.weight[r]),
                float(b.rollout_logp[r]),
                float(b.temperature[r]),
                int(b.kind[r]),
            )
        )
    return rows


def all_rows(shares: Sequence[Sequence[PackedBatch]]) -> Counter[Row]:
    return Counter(row for share in shares for b in share for row in rows_of_batch(b))


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    made: list[Sample] = []
    for tag in range(draw(st.integers(1, 12))):
        ids = draw(st.lists(st.integers(0, 9), min_size=2, max_size=30))
        context = draw(st.integers(1, len(ids)))
        holes = draw(st.lists(st.integers(0, len(ids) - 1), max_size=3))
        made.append(sample(ids, context, 1.0 + tag, draw(st.sampled_from(KINDS)), holes))
    return made


@given(samples(), st.integers(2, 64), st.integers(1, 5))
def test_every_loss_token_appears_once_with_its_own_values(made: list[Sample], budget: int, ranks: int) -> None:
    shares = pack(made, budget, ranks, COST)
    assert all_rows(shares) == Counter(row for s in made for row in rows_of_sample(s))


@given(samples(), st.integers(2, 64), st.integers(1, 5))
def test_ranks_get_equally_many_micro_batches_within_the_budget(made: list[Sample], budget: int, ranks: int) -> None:
    shares = pack(made, budget, ranks, COST)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    for batch in (b for share in shares for b in share):
        sequences = len(batch.cu_seqlens) - 1
        assert batch.tokens <= budget or sequences == 1
        assert batch.tokens >= 2


@given(samples(), st.integers(2, 64), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_order_of_samples_decides_nothing(made: list[Sample], budget: int, ranks: int, random: object) -> None:
    shuffled = list(made)
    random.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    one, other = (pack(order, budget, ranks, COST) for order in (made, shuffled))
    assert all_rows(one) == all_rows(other)
    sizes = [
        [Counter(sorted(np.diff(b.cu_seqlens).tolist()).__str__() for b in share) for share in x] for x in (one, other)
    ]
    assert sizes[0] == sizes[1]


@given(samples())
def test_positions_and_borders_start_anew_in_each_sequence(made: list[Sample]) -> None:
    batch = collate(made)
    lengths = [len(s.ids) for s in made]
    assert np.diff(batch.cu_seqlens.numpy()).tolist() == lengths
    assert batch.position_ids.tolist() == [i for length in lengths for i in range(length)]
    assert batch.max_seqlen == max(lengths)
    assert batch.tokens == sum(lengths)


def test_a_sample_longer_than_the_budget_stays_and_is_alone() -> None:
    made = [sample(range(50), 1), sample(range(4), 1, 2.0), sample(range(5), 1, 3.0)]
    (share,) = pack(made, 10, 1, TOKENS)
    assert sorted(b.tokens for b in share) == [9, 50]
    assert all_rows([share]) == Counter(row for s in made for row in rows_of_sample(s))


def test_short_samples_fill_micro_batches_instead_of_one_each() -> None:
    (share,) = pack([sample(range(8), 1) for _ in range(100)], 80, 1, TOKENS)
    assert len(share) == 10


def workload(seed: int, responses: int = 700, memos: int = 100) -> list[Sample]:
    """Log-normal responses up to 8k after short prompts, and memos of 500 tokens after contexts of two responses."""
    random = np.random.default_rng(seed)

    def lengths(count: int) -> np.ndarray:
        return random.lognormal(np.log(1000), 0.8, count).clip(8, 8192).astype(int)

    prompts, made = random.integers(50, 400, responses + memos), []
    shapes = [(int(p), int(p + n)) for p, n in zip(prompts, lengths(responses), strict=False)]
    pairs = zip(prompts[responses:], lengths(memos), lengths(memos), strict=True)
    shapes += [(int(p + 300 + a + b), int(p + 800 + a + b)) for p, a, b in pairs]
    for context, length in shapes:
        made.append(sample(range(length), context))
    return made


def in_order(made: Sequence[Sample], budget: int, ranks: int) -> list[list[PackedBatch]]:
    """The plain way: as they come, a new micro-batch when the next one does not fit, dealt out in turn."""
    bins: list[list[Sample]] = [[]]
    for each in made:
        if sum(len(s.ids) for s in bins[-1]) + len(each.ids) > budget:
            bins.append([])
        bins[-1].append(each)
    bins += [[sample(range(2), 2)] for _ in range(-len(bins) % ranks)]
    return [[collate(members) for members in bins[rank::ranks]] for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 8, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_hardly_wait_for_each_other(ranks: int, seed: int) -> None:
    made, budget = workload(seed), 32768

    def waste(plan: list[list[PackedBatch]]) -> float:
        return balance_metrics(plan, budget, QWEN3_4B)["balance/flops_max_over_mean"] - 1

    ours = pack(made, budget, ranks, QWEN3_4B)
    assert waste(ours) < 0.005
    assert waste(ours) < waste(pack(made, budget, ranks, TOKENS)) / 5  # balanced by tokens alone
    assert waste(ours) < waste(in_order(made, budget, ranks)) / 20
    assert balance_metrics(ours, budget, QWEN3_4B)["balance/budget_fill"] > 0.85


def test_a_small_batch_of_few_groups_is_balanced_too() -> None:
    plans = [pack(workload(seed, responses=64, memos=10), 32768, 8, QWEN3_4B) for seed in range(3)]
    assert all(balance_metrics(plan, 32768, QWEN3_4B)["balance/flops_max_over_mean"] < 1.03 for plan in plans)


def test_micro_batches_of_like_cost_run_side_by_side() -> None:
    """Ranks meet at every micro-batch: 100 beside 80, then 60 beside 40, take 160; 100 beside 40 would make it 180."""
    shares = pack([sample(range(n), 1) for n in (40, 100, 60, 80)], 30, 2, TOKENS)
    assert [[b.tokens for b in share] for share in shares] == [[100, 60], [80, 40]]
    metrics = balance_metrics(shares, 100, TOKENS)
    assert metrics["balance/flops_max_over_mean"] == pytest.approx(160 / 140)
    assert metrics["balance/budget_fill"] == pytest.approx(280 / 400)
    assert metrics["balance/padding_share"] == 0.0
    assert metrics["balance/micro_batches"] == 2


def test_what_only_keeps_a_rank_in_step_is_reported() -> None:
    metrics = balance_metrics(pack([sample(range(8), 2)], 100, 3, TOKENS), 100, TOKENS)
    assert metrics["balance/padding_share"] == pytest.approx(4 / 12)
    assert metrics["balance/budget_fill"] == pytest.approx(8 / 300)
    assert metrics["balance/flops_max_over_mean"] == pytest.approx(8 / 4)


def test_sequences_are_charged_for_attention_and_for_rows_with_loss() -> None:
    made = [sample(range(10), 4), sample(range(7), 1, 2.0)]
    cost = Cost(token=1.0, square=0.5, row=10.0)
    assert [loss_rows(s) for s in made] == [6, 6]
    assert cost.of_sequence(10, 6) == 10 + 50 + 60
    assert cost.of_batch(collate(made)) == cost.of_sequence(10, 6) + cost.of_sequence(7, 6)


def test_costs_are_the_flops_of_a_forward_pass() -> None:
    """Grouped-query attention, and heads that are together wider than the model."""
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
    )
    config._attn_implementation = "eager"  # its products are counted one by one
    model, length = Qwen3ForCausalLM(config), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    cost = Cost.of(config)
    # The model computes all pairs of positions; half of them are not causal, and need not be.
    assert counter.get_total_flops() == cost.of_sequence(length, length) + cost.square * length**2


def test_a_rank_without_samples_gets_a_micro_batch_without_loss() -> None:
    shares = pack([sample(range(5), 2)], 100, 4, TOKENS)
    assert [len(share) for share in shares] == [1] * 4
    idle = [share[0] for share in shares if not len(share[0].rows)]
    assert len(idle) == 3
    assert all(b.tokens == 2 and len(b.target) == len(b.weight) == 0 for b in idle)


def test_tokens_without_weight_never_reach_the_head() -> None:
    made = sample(range(6), 2)
    made.weight[3] = 0
    assert collate([made]).rows.tolist() == [1, 3, 4]


def test_loss_on_a_first_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="first token"):
        collate([sample(range(4), 1), sample(range(4), 0)])
