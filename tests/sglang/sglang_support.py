"""Shared by the tests with real servers: their model, requests for it, and what transformers says of the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from support import make_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mel_fast.rollout.engine import Engine
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.rollout.sglang.process import ServerProcess
from mel_fast.types import Completion, Request

CONTEXT = 512
STOP = 7
Attach = Callable[..., SGLangEngine]


def launched(config: SGLangConfig, settings: dict[str, Any], folder: Path, count: int) -> list[ServerProcess]:
    return [
        ServerProcess(config, settings["model_path"], "float32", [], folder / f"server-{index}.log", seed=index)
        for index in range(count)
    ]


def members(group: int) -> int:
    """Processes of the group that have not ended."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended while we looked
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            count += int(its_group) == group and state != "Z"
    return count


def wait_until(condition: Callable[[], bool], patience_s: float = 180) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def while_generating(
    engine: SGLangEngine, sessions: Sequence[Sequence[Request]], action: Callable[[], None]
) -> list[list[Completion]]:
    """What sessions got that were under way when the action began, but for a few that ended early. Raises what they
    raised."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(generate, engine, *sessions)
        count = sum(map(len, sessions))
        wait_until(lambda: done.done() or 2 * sum(server.running for server in engine.servers) > count)
        time.sleep(0.1)  # some tokens
        assert not done.done(), "all was done before the action: ask for more tokens"
        action()
        return done.result()


def weights(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def policy(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Policies of different seeds are strangers: a stale weight or prefix shows at once."""
    return make_model(len(tokenizer), seed=seed, context=CONTEXT).eval()


def prompts(count: int, length: int = 40, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, 400, (count, length), generator=generator).tolist()


def requests(count: int, limit: int = 20, temperature: float = 1.0, length: int = 40, seed: int = 3) -> list[Request]:
    return [Request(ids, 100 + i, limit, temperature) for i, ids in enumerate(prompts(count, length, seed))]


def generate(engine: Engine, *sessions: Sequence[Request]) -> list[list[Completion]]:
    """Each argument is what one session asks for."""

    async def everything() -> list[list[Completion]]:
        return await asyncio.gather(*(ask(engine, asked) for asked in sessions))

    return asyncio.run(everything())


async def ask(engine: Engine, asked: Sequence[Request]) -> list[Completion]:
    async with engine.session("x") as session:
        return await session.generate(asked)


@torch.no_grad()
def logprobs(model: PreTrainedModel, request: Request, completion: Completion) -> Tensor:
    """Of the completion's tokens, as transformers computes them at the request's temperature. [L] float32."""
    ids = torch.tensor(request.prompt_ids + completion.output_ids)
    logits = model(input_ids=ids[None]).logits[0, len(request.prompt_ids) - 1 : -1] / (request.temperature or 1.0)
    return torch.log_softmax(logits, -1).gather(1, ids[len(request.prompt_ids) :, None]).squeeze(1)


def assert_sampled_by(model: PreTrainedModel, asked: Sequence[Request], done: Sequence[Completion]) -> None:
    for request, completion in zip(asked, done, strict=True):
        expected = logprobs(model, request, completion)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=1e-4)
