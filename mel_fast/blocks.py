"""What is done to a model's decoder blocks: fused kernels, checkpointing, sharding, compilation, in this order.

Nothing here changes what a block computes, only how fast, where, and what it keeps for the backward.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from mel_fast.distributed import World
from mel_fast.errors import InputError
from mel_fast.model import Checkpointing, ModelConfig

log = logging.getLogger(__name__)


def blocks(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The decoder blocks, first to last."""
    layers = model.base_model.layers
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def fuse(model: PreTrainedModel, config: ModelConfig, world: World) -> bool:
    """Puts Liger's RMSNorm, RoPE and SwiGLU in place of the model's own, as `model.liger` asks. Its losses stay off:
    the head is ours. Says whether it did.

    Liger changes transformers' module too (RoPE is a function there), and with it later models of this family.

    Raises:
        InputError: `model.liger=true` without CUDA, without the package, or for a family that Liger does not know.
    """
    device = world.device
    if config.liger is False or (config.liger == "auto" and (config.compile or device.type != "cuda")):
        return False
    problem = None
    if device.type != "cuda":
        problem = f"it needs CUDA, not {device.type}"
    elif importlib.util.find_spec("liger_kernel") is None:
        problem = "the package liger-kernel is not installed"
    else:
        from liger_kernel.transformers import monkey_patch as liger

        family = model.config.model_type
        if family in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
            parts = {"rope": True, "rms_norm": True, "swiglu": True}
            losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
            liger._apply_liger_kernel_to_instance(model, **parts, **losses)
            return True
        problem = f"it does not know the family {family!r}"
    if config.liger == "auto":
        log.log(
            logging.WARNING if world.main else logging.DEBUG,
            "model.liger=auto: the model runs without Liger, because %s",
            problem,
        )
        return False
    raise InputError(f"model.liger=true: {problem}; use model.liger=auto or false")


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
}


def checkpoint_blocks(model: PreTrainedModel, mode: Checkpointing) -> None:
    """Recomputes blocks in the backward: `full` all of each, `selective` all but attention and every second matrix
    product.

    What to keep follows torchtitan's selective mode: attention, whose recomputation grows with the square of a
    sequence's length, and half of the products, which are most of the rest. Here it is the even ones: of q, k, v, o,
    gate, up and down those are k, o and up. The last one is then neither kept nor recomputed, as the backward does not
    ask for its result.
    """
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = _keep_some
    # Its new name; transformers 5.17 has only the old one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def _keep_some() -> tuple[Any, Any]:
    """Contexts of one block's forward and of its recomputation."""
    products = {False: 0, True: 0}  # so far, in the forward and in the recomputation

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if operator in PRODUCTS:
            products[context.is_recompute] += 1
            keep = products[context.is_recompute] % 2 == 0
        else:
            keep = isinstance(operator, torch._ops.OpOverload) and operator.name().partition(".")[0] in ATTENTION
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def shard(root: nn.Module, parts: Sequence[nn.Module], config: ModelConfig, world: World) -> None:
    """FSDP2: each of `parts` (the blocks, in order) on its own, and `root` with what is left (embedding, norm, head).

    Sums over ranks are made in float32. While one part computes, the next is gathered, in either direction.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    precision = MixedPrecisionPolicy(param_dtype=config.compute_dtype, reduce_dtype=torch.float32)
    place = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if config.offload else OffloadPolicy()
    for part in parts:
        fully_shard(
            part,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=place,
            reshard_after_forward=config.reshard_after_forward,
        )
    # The root's input is the batch, whose weights and log-probs must stay float32; FSDP2 would cast them too.
    fully_shard(root, mesh=mesh, mp_policy=replace(precision, cast_forward_inputs=False), offload_policy=place)
    for earlier, later in pairwise([root, *parts]):
        assert isinstance(earlier, FSDPModule)
        assert isinstance(later, FSDPModule)
        earlier.set_modules_to_forward_prefetch([later])
        if earlier is not root:  # its parameters stay gathered from the forward on
            later.set_modules_to_backward_prefetch([earlier])


def compile_blocks(parts: Sequence[nn.Module]) -> None:
    """Compiles the forward of each block, once for all of them and for any number of tokens.

    Only the forward: FSDP2's gathering stays around it, and checkpointing, which transformers puts into it, is compiled
    along. Hence after both.
    """
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=True)
