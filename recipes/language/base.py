"""The tiny Llama that all adapters start from, and how it learns its skills."""

from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.language.skills import VOCABULARY, skill_lines
from recipes.language.stacked import Stacked, train


def new_base() -> LlamaForCausalLM:
    """4 layers of width 64: 0.17 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        attn_implementation="eager",  # the other implementations have no batching rule
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def pretrain(seeds: Sequence[int], steps: int, batch: int, advance: Callable[[], object]) -> list[LlamaForCausalLM]:
    """One base per seed."""
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(new_base())
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stacked = Stacked(models)
    train(
        stacked,
        3e-3,
        steps,
        lambda: torch.stack([skill_lines(batch, g) for g in generators]),
        torch.zeros(batch),
        advance,
    )
    for i, model in enumerate(models):
        model.load_state_dict({name: tensor[i] for name, tensor in stacked.parameters.items()})
    return models
