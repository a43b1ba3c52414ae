"""The entries for PEFT's method comparison: configurations as PEFT reads them."""

import pytest
import torch
from helpers.recipes import ROOT
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

FOLDERS = sorted(ROOT.glob("recipes/method_comparison/MetaMathQA/experiments/*/*"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_entry_is_a_configuration_that_peft_reads(folder):
    """It adapts what the comparison's LoRA adapts, at its rank and alpha."""
    config = PeftConfig.from_pretrained(folder)
    assert type(config).__name__ == "QueryableLoraConfig" and (config.r, config.lora_alpha) == (32, 64)
    assert (config.query_terms == ()) == folder.name.endswith("static")
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
        )
    model = get_peft_model(base, config)
    assert model.targeted_module_names == [
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(4) for name in ("q", "v")
    ]


def test_there_are_entries():
    assert [folder.name for folder in FOLDERS] == ["llama-3.2-3B-rank32", "llama-3.2-3B-rank32-static"]
