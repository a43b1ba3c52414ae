"""transformers' export for Executorch: one graph for every step of a static cache."""

from __future__ import annotations

import pytest
import torch
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, randomise, token_ids
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig
from transformers.integrations.executorch import convert_and_export_with_cache

from peft_queryable import fix_routes, mean_routes, record_routing

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export's own


def base() -> nn.Module:
    model = llama(num_hidden_layers=2)
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": 8}
    )
    return model


def export(model: nn.Module) -> torch.export.ExportedProgram:
    return convert_and_export_with_cache(
        model, example_input_ids=token_ids(1, 1), example_cache_position=torch.tensor([0])
    )


def test_lora_is_exported():
    export(get_peft_model(base(), LoraConfig(r=4, target_modules=LLAMA_PROJECTIONS)).eval().get_base_model())


@pytest.mark.parametrize("scope", ["causal", "prompt"])
def test_routed_steps_are_refused(scope):
    """No graph of a single step carries what routes need; merged under fixed routes the model is exported."""
    model = adapted(base(), target_modules=LLAMA_PROJECTIONS, routing_scope=scope)
    randomise(model)
    with pytest.raises(Exception, match=r"Steps of a static cache cannot be exported with an adapter: .* Merge"):
        export(model.get_base_model())
    with record_routing(model) as trace:
        model(input_ids=token_ids(), prompt_mask=torch.ones_like(token_ids()))
    with fix_routes(model, mean_routes(trace)):
        merged = model.merge_and_unload()
    program = export(merged)
    step = {"input_ids": token_ids(1, 1), "cache_position": torch.tensor([0])}
    expected = merged(input_ids=step["input_ids"], use_cache=False).logits
    torch.testing.assert_close(program.module()(**step), expected, rtol=0, atol=1e-5)
