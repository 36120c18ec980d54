"""Real SGLang servers on the CPU, with a tiny model and an imposed minimum time of a forward pass.

A tiny model answers so fast that neither shared prefixes nor idle servers matter. With the imposed times a server's
schedule is that of a larger model: what is batched with what, who waits for whom, how long a prompt takes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from mel_fast.rollout.sglang.client import Client
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.rollout.sglang.process import ServerProcess

SHIMS = Path(__file__).parent / "imposed_time"
VOCABULARY, CONTEXT = 512, 4096
logging.disable_progress_bar()


@dataclass(frozen=True)
class Times:
    """Least times of a forward pass, in seconds."""

    prefill_s: float = 0.010
    tokens_per_s: float = 20_000.0
    decode_s: float = 0.020

    def describe(self) -> str:
        return (
            f"prefill {1e3 * self.prefill_s:.0f} ms + tokens / {self.tokens_per_s:,.0f} s, "
            f"decode {1e3 * self.decode_s:.0f} ms"
        )


@dataclass(frozen=True)
class Forward:
    """One forward pass of a server."""

    start: float  # s, on time.monotonic
    seconds: float
    kind: str  # "prefill" or "decode"
    requests: int
    tokens: int  # computed: of a prefill those that were not cached
    late: float  # s, beyond the imposed time


class TimedServer(ServerProcess):
    """A server with imposed times. Its forward passes stand in a file beside its log."""

    times = Times()

    def environment(self) -> dict[str, str]:
        own = super().environment()
        return own | {
            "PYTHONPATH": os.pathsep.join([str(SHIMS), own["PYTHONPATH"]]),
            "MEL_FAST_PREFILL_S": str(self.times.prefill_s),
            "MEL_FAST_TOKENS_PER_S": str(self.times.tokens_per_s),
            "MEL_FAST_DECODE_S": str(self.times.decode_s),
            "MEL_FAST_FORWARDS": str(self.log.with_suffix(".forwards")),
        }

    def forwards(self, since: float = 0.0) -> list[Forward]:
        found: list[Forward] = []
        for line in self.log.with_suffix(".forwards").read_text().splitlines():
            start, seconds, kind, requests, tokens, late = line.split()
            if float(start) >= since:
                found.append(Forward(float(start), float(seconds), kind, int(requests), int(tokens), float(late)))
        return found


def save_model(folder: Path) -> Path:
    """A random Qwen3 of one layer that never ends an answer by itself."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(12.0)  # at the usual scale nearly every token is as likely as any other
    model.save_pretrained(folder / "model")
    return folder / "model"


def server(folder: Path, model: Path, name: str, kv_tokens: int, arguments: Sequence[str] = ()) -> TimedServer:
    """Not started."""
    config = SGLangConfig(kv_tokens=kv_tokens, arguments=("--max-running-requests", "512", *arguments))
    return TimedServer(config, str(model), "float32", [], folder / f"{name}.log")


@contextmanager
def running(servers: Sequence[TimedServer], patience_s: float = 600.0) -> Iterator[None]:
    """Starts them together, waits until they answer, and ends them."""

    async def wait() -> None:
        async with aiohttp.ClientSession() as http:
            for process in servers:
                if not await Client(http, process.url, []).healthy(patience_s, lambda p=process: p.alive):
                    raise SystemExit(f"{process.log}: the server did not start\n{process.tail()}")

    with ExitStack() as stack:
        for process in servers:
            stack.callback(process.stop)
            process.start()
        asyncio.run(wait())
        yield


def attach(servers: Sequence[TimedServer], folder: Path, **settings: object) -> SGLangEngine:
    """An engine for servers that run. To enter it empties their prefix caches."""
    config = SGLangConfig.model_validate({"urls": [process.url for process in servers], **settings})
    return engine_for(config, [], servers[0].model_path, folder)


def engine_for(config: SGLangConfig, processes: Sequence[ServerProcess], model: str, folder: Path) -> SGLangEngine:
    return SGLangEngine(
        config,
        processes,
        model_path=model,
        model_bytes=2**20,
        dtype=torch.float32,
        stop_ids=[],
        vocabulary=VOCABULARY,
        context_length=CONTEXT,
        folder=folder,
    )


def late_share(servers: Sequence[TimedServer], since: float) -> float:
    """Seconds that forward passes took longer than imposed, over the time since then: what the machine's load did."""
    late = sum(forward.late for process in servers for forward in process.forwards(since))
    return late / (len(servers) * (time.monotonic() - since))
