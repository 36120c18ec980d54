"""The local engine: transformers, in process. For laptops, tests and small models.

It works in lockstep: a batch is decoded when every open session waits for one. So what runs beside what does not
depend on timing, and a run can be repeated bit for bit.

B sequences in a batch, P longest prompt, V vocabulary.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mel_fast.types import Completion, Request


class LocalEngine:
    """Args:
    model: a transformers causal language model of the engine's own, on its device.
    stop_ids: tokens that end a response.
    max_batch: sequences decoded side by side.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], max_batch: int) -> None:
        self.model = model.eval()
        self.context_length = int(model.config.max_position_embeddings)
        self.version = 0
        self._stop_ids = torch.tensor(list(stop_ids), device=model.device)
        self._max_batch = max_batch
        arguments = inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"  # the name before 5.24
        self._open = 0
        self._waiting: list[tuple[Sequence[Request], asyncio.Future[list[Completion]]]] = []

    @asynccontextmanager
    async def session(self, key: str) -> AsyncIterator[LocalEngine]:
        self._open += 1
        try:
            yield self
        finally:
            self._open -= 1
            asyncio.get_running_loop().call_soon(self._run_when_all_wait)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Completion]] = loop.create_future()
        self._waiting.append((requests, future))
        loop.call_soon(self._run_when_all_wait)  # later: sessions about to open come first
        return await future

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            if name not in own:
                raise ValueError(f"published weight {name} is not the engine's: they have different models")
            own.pop(name).copy_(tensor)
        if own:
            raise ValueError(f"the published weights lack {sorted(own)[:3]}: trainer and engine have different models")
        self.version = version

    def release(self) -> None:
        """Its weights are all it holds, and they are kept."""

    def take_metrics(self) -> dict[str, float]:
        return {}

    def _run_when_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self._open:
            return
        waiting, self._waiting = self._waiting, []
        # The order of arrival depends on timing, so it must not decide who shares a batch: lengths and seeds do.
        jobs = [
            (request, index, place) for index, (asked, _) in enumerate(waiting) for place, request in enumerate(asked)
        ]
        jobs.sort(key=lambda job: (len(job[0].prompt_ids), job[0].seed))
        done: list[list[Completion | None]] = [[None] * len(asked) for asked, _ in waiting]
        try:
            for start in range(0, len(jobs), self._max_batch):
                chunk = jobs[start : start + self._max_batch]
                for (_, index, place), completion in zip(chunk, self._decode([job[0] for job in chunk]), strict=True):
                    done[index][place] = completion
        except Exception as error:
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), completions in zip(waiting, done, strict=True):
            if not future.done():
                future.set_result([completion for completion in completions if completion is not None])

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Request]) -> list[Completion]:
        """One token a time for the sequences still open; when half have ended, the batch is made smaller."""
        device, rows = self.model.device, _Rows.of(requests, self.model.device)
        outputs: list[tuple[list[int], list[float]]] = [([], []) for _ in requests]
        cache = DynamicCache(config=self.model.config)
        input_ids, mask, positions = rows.left_padded(requests)  # [B, P] each
        alive = list(range(len(requests)))  # which request each batch row belongs to
        for step in range(int(rows.limit.max())):
            logits = (
                self.model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=positions,
                    use_cache=True,
                    logits_to_keep=1,
                    **{self._cache_argument: cache},
                )
                .logits[:, -1]
                .float()
            )  # [B, V]
            token, logp = sample(logits, rows.temperature, rows.uniform[:, step])
            ended = torch.isin(token, self._stop_ids) | (rows.limit <= step + 1)
            for row, (index, value, score) in enumerate(zip(alive, token.tolist(), logp.tolist(), strict=True)):
                if rows.open[row]:
                    outputs[index][0].append(value)
                    outputs[index][1].append(score)
            rows.open = [is_open and not end for is_open, end in zip(rows.open, ended.tolist(), strict=True)]
            if not any(rows.open):
                break
            input_ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if sum(rows.open) <= len(alive) // 2:
                keep = torch.tensor([row for row, is_open in enumerate(rows.open) if is_open], device=device)
                cache.batch_select_indices(keep)
                input_ids, positions, mask = input_ids[keep], positions[keep], mask[keep]
                alive = [alive[row] for row in keep.tolist()]
                rows = rows.select(keep)
        stops = set(self._stop_ids.tolist())
        return [
            Completion(ids, logps, "stop" if ids and ids[-1] in stops else "length", [(self.version, len(ids))])
            for ids, logps in outputs
        ]


@dataclass(slots=True)
class _Rows:
    """What belongs to each row of the batch being decoded."""

    temperature: Tensor  # [B]
    limit: Tensor  # [B] tokens to decode at most
    uniform: Tensor  # [B, max limit] float64 in [0, 1): the random numbers, fixed by the request's seed
    open: list[bool]

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> _Rows:
        longest = max(request.max_new_tokens for request in requests)
        uniform = torch.stack(
            [
                torch.rand(longest, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float64)
                for request in requests
            ]
        )
        return cls(
            torch.tensor([request.temperature for request in requests], device=device),
            torch.tensor([request.max_new_tokens for request in requests], device=device),
            uniform.to(device),
            [True] * len(requests),
        )

    def select(self, keep: Tensor) -> _Rows:
        rows = keep.tolist()
        return _Rows(self.temperature[keep], self.limit[keep], self.uniform[keep], [self.open[row] for row in rows])

    def left_padded(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
        longest = max(len(request.prompt_ids) for request in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.int64)
        mask = torch.zeros(len(requests), longest, dtype=torch.int64)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, longest - len(request.prompt_ids) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        device = self.temperature.device
        return ids.to(device), mask.to(device), positions.to(device)


def sample(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws by inverting the cumulative distribution at given random numbers; greedy where the temperature is 0.

    Args:
        logits: [B, V] float32.
        temperature: [B].
        uniform: [B] float64 in [0, 1).

    Returns:
        token [B] int64 and its log-prob [B] float32 under the temperature-scaled distribution (temperature 1 when
        greedy).
    """
    greedy = temperature == 0
    logps = torch.log_softmax(logits / torch.where(greedy, 1.0, temperature)[:, None], dim=-1)  # [B, V]
    cumulative = logps.double().exp().cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
    token = torch.where(greedy, logits.argmax(dim=-1), drawn.clamp(max=logits.shape[1] - 1))
    return token, logps.gather(1, token[:, None]).squeeze(1)
