"""The policy: a transformers causal language model whose forward takes a packed micro-batch and returns the loss.

The loss is computed inside the forward, because FSDP2 gathers the root's parameters (lm_head among them) only there:
the fused head needs the dense weight.

T packed tokens, N loss rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from mel_kernels import LossConfig, fused_loss, token_logprobs
from torch import Tensor, nn
from transformers import PreTrainedModel

from mel_fast.attention import ATTENTION_NAME, Implementation, PackedLayout, choose_implementation
from mel_fast.blocks import blocks, checkpoint_blocks, compile_blocks, fuse, shard
from mel_fast.distributed import World
from mel_fast.errors import InputError
from mel_fast.gspo import SequenceLoss, sequence_loss
from mel_fast.model import ModelConfig, empty_model, fill, load_model
from mel_fast.packing import PackedBatch


class Policy(nn.Module):
    """Args:
    model: a transformers model with full causal attention, loaded with `attn_implementation=ATTENTION_NAME`.
    implementation: of packed attention.
    settings: of these, the back end and the gradient budget of the fused loss, and whether blocks are compiled.
    """

    def __init__(self, model: PreTrainedModel, implementation: Implementation, settings: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.implementation: Implementation = implementation
        self.settings = settings
        self.pull: Tensor | None = None  # [T], of the last backward: norm of the gradient at the embedding's output
        model.get_input_embeddings().register_forward_hook(self._watch)

    def forward(
        self, batch: PackedBatch, loss: LossConfig | SequenceLoss | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """One pass over a micro-batch.

        Args:
            batch: on this module's device.
            loss: its coefficients, or None for the log-probs alone (no loss, no gradient of the head).

        Returns:
            loss (scalar; 0 without `loss`), logp [N], entropy [N] (both float32), metrics (sums; empty without
            `loss`). A plain tuple, because FSDP2 finds the tensors that start its backward only in standard
            containers.
        """
        hidden = self.model.base_model(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            layout=PackedLayout.of(batch, self.implementation, one_class=self.settings.compile),
        ).last_hidden_state[0]  # [T, H]
        hidden = hidden.index_select(0, batch.rows)  # [N, H]
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        if loss is None or isinstance(loss, SequenceLoss):
            logp, entropy, _ = token_logprobs(
                hidden,
                head.weight,
                batch.target,
                bias=head.bias,
                temperature=batch.temperature,
                backend=self.settings.kernels,
                delta=self.settings.gradient_budget,
            )
            if loss is None:
                return logp.new_zeros(()), logp, entropy, {}
            value, metrics = sequence_loss(batch, logp, entropy, loss)
            return value, logp.detach(), entropy.detach(), metrics
        out = fused_loss(
            hidden,
            head.weight,
            batch.target,
            batch.stream,
            batch.advantage,
            batch.weight,
            config=loss,
            old_logp=batch.old_logp,
            rollout_logp=batch.rollout_logp,
            ref_logp=batch.ref_logp,
            bias=head.bias,
            temperature=batch.temperature,
            backend=self.settings.kernels,
            delta=self.settings.gradient_budget,
        )
        return out.loss, out.logp, out.entropy, out.metrics

    def _watch(self, _module: nn.Module, _inputs: Any, embedded: Tensor) -> None:  # [1, T, H]
        if embedded.requires_grad:
            embedded.register_hook(self._note_pull)

    def _note_pull(self, gradient: Tensor) -> None:  # [1, T, H]
        self.pull = torch.linalg.vector_norm(gradient[0], dim=-1, dtype=torch.float32)

    @property
    def config(self) -> Any:
        return self.model.config


def load_policy(config: ModelConfig, world: World) -> Policy:
    """The policy with its checkpoint's weights in float32.

    It is sharded when there is more than one rank, compute is in 16 bits or weights are offloaded: what keeps float32
    weights beside 16-bit compute, or on the CPU, is FSDP2.

    Raises:
        InputError: there is no such model, it has sliding-window attention, or attention or kernels that were asked
            for cannot run here.
    """
    implementation = choose_implementation(config.attention, world.device, config.compute_dtype)
    sharded = world.size > 1 or config.dtype != "float32" or config.offload
    model = (empty_model if sharded else load_model)(config, attn_implementation=ATTENTION_NAME)
    policy = assemble(model, implementation, config, world, sharded=sharded)
    if sharded:
        fill(model, config, world)
    return policy if sharded else policy.to(world.device)


def assemble(
    model: PreTrainedModel, implementation: Implementation, config: ModelConfig, world: World, *, sharded: bool
) -> Policy:
    """The policy around a model, whose blocks are made what `config` says."""
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise InputError(f"{config.path} uses sliding-window attention, which packed training does not implement")
    fuse(model, config, world)
    checkpoint_blocks(model, config.checkpointing)
    policy = Policy(model, implementation, config).train()
    if sharded:
        shard(policy, blocks(model), config, world)
    if config.compile:
        compile_blocks(blocks(model))
    return policy
