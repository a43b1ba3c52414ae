"""What the method costs beside plain LoRA, counted and not timed: operations, tensors made, tensors saved."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers.models import LLAMA_PROJECTIONS, VOCAB, adapted, llama, randomise, token_ids
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from peft_queryable import QueryableLoraConfig

SCOPES = ("sequence", "prompt", "causal")
BATCH, LENGTH, RANK, ATOMS = 3, 7, 5, 6  # such that sizes tell which of them they are made of


def operations(config: LoraConfig) -> int:
    """Of a forward call of four of Qwen2.5-0.5B's layers, in four blocks: routes weigh more than in all 24."""
    shape = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=4,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    model = get_peft_model(Qwen2ForCausalLM(shape), config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=token_ids(2, 32))
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def lora_operations() -> int:
    return operations(LoraConfig(r=8, target_modules=LLAMA_PROJECTIONS))


@pytest.mark.parametrize("scope", SCOPES)
def test_arithmetic(scope, lora_operations):
    """At most the 0.6 % above LoRA's that the paper reports for these shapes (Table 5)."""
    config = QueryableLoraConfig(r=8, target_modules=LLAMA_PROJECTIONS, routing_scope=scope)
    assert lora_operations < operations(config) <= 1.006 * lora_operations


def build(scope: str | None) -> nn.Module:
    """Four layers in four blocks; None for plain LoRA."""
    if scope is None:
        config = LoraConfig(r=RANK, target_modules=LLAMA_PROJECTIONS)
        return get_peft_model(llama(), config)
    return adapted(llama(), r=RANK, num_atoms=ATOMS, target_modules=LLAMA_PROJECTIONS, routing_scope=scope)


def train(scope: str | None, length: int) -> None:
    """Forward and backward of a batch whose first two tokens are a prompt."""
    model = build(scope)
    randomise(model)
    ids = token_ids(BATCH, length)
    labels = ids.clone()
    labels[:, :2] = -100
    model.train()(input_ids=ids, labels=labels, use_cache=False).loss.backward()


class Made(TorchDispatchMode):
    """Records the number of elements of every tensor that an operator makes, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            self.sizes.update(t.numel() for t in tensors if isinstance(t, Tensor))
        return output


def made(scope: str | None, length: int = LENGTH) -> Counter[int]:
    with Made() as recorder:
        train(scope, length)
    return recorder.sizes


@pytest.mark.parametrize("scope", SCOPES)
def test_no_operator_for_each_token(scope):
    """No tensor holds an r x r matrix for each token, in whatever shape."""
    assert [size for size in made(scope) if size % (BATCH * LENGTH * RANK**2) == 0] == []


@pytest.mark.parametrize("scope", SCOPES)
def test_linear_in_the_length(scope):
    """What a step makes beside plain LoRA's tensors, all of it together, grows by as much with every token."""
    added = [(made(scope, length) - made(None, length)).items() for length in (8, 16, 24)]
    short, middle, long = (sum(size * count for size, count in sizes) for sizes in added)
    assert middle > short
    assert long - middle == middle - short


def saved(scope: str | None) -> Counter[int]:
    """Elements of the distinct tensors that a step keeps for the backward pass."""
    storages: dict[int, Tensor] = {}  # the tensors, so that no storage is freed and its place used again

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        train(scope, LENGTH)
    return Counter(t.untyped_storage().nbytes() // t.itemsize for t in storages.values())


@pytest.mark.parametrize("scope", SCOPES)
def test_no_scaled_states_are_saved(scope):
    """Of the size of all atoms' states, M r numbers a token, a step keeps no more tensors than plain LoRA's."""
    added = saved(scope) - saved(None)
    assert added
    assert [size for size in added if size >= BATCH * LENGTH * ATOMS * RANK] == []
