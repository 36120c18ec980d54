"""One world, its tokenizer and its renderer, built once."""

from pathlib import Path

import pytest
import yaml

from mel_fast.prompts import Renderer
from mel_fast.templates import PromptConfig
from mel_fast.tiny import texts
from mel_fast.tiny.config import WorldConfig
from mel_fast.tiny.tokenizer import build_tokenizer
from mel_fast.tiny.world import World

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def world() -> World:
    return World(WorldConfig())


@pytest.fixture(scope="session")
def prompts() -> PromptConfig:
    config = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())
    return PromptConfig.model_validate(config["prompts"])


@pytest.fixture(scope="session")
def renderer(prompts: PromptConfig) -> Renderer:
    templates = (prompts.solve, prompts.reflect, prompts.replay, prompts.recall)
    return Renderer(build_tokenizer([*texts.corpus(), *templates]), prompts)
