"""Common prefixes of prompts, against a prefix tree made of dictionaries."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mel_fast.rollout.prefixes import PrefixSet, as_bytes, common_tokens, distinct_tokens, shareable_tokens

# Few tokens, so that prefixes meet; large ones, whose bytes would be in disorder the other way round.
TOKENS = st.sampled_from([0, 1, 255, 256, 151_935])
PROMPT = st.lists(TOKENS, min_size=1, max_size=6)
PROMPTS = st.lists(PROMPT, max_size=12)


def nodes(prompts: list[list[int]]) -> int:
    root: dict[int, Any] = {}
    count = 0
    for prompt in prompts:
        node = root
        for token in prompt:
            count += token not in node
            node = node.setdefault(token, {})
    return count


def common(a: list[int], b: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def encoded(prompts: list[list[int]]) -> list[bytes]:
    return [as_bytes(prompt) for prompt in prompts]


@given(PROMPT, PROMPT)
def test_the_common_prefix_is_counted_in_tokens(a: list[int], b: list[int]) -> None:
    assert common_tokens(as_bytes(a), as_bytes(b)) == common(a, b)


@given(PROMPTS)
def test_distinct_tokens_are_the_nodes_of_the_prefix_tree(prompts: list[list[int]]) -> None:
    assert distinct_tokens(encoded(prompts)) == nodes(prompts)


@given(PROMPTS)
def test_shareable_is_all_but_the_nodes_and_the_last_token_of_each_repetition(prompts: list[list[int]]) -> None:
    repeated = len(prompts) - len({tuple(prompt) for prompt in prompts})
    assert shareable_tokens(encoded(prompts)) == sum(map(len, prompts)) - nodes(prompts) - repeated


@given(PROMPTS, st.randoms())
def test_no_order_of_sending_one_by_one_shares_more(prompts: list[list[int]], random: Any) -> None:
    random.shuffle(prompts)
    shared = [
        min(max((common(prompt, earlier) for earlier in prompts[:place]), default=0), len(prompt) - 1)
        for place, prompt in enumerate(prompts)
    ]
    assert sum(shared) <= shareable_tokens(encoded(prompts))


@given(PROMPTS, PROMPT)
def test_the_nearest_prompt_shares_most(prompts: list[list[int]], new: list[int]) -> None:
    held = PrefixSet()
    for prompt in encoded(prompts):
        held.add(prompt)
    tokens, nearest = held.nearest(as_bytes(new))
    assert tokens == max((common(new, prompt) for prompt in prompts), default=0)
    if nearest is None:
        assert not prompts
    else:
        assert nearest in encoded(prompts)
        assert common_tokens(nearest, as_bytes(new)) == tokens


@given(PROMPTS, PROMPT, st.integers(0, 6))
def test_forgetting_leaves_just_what_shares_no_more(prompts: list[list[int]], new: list[int], beyond: int) -> None:
    held, rest = PrefixSet(), PrefixSet()
    for prompt in prompts:
        held.add(as_bytes(prompt))
        if common(prompt, new) <= beyond:
            rest.add(as_bytes(prompt))
    held.forget(as_bytes(new), beyond)
    for prompt in [*prompts, new]:
        assert held.nearest(as_bytes(prompt)) == rest.nearest(as_bytes(prompt))


@given(PROMPTS, PROMPT)
def test_a_prompt_that_was_added_twice_is_held_once(prompts: list[list[int]], twice: list[int]) -> None:
    held = PrefixSet()
    for prompt in [*prompts, twice, twice]:
        held.add(as_bytes(prompt))
    held.remove(as_bytes(twice))
    others = [common(twice, prompt) for prompt in prompts if prompt != twice]
    assert held.nearest(as_bytes(twice))[0] == max(others, default=0)
