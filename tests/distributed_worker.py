"""Run by test_distributed.py in two gloo processes: what one of them does."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from models import adapted, llama, randomise, token_ids
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def build(scope: str, is_checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    model = adapted(llama(num_hidden_layers=2).double(), target_modules="all-linear", routing_scope=scope)
    randomise(model)
    if is_checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
    return model.train()


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=False)


def fsdp2(model: nn.Module) -> nn.Module:
    """Decoder layers and the rest sharded apart, as accelerate's transformer policy does."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def check(strategy: str, scope: str, is_checkpointing: bool) -> None:
    """Averaged gradients of two processes equal those of one on the joined batch; every parameter gets one."""
    torch.manual_seed(1)
    ids = token_ids(4, 8)
    labels = ids.clone()
    labels[:, :3] = -100
    model = build(scope, is_checkpointing)
    wrapped = {"ddp": ddp, "fsdp2": fsdp2}[strategy](model)
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for _ in range(2):  # DDP's second forward raises if the first left a gradient out
        model.zero_grad()
        wrapped(input_ids=ids[rows], labels=labels[rows], use_cache=False).loss.backward()
    reference = build(scope, False)
    reference(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(whole(parameter.grad), expected.grad, rtol=0, atol=1e-12, msg=name)
    state = get_peft_model_state_dict(model)
    for name, expected in get_peft_model_state_dict(reference).items():
        assert torch.equal(whole(state.pop(name)), expected), name
    assert not state


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    check(strategy=sys.argv[1], scope=sys.argv[2], is_checkpointing=sys.argv[3] == "checkpointing")
    dist.destroy_process_group()
