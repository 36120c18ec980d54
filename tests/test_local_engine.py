"""The local engine samples the policy's distribution, repeatably, whatever runs beside a request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import make_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mel_fast.rollout.local import LocalEngine, sample
from mel_fast.types import Completion, Request

STOP = 7


@pytest.fixture
def engine(model_folder: Path) -> LocalEngine:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return LocalEngine(model, [STOP], max_batch=64)


def generate(engine: LocalEngine, *sessions: Sequence[Request]) -> list[list[Completion]]:
    """Each argument is what one session asks for."""

    async def ask(requests: Sequence[Request]) -> list[Completion]:
        async with engine.session("x") as session:
            return await session.generate(requests)

    async def everything() -> list[list[Completion]]:
        return await asyncio.gather(*(ask(requests) for requests in sessions))

    return asyncio.run(everything())


def requests(count: int, temperature: float = 1.0, limit: int = 20) -> list[Request]:
    torch.manual_seed(3)
    prompts = [torch.randint(8, 400, (5 + 7 * (i % 4),)).tolist() for i in range(count)]
    return [
        Request(prompt, seed=100 + i, max_new_tokens=limit, temperature=temperature) for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_models_at_the_sampling_temperature(engine: LocalEngine, temperature: float) -> None:
    asked = requests(6, temperature)
    for request, completion in zip(asked, generate(engine, asked)[0], strict=True):
        ids = torch.tensor(request.prompt_ids + completion.output_ids)
        with torch.no_grad():
            logits = engine.model(input_ids=ids[None]).logits[0, len(request.prompt_ids) - 1 : -1] / temperature
        expected = torch.log_softmax(logits, -1).gather(1, ids[len(request.prompt_ids) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_a_completion_depends_on_its_own_request_alone(engine: LocalEngine) -> None:
    asked = requests(8)
    together = generate(engine, asked)[0]
    alone = [generate(engine, [request])[0][0] for request in asked]
    assert [c.output_ids for c in together] == [c.output_ids for c in alone]


def test_the_same_requests_give_bitwise_the_same_answers_whatever_the_order_of_arrival(engine: LocalEngine) -> None:
    asked = requests(8)
    forth = generate(engine, asked[:3], asked[3:5], asked[5:])
    back = generate(engine, asked[5:], asked[3:5], asked[:3])
    assert [c for session in forth for c in session] == [c for session in reversed(back) for c in session]


def test_another_seed_gives_another_answer(engine: LocalEngine) -> None:
    prompt = [9, 10, 11]
    first, second = generate(engine, [Request(prompt, 1, 20), Request(prompt, 2, 20)])[0]
    assert first.output_ids != second.output_ids


def test_greedy_answers_take_the_likeliest_token(engine: LocalEngine) -> None:
    asked = requests(5, temperature=0.0, limit=12)
    for request, completion in zip(asked, generate(engine, asked)[0], strict=True):
        ids = list(request.prompt_ids)
        for token in completion.output_ids:
            with torch.no_grad():
                assert token == int(engine.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_an_answer_ends_at_the_stop_token_or_at_its_own_limit(engine: LocalEngine) -> None:
    with torch.no_grad():  # the stop token becomes likely, so that lengths differ and the batch shrinks on the way
        engine.model.model.embed_tokens.weight[STOP] *= 3
    asked = [Request(r.prompt_ids, r.seed, 4 + 5 * (i % 6)) for i, r in enumerate(requests(40))]
    done = generate(engine, asked)[0]
    for request, completion in zip(asked, done, strict=True):
        assert len(completion.logprobs) == len(completion.output_ids) <= request.max_new_tokens
        assert STOP not in completion.output_ids[:-1]
        stopped = completion.output_ids[-1] == STOP
        assert completion.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(completion.output_ids) == request.max_new_tokens
    assert {c.finish_reason for c in done} == {"stop", "length"}


def test_sampling_follows_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.0, 0.3, 0.2]))
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, logp = sample(logits.expand(count, -1), torch.ones(count), uniform)
    shares = torch.bincount(token, minlength=4) / count
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.01, rtol=0)
    torch.testing.assert_close(logp, logits[token])


def test_published_weights_are_used_and_their_version_is_recorded(
    engine: LocalEngine, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked = requests(3)
    before = generate(engine, asked)[0]
    other = make_model(len(tokenizer), seed=5)
    engine.load(other.named_parameters(), version=12)
    after = generate(engine, asked)[0]
    assert [c.versions for c in before] == [[(0, len(c.output_ids))] for c in before]
    assert [c.versions for c in after] == [[(12, len(c.output_ids))] for c in after]
    expected = generate(LocalEngine(other, [STOP], 64), asked)[0]
    assert [c.output_ids for c in after] == [c.output_ids for c in expected]


def test_weights_of_another_model_are_refused(engine: LocalEngine, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="different models"):
        engine.load(make_model(len(tokenizer), layers=1).named_parameters(), version=1)


def test_an_error_in_the_model_reaches_every_session(engine: LocalEngine) -> None:
    bad = Request([10**6], seed=0, max_new_tokens=2)
    with pytest.raises(IndexError):
        generate(engine, [bad], requests(1))
