"""A step of the paper's runs on paper: FLOPs, bytes and seconds by phase, for docs/SCALING.md. Nothing is measured.

    PYTHONPATH=.:kernels python -m benchmarks.train_step_scaling

The step: 128 prompts x 8 responses; a third of the groups has a single outcome and is not trained on, each of the
others gives one reflection of 500 tokens and one replay. Responses are all of the mean length here, but the slowest one
decodes 4 times as long. Hardware: data sheets of an H100 SXM. What of it a program gets is assumed, not known.

The balance over ranks is computed: `pack` on the benchmark's trajectories (train_step_workload), log-normal lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mel_kernels import Stream
from transformers import Qwen3Config

from benchmarks.train_step_workload import SHAPES as BENCHMARKED
from benchmarks.train_step_workload import items, make_episodes
from mel_fast.packing import Cost, balance_metrics, pack
from mel_fast.plan import SHAPES
from mel_fast.types import make_sample

PEAK = 989e12  # FLOP/s, dense bf16
MEMORY = 0.7 * 3.35e12  # bytes/s: of the data sheet's bandwidth what decoding is taken to reach
NETWORK = 50e9  # bytes/s of one 400 Gb/s port, one for each GPU
UTILISATION = (0.2, 0.4)
DECODE_FLOOR = 5e-3  # seconds: no decoding step of a server is taken to be faster
PROMPTS, GROUP, PROMPT, MEMO, TEMPLATE, TAIL = 128, 8, 150, 500, 200, 4
TRAINED = PROMPTS * 2 // 3  # groups with both outcomes


@dataclass(frozen=True)
class Step:
    """One model, one mean length of responses."""

    model: str
    response: int

    @property
    def config(self) -> Qwen3Config:
        hidden, layers, heads, mlp, tied = SHAPES[self.model]
        return Qwen3Config(
            vocab_size=151936,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=tied,
        )

    @property
    def parameters(self) -> float:
        """Of the blocks and of embedding and head, which are one where tied."""
        config = self.config
        tables = 1 if config.tie_word_embeddings else 2
        return Cost.of(config).token / 2 + tables * config.vocab_size * config.hidden_size

    @property
    def trained_tokens(self) -> int:
        memo = TEMPLATE + PROMPT + 2 * self.response + MEMO
        return TRAINED * (GROUP * (PROMPT + self.response) + memo)

    @property
    def trained_flops(self) -> float:
        """Forward, backward, and the blocks' forward once more (full checkpointing)."""
        cost = Cost.of(self.config)
        blocks = Cost(cost.token, cost.square)
        memo = TEMPLATE + PROMPT + 2 * self.response + MEMO
        shapes = [(GROUP, PROMPT + self.response, self.response), (1, memo, MEMO)]
        each = sum(n * (3 * cost.of_sequence(a, b) + blocks.of_sequence(a, b)) for n, a, b in shapes)
        return TRAINED * each

    def decode_seconds(self, servers: int) -> float:
        """Every server reads its weights once per step, and the keys and values of all that it decodes. The replay
        comes after the response; the reflection hides in the slowest response."""
        key_value = 2 * 2 * self.config.num_hidden_layers * 8 * 128  # bytes per token: 8 heads of dimension 128
        steps = TAIL * self.response
        weights = max(2 * self.parameters / MEMORY, DECODE_FLOOR)
        sequences = (PROMPTS * GROUP + TRAINED) / servers  # responses and replays
        reading = sequences * self.response * (PROMPT + self.response / 2) * key_value / MEMORY
        return steps * weights + reading


def waste(groups: int, ranks: int, seed: int, cost: Cost) -> float:
    """What the update of a 4B model loses to ranks that wait for each other, packed by `cost`, 32768 tokens each."""
    shape, budget = replace(BENCHMARKED["4b"], groups=groups), 32768
    work = [item for item in items(make_episodes(shape, "mel", seed)) if item.advantage != 0]
    samples = [make_sample(item.context, item.target, Stream.NLL, 1.0, "policy") for item in work]
    plan = pack(samples, budget, ranks, cost)
    return balance_metrics(plan, budget, Cost.of(shape.config()))["balance/flops_max_over_mean"] - 1


def main() -> None:
    print("| model | mean response | trained tokens | PFLOP | GPUs | train, s | sample, s | publish, GB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for model in ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-14B-Base"):
        for response in (1024, 2048, 4096):
            step = Step(model, response)
            for gpus in (8, 64):
                low, high = (step.trained_flops / (gpus * PEAK * share) for share in reversed(UTILISATION))
                cells = (
                    model.removeprefix("Qwen/").removesuffix("-Base"),
                    f"{response}",
                    f"{step.trained_tokens / 1e6:.2f} M",
                    f"{step.trained_flops / 1e15:,.0f}",
                    f"{gpus}",
                    f"{low:,.0f} to {high:,.0f}",
                    f"{step.decode_seconds(gpus):,.0f}",
                    f"{2 * step.parameters / 1e9:.1f}",
                )
                print("| " + " | ".join(cells) + " |")
    print("\n| model | weights, gradients, AdamW, GB | per GPU of 8 | of 64 | traffic per micro-batch and GPU, GB |")
    print("|---|---:|---:|---:|---:|")
    for model in ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-14B-Base"):
        size = Step(model, 1024).parameters / 1e9
        print(f"| {model[5:-5]} | {16 * size:.0f} | {2 * size:.1f} | {size / 4:.1f} | {8 * size:.0f} |")
    print("\ntokens per micro-batch and GPU above which computing takes longer than the traffic, at 40%:")
    for name, rate in (("one 400 Gb/s port per GPU", NETWORK), ("NVLink, 450 GB/s in one direction", 450e9)):
        print(f"- {name}: {UTILISATION[1] * PEAK / rate:,.0f}")
    print("\n| ranks | 128 groups, by FLOPs | 128 groups, by tokens alone | 32 groups, by FLOPs |")
    print("|---|---:|---:|---:|")
    flops, tokens = Cost.of(BENCHMARKED["4b"].config()), Cost(token=1.0)
    for ranks in (2, 8, 16, 64):
        worst = [
            max(waste(n, ranks, seed, by) for seed in range(3)) for n, by in ((128, flops), (128, tokens), (32, flops))
        ]
        print(f"| {ranks} | " + " | ".join(f"{each:.2%}" for each in worst) + " |")


if __name__ == "__main__":
    main()
