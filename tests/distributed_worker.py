"""Run by test_distributed.py in two gloo processes: what one of them does."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from models import adapted, llama, randomise, token_ids
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def build(scope: str, is_checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    model = adapted(llama(num_hidden_layers=2).double(), target_modules="all-linear", routing_scope=scope)
    randomise(model)
    if is_checkpointing:
        model.get_base_model().activation_checkpointing_enable()
    return model.train()


def ddp(scope: str, is_checkpointing: bool) -> None:
    """Averaged gradients of two processes equal those of one on the joined batch; every parameter gets one."""
    torch.manual_seed(1)
    ids = token_ids(4, 8)
    labels = ids.clone()
    labels[:, :3] = -100
    model = build(scope, is_checkpointing)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for _ in range(2):  # the second forward raises if the first left a gradient out
        model.zero_grad()
        wrapped(input_ids=ids[rows], labels=labels[rows], use_cache=False).loss.backward()
    reference = build(scope, False)
    reference(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=1e-12, msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ddp(scope=sys.argv[1], is_checkpointing=sys.argv[2] == "checkpointing")
    dist.destroy_process_group()
