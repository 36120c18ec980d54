"""A tokenizer, a checkpoint of a small random model, and a world of one rank."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if (
    not torch.cuda.is_available()
):  # kernels run in Triton's interpreter; read when triton is first imported, so set first
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support import make_model, torchrun
from transformers import PreTrainedTokenizerBase

from mel_fast.distributed import World
from mel_fast.tiny.texts import corpus
from mel_fast.tiny.tokenizer import build_tokenizer

# Ranks share two cores; more threads would only fight over them, and results would depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that none of two test processes is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or "sglang" in item.path.parts}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(corpus())


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random Qwen3 checkpoint with tied embeddings, as transformers saves it."""
    folder = tmp_path_factory.mktemp("model")
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def world() -> World:
    return World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The embedded world is in the cache. Made with all cores, unlike everything after it."""
    folder = tmp_path_factory.mktemp("warm")
    lock = (
        Path(tempfile.gettempdir()) / f"mel_fast-tests-{os.getuid()}.lock"
    )  # test processes would build it side by side
    options = (f"--run.folder={folder}", "--run.steps=1", "--run.mode=rollout", "--eval.at_ends=false")
    with FileLock(lock):
        result = torchrun(
            1, "-m", "mel_fast.train", *options, env={"OMP_NUM_THREADS": str(os.cpu_count())}, timeout=900
        )
    assert result.returncode == 0, result.stderr[-3000:]
