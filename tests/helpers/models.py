"""Tiny random models of the architectures that the tests run, with inputs for each, and small helpers on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_queryable import QueryableLoraConfig
from peft_queryable.calls.arguments import parameter_names
from peft_queryable.method.router import Router
from peft_queryable.tuner.layer import QueryableLoraLayer

# What models call their key/value cache: another name since transformers 5.24.
CACHE = "cache" if "cache" in parameter_names(transformers.LlamaForCausalLM) else "past_key_values"
VOCAB = 64
LAYERS = 4
TARGETS = ["q_proj", "v_proj", "down_proj"]  # of the fixtures `model` and `folder`
LLAMA_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BANK = {"atoms", "keys", "block_prior", "state_query", "depth_value", "depth_query", "depth_key"}
INSTRUCTION = {"default_instruction", "instruction_query", "instruction_prior"}
ROUTER_KEY = "base_model.queryable_lora_router."


class MLP(nn.Module):
    """Four linear layers in a row, without a repeated-layer list: [..., 8] -> [..., 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = torch.tanh(layer(x))
        return self.head(x)


def llama(**kwargs) -> nn.Module:
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | kwargs))).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.OPTForCausalLM(config).eval()


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    return transformers.BertForSequenceClassification(config).eval()


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTForImageClassification(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    )
    return transformers.BartForConditionalGeneration(config).eval()


def mlp() -> nn.Module:
    return MLP().eval()


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def token_ids(batch: int = 2, length: int = 6) -> Tensor:
    """Ids [B, T], none of them special."""
    return torch.randint(3, VOCAB, (batch, length))


def text() -> dict[str, Tensor]:
    """Two rows of six tokens, the second with two of padding at its end."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": token_ids(), "attention_mask": mask}


@dataclass(frozen=True)
class Architecture:
    """A model to test, with inputs, and the targets that reach all its adaptable modules.

    Args:
        build: makes the model.
        inputs: makes the keyword arguments of a call.
        targets: `target_modules`, by their names.
        exclude: `exclude_modules`.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: list[str]
    exclude: list[str] | None = None


ARCHITECTURES = {
    "llama": Architecture(llama, text, LLAMA_PROJECTIONS),
    "gpt2": Architecture(gpt2, text, ["c_attn", "c_proj", "c_fc"]),
    "opt": Architecture(opt, text, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    "bert": Architecture(bert, text, ["query", "key", "value", "dense"]),
    "vit": Architecture(vit, lambda: {"pixel_values": torch.randn(2, 3, 8, 8)}, ["q_proj", "k_proj", "v_proj", "fc1"]),
    "t5": Architecture(t5, lambda: text() | {"decoder_input_ids": token_ids(length=5)}, ["q", "k", "v", "o", "wi"]),
    "mlp": Architecture(mlp, lambda: {"x": torch.randn(5, 8)}, ["first", "second", "third"]),
    "sequential": Architecture(sequential, lambda: {"input": torch.randn(5, 8)}, ["0", "2"]),
}


def adapted(model: nn.Module, **kwargs) -> PeftModel:
    """`model` with a new adapter `default`, in eval mode and not yet trained; `kwargs` are its configuration."""
    config = {"r": 4, "num_atoms": 6, "top_k": 3, "router_dim": 8} | kwargs
    return get_peft_model(model, QueryableLoraConfig(**config)).eval()


def randomise(model: nn.Module, adapter: str = "default", scale: float = 0.3) -> None:
    """Give every parameter that `adapter` learns random values, so that its update is not zero."""
    for parameter in learned(model, adapter):
        nn.init.normal_(parameter, std=scale)


def learned(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    """Parameters that `adapter` can learn: all but the default instruction."""
    parameters = [(name, p) for name, p in model.named_parameters() if f".{adapter}." in name]
    return [p for name, p in parameters if not name.endswith(f".{adapter}.default_instruction.weight")]


def close_gates(model: nn.Module) -> None:
    """Put every gate at a logit so low that g = 0 to the bit."""
    for layer in model.modules():
        if isinstance(layer, QueryableLoraLayer):
            for gate in layer.queryable_lora_gate.values():
                nn.init.constant_(gate.weight, -1e4)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a transformers model, output of another."""
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result.logits


def router_of(model: PeftModel, adapter: str = "default") -> Router:
    return model.base_model.queryable_lora_router[adapter]


def assert_one_router(model: PeftModel, adapter: str = "default") -> None:
    """All adapted modules of `adapter` route through the one router that the tuner owns, and it owns every tensor."""
    layers = [module for module in model.modules() if isinstance(module, QueryableLoraLayer)]
    layers = [layer for layer in layers if adapter in layer.lora_A]
    assert layers
    for layer in layers:
        assert layer.places[adapter].stack.plans[adapter].router is router_of(model, adapter)
    owned = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in router_of(model, adapter).parameters()} <= owned


def train_step(model: nn.Module, inputs: dict, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def two_adapters() -> PeftModel:
    """An MLP with adapters `one` and `two`, of other ranks, banks, scopes and targets, both random."""
    config = QueryableLoraConfig(r=4, num_atoms=6, router_dim=8, target_modules=["first", "third"])
    model = get_peft_model(mlp(), config, adapter_name="one")
    other = QueryableLoraConfig(
        r=2, num_atoms=3, top_k=2, router_dim=4, target_modules=["second", "third"], routing_scope="causal"
    )
    model.add_adapter("two", other)
    randomise(model, "one")
    randomise(model, "two")
    return model.eval()


def alone(model: PeftModel, adapter: str) -> PeftModel:
    """A model with nothing but `adapter` of `model`, on the same base."""
    result = get_peft_model(
        copy.deepcopy(model).unload(), copy.deepcopy(model.peft_config[adapter]), adapter_name=adapter
    )
    missing, _ = result.load_state_dict(model.state_dict(), strict=False)
    assert not [name for name in missing if f".{adapter}." in name]
    return result.eval()
