"""On the path of a benchmark's server, before the project's own shims: a forward pass takes at least as long as that of
a larger model on a GPU would, though the model is tiny and computes on a CPU.

    prefill: MEL_FAST_PREFILL_S + tokens / MEL_FAST_TOKENS_PER_S        decode: MEL_FAST_DECODE_S

Every pass is written to MEL_FAST_FORWARDS: start (s, monotonic), duration, "prefill" or "decode", requests, tokens,
and how many seconds it took longer than imposed.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

OWN = Path(__file__).parents[2] / "mel_fast" / "rollout" / "sglang" / "cpu_shims" / "sitecustomize.py"
RUNNER = "sglang.srt.model_executor.model_runner"


def load_the_projects_own():
    spec = importlib.util.spec_from_file_location("mel_fast_cpu_shim", OWN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def slow_down(runner):
    fixed, rate, decode = (float(os.environ[f"MEL_FAST_{name}"]) for name in ("PREFILL_S", "TOKENS_PER_S", "DECODE_S"))
    log = open(os.environ["MEL_FAST_FORWARDS"], "a", buffering=1)  # noqa: SIM115  # for as long as the server lives
    forward = runner.forward

    def at_least(self, forward_batch, *args, **kwargs):
        start = time.monotonic()
        result = forward(self, forward_batch, *args, **kwargs)
        mode, tokens = forward_batch.forward_mode, forward_batch.extend_num_tokens or 0
        if mode.is_idle():
            return result
        prefill = mode.is_extend()
        imposed = fixed + tokens / rate if prefill else decode
        time.sleep(max(0.0, start + imposed - time.monotonic()))
        took = time.monotonic() - start
        name, tokens = ("prefill", tokens) if prefill else ("decode", forward_batch.batch_size)
        log.write(f"{start:.4f} {took:.4f} {name} {forward_batch.batch_size} {tokens} {took - imposed:.4f}\n")
        return result

    runner.forward = at_least


class WhenImported:
    """Wraps the runner as soon as it is defined."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != RUNNER:
            return None
        sys.meta_path.remove(WhenImported)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def then_slow_down(module):
            execute(module)
            slow_down(module.ModelRunner)

        spec.loader.exec_module = then_slow_down
        return spec


load_the_projects_own()
sys.meta_path.insert(0, WhenImported)
