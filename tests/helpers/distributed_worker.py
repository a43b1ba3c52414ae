"""Run by ecosystem/test_distributed.py in two gloo processes: what one of them does."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from helpers.models import adapted, llama, randomise, token_ids
from helpers.trainers import settings
from peft_queryable import RoutingCallback, record_routing


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


def zero(stage: int) -> None:
    """After a step of DeepSpeed's ZeRO every tensor is what it is after one process's step on the joined batch."""
    import deepspeed

    ids = token_ids(4, 8)
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    model, reference = build("causal", True).float(), build("causal", False).float()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, optimizer=torch.optim.SGD(parameters, lr=0.1), config=config
    )
    engine.backward(engine(input_ids=ids[rows], labels=ids[rows], use_cache=False).loss)
    engine.step()
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    reference(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6, msg=name)


def fsdp1_with_the_policy_of_peft() -> None:
    """FSDP1 around each tensor of the adapter: refused by a clear error."""
    model = build("causal", False)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), device_id=torch.device("cpu")
    )
    try:
        wrapped(input_ids=token_ids(), use_cache=False)
    except RuntimeError as error:
        assert "fsdp_version: 2" in str(error)
    else:
        raise AssertionError("not refused")


def callback(folder: str) -> None:
    """What is logged in each process is about the routes of both."""
    rows = [row.tolist() for row in token_ids(4, 8)]
    model = build("causal", False).float()
    with torch.no_grad(), record_routing(model) as trace:
        model(input_ids=torch.tensor(rows))
    arguments = TrainingArguments(**settings(folder, max_steps=1, ddp_backend="gloo"))
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])  # one step takes all of it
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[RoutingCallback(every=1)])
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    for name, value in trace.statistics["default"].summary().items():
        assert abs(entry[f"routing/{name}"] - value) < 1e-6, (name, entry[f"routing/{name}"], value)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    if sys.argv[1].startswith("zero"):
        zero(stage=int(sys.argv[1].removeprefix("zero")))
    elif sys.argv[1] == "fsdp1":
        fsdp1_with_the_policy_of_peft()
    elif sys.argv[1] == "callback":
        callback(sys.argv[2])
    else:
        check(strategy=sys.argv[1], scope=sys.argv[2], is_checkpointing=sys.argv[3] == "checkpointing")
    dist.barrier()
    os._exit(0)  # an orderly exit can abort in gloo's threads ("terminate called without an active exception")
