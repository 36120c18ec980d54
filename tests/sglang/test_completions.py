"""A completion from a server is the policy's own sample, with all that the trainer needs to know of it."""

from __future__ import annotations

import pytest
import torch
from sglang_support import CONTEXT, STOP, Attach, assert_sampled_by, generate, policy, prompts, requests
from transformers import PreTrainedTokenizerBase

from mel_fast.errors import InputError
from mel_fast.rollout.local import LocalEngine
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.types import Request


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_models_at_the_sampling_temperature(
    engine: SGLangEngine, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> None:
    asked = requests(6, temperature=temperature)
    assert_sampled_by(policy(tokenizer, 0), asked, generate(engine, asked)[0])


def test_greedy_answers_are_those_of_the_local_engine(engine: SGLangEngine, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = requests(6, limit=40, temperature=0.0)
    local = LocalEngine(policy(tokenizer, 0), [STOP], max_batch=8)
    expected = generate(local, asked)[0]
    assert [c.output_ids for c in generate(engine, asked)[0]] == [c.output_ids for c in expected]


def test_an_answer_ends_at_a_stop_token_which_it_contains_or_at_its_own_limit(
    attach: Attach, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = policy(tokenizer, 0)
    with torch.no_grad():  # the stop token becomes likely
        model.model.embed_tokens.weight[STOP] *= 3
    engine = attach()
    engine.load(model.named_parameters(), version=1)
    asked = [Request(r.prompt_ids, r.seed, 4 + 5 * (i % 6)) for i, r in enumerate(requests(24))]
    done = generate(engine, asked)[0]
    for request, completion in zip(asked, done, strict=True):
        assert len(completion.logprobs) == len(completion.output_ids) <= request.max_new_tokens
        assert STOP not in completion.output_ids[:-1]
        stopped = completion.output_ids[-1] == STOP
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.output_ids) == request.max_new_tokens
    assert {c.finish_reason for c in done} == {"stop", "length"}
    assert_sampled_by(model, asked, done)


def test_requests_of_one_prompt_share_it_and_say_so(attach: Attach) -> None:
    engine = attach()
    ids = prompts(1, length=60, seed=41)[0]
    first = generate(engine, [Request(ids, seed, 8) for seed in range(4)])[0]
    assert sorted(c.cached_tokens or 0 for c in first) == [0, 59, 59, 59]  # the last token is always computed
    longer = generate(engine, [Request([*ids, 9, 10], 0, 8)])[0][0]
    assert (longer.cached_tokens or 0) >= 60
    assert first[0].versions == [(0, len(first[0].output_ids))]


def test_a_prompt_that_is_too_long_is_an_input_error_that_says_how_long(engine: SGLangEngine) -> None:
    asked = [Request(prompts(1, length=CONTEXT + 1)[0], 0, 4)]
    with pytest.raises(InputError, match=rf"{CONTEXT + 1} tokens.*{CONTEXT}"):
        generate(engine, asked)
    assert len(generate(engine, requests(1))[0]) == 1  # and nothing is broken


@pytest.mark.parametrize("bad", [[5, -1], [5, 10**6], []])
def test_token_ids_that_would_kill_a_server_are_never_sent(engine: SGLangEngine, bad: list[int]) -> None:
    with pytest.raises(InputError, match=r"token ids from 0 to \d+; got"):
        generate(engine, [*requests(1), Request(bad, 0, 4)])
    assert engine.take_metrics()["engine/servers"] == 2


def test_the_first_id_beyond_the_vocabulary_is_refused(
    engine: SGLangEngine, tokenizer: PreTrainedTokenizerBase
) -> None:
    size = len(tokenizer)
    assert generate(engine, [Request([size - 1], 0, 2)])[0][0].output_ids
    with pytest.raises(InputError):
        generate(engine, [Request([size], 0, 2)])


def test_a_session_stays_on_one_server(engine: SGLangEngine) -> None:
    ids = prompts(4, length=50, seed=17)
    done = generate(engine, *([Request(prompt, seed, 64) for seed in range(2)] for prompt in ids))
    for completions in done:
        assert sorted(c.cached_tokens or 0 for c in completions) == [0, 49]
