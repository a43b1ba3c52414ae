"""Two gloo processes on one machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WORKER = "helpers.distributed_worker"


def launch(*arguments: str) -> None:
    """Run the worker in two processes, and show what it printed if it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "--module", WORKER, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("checkpointing", ["plain", "checkpointing"])
@pytest.mark.parametrize("scope", ["causal", "sequence"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(strategy, scope, checkpointing):
    """Gradients and saved adapters of DDP (without `find_unused_parameters`) and FSDP2 equal one process's."""
    launch(strategy, scope, checkpointing)


def test_the_routing_callback_is_about_all_processes(tmp_path):
    """Under DDP, the entries are those of one process on the joined batch."""
    launch("callback", str(tmp_path))


def test_fsdp1_with_the_policy_of_peft_is_refused():
    """PEFT's wrap policy for FSDP1 keeps modules from reading the adapter's tensors together."""
    launch("fsdp1")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed(stage):
    """A step of ZeRO, checkpointing on, moves every tensor as one process does."""
    pytest.importorskip("deepspeed", reason="optional, and large: pip install deepspeed", exc_type=ImportError)
    launch(stage)
