"""The HTTP calls to one SGLang server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from mel_fast.errors import EngineError, InputError
from mel_fast.types import Completion, Request, VersionSpan

NEVER = 2**31 - 1  # tokens between two streamed chunks: the first comes at once, then only the last
LOCKED = (401, 403)
UNAVAILABLE = (502, 503, 504)  # a server on its way down, or a proxy that does not reach it: as good as no connection


class Client:
    """Args:
    http: the connections.
    url: of the server, without a slash at its end.
    stop_ids: tokens that end a response.

    Connection faults are aiohttp's own errors and are left to the caller, who knows what to repeat.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str, stop_ids: Sequence[int]) -> None:
        self.http, self.url, self.stop_ids = http, url, list(stop_ids)

    async def generate(self, request: Request, prefilled: Callable[[int], None]) -> Completion:
        """One completion.

        Args:
            prefilled: called when the first token is there, with the number of prompt tokens that were cached. From
                then on other requests find this prompt in the server's cache.

        Raises:
            InputError: the server refuses the request.
            EngineError: it answers with something else than a completion.
        """
        body = {
            "input_ids": request.prompt_ids,
            "sampling_params": {
                "max_new_tokens": request.max_new_tokens,
                "temperature": request.temperature,
                "top_p": 1.0,  # said, because a server may have been started with other defaults
                "top_k": -1,
                "stop_token_ids": self.stop_ids,
                "sampling_seed": request.seed % 2**31,  # heeded by servers with --enable-deterministic-inference
                "stream_interval": NEVER,
            },
            "return_logprob": True,
            "stream": True,
        }
        async with self.http.post(f"{self.url}/generate", json=body) as response:
            if response.status >= 400:
                raise self._refusal("/generate", response.status, await response.text())
            buffer, message, first = b"", None, True
            async for chunk in response.content.iter_any():
                *events, buffer = (buffer + chunk).split(b"\n\n")
                for event in events:
                    data = event.removeprefix(b"data: ")
                    if data == b"[DONE]":
                        continue
                    message = json.loads(data)
                    if "error" in message:
                        raise self._refusal("/generate", int(message["error"].get("code") or 400), data.decode())
                    if first:
                        first = False
                        prefilled(message["meta_info"]["cached_tokens"])
        if message is None or (reason := message["meta_info"]["finish_reason"]) is None:
            raise aiohttp.ClientPayloadError(f"{self.url} ended its answer early")
        return self._completion(message["output_ids"], message["meta_info"], reason)

    def _completion(self, ids: list[int], meta: dict[str, Any], reason: dict[str, Any]) -> Completion:
        if reason["type"] == "abort":
            status = int(reason.get("status_code") or 500)
            if 400 <= status < 500:
                raise self._refusal("/generate", status, str(reason.get("message")))
            raise aiohttp.ClientPayloadError(f"{self.url} gave a request up: {reason.get('message')}")
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
        if not len(ids) == len(logprobs) == meta["completion_tokens"]:
            raise EngineError(
                f"{self.url} returned {len(ids)} tokens and {len(logprobs)} log-probs for "
                f"{meta['completion_tokens']} sampled tokens"
            )
        spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": len(ids)}]
        versions: list[VersionSpan] = [(_version(s["version"]), s["end"] - s["start"]) for s in spans]
        return Completion(ids, logprobs, reason["type"], versions, meta["cached_tokens"])

    async def post(self, path: str, timeout_s: float, **body: object) -> dict[str, Any]:
        """Raises EngineError when the server says no, InputError when it wants another API key."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self.http.post(self.url + path, json=body, timeout=timeout) as response:
            text = await response.text()
            if response.status >= 400:
                raise self._no(path, response.status, text)
            answer = json.loads(text) if text.startswith("{") else {}
            if answer.get("success") is False:
                raise EngineError(f"{self.url}{path}: {answer.get('message')}")
            return answer

    async def info(self) -> dict[str, Any]:
        """What the server says of itself. Raises as `post`."""
        async with self.http.get(f"{self.url}/server_info", timeout=aiohttp.ClientTimeout(total=30)) as response:
            text = await response.text()
            if response.status >= 400:
                raise self._no("/server_info", response.status, text)
            return json.loads(text)

    async def healthy(self, patience_s: float, alive: Callable[[], bool]) -> bool:
        """Whether it generates a token (or is busy with others') within `patience_s` and while `alive()`."""
        deadline = time.monotonic() + patience_s
        while alive() and (left := deadline - time.monotonic()) > 0:
            try:
                timeout = aiohttp.ClientTimeout(total=left)
                async with self.http.get(f"{self.url}/health_generate", timeout=timeout) as response:
                    if response.status == 200:
                        return True
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(min(0.5, patience_s / 10))
        return False

    def _refusal(self, path: str, status: int, text: str) -> Exception:
        if status in UNAVAILABLE:
            return aiohttp.ClientPayloadError(f"{self.url}{path} answered {status}: {_message(text)}")
        if status >= 500 or status in LOCKED:
            return self._no(path, status, text)
        return InputError(f"{self.url} refused a request ({status}): {_message(text)}")

    def _no(self, path: str, status: int, text: str) -> Exception:
        answer = f"{self.url}{path} answered {status}: {_message(text)}"
        if status not in LOCKED:
            return EngineError(answer)
        return InputError(
            f"{answer}; rollout.sglang.api_key_variable must name an environment variable that holds the key with "
            "which this server was started (--api-key; where it has an --admin-api-key too, both must be the same)"
        )


def _version(text: str) -> int:
    """-1: a version that no run publishes, such as the one of a server that was restarted behind our back."""
    return int(text) if text.isdecimal() else -1


def _message(text: str) -> str:
    """The server's own words."""
    try:
        message = json.loads(text)
    except ValueError:
        return text[:500]
    error = message.get("error", message)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
