"""Merging of adapters whose routes are fixed or static, where it differs from a LoRA's."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.fixed import close, random_routes, trained
from helpers.models import (
    LLAMA_PROJECTIONS,
    llama,
    outputs,
    text,
)
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import nn

from peft_queryable import (
    export_lora,
    fix_routes,
    use_instructions,
)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_static_adapters_need_no_routes(tmp_path):
    """An adapter whose query has no terms exports and merges as it is."""
    base, inputs = llama(), text()
    model = trained(copy.deepcopy(base), target_modules=["q_proj", "up_proj"], query_terms=())
    expected = outputs(model, inputs)
    export_lora(model, tmp_path / "lora")
    close(outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora"), inputs), expected)
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter()
    close(outputs(model, inputs), expected)
    synced = {n.replace(".base_layer", ""): p.data for n, p in model.named_parameters() if model.prefix not in n}
    target = copy.deepcopy(base)
    missing = target.load_state_dict({n.removeprefix("base_model.model."): p for n, p in synced.items()}, strict=True)
    assert not missing.missing_keys
    close(outputs(target, inputs), expected)  # what TRL sends to vLLM is the whole merged model
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in weights:
            close(parameter, weights[name])


def test_a_merged_adapter_takes_no_instruction():
    """In the weights it cannot follow one, so a call or a block that gives one raises."""
    model, inputs = trained(llama(), target_modules=["q_proj"], instruction_dim=5), text()
    embedding = torch.randn(1, 5)
    with fix_routes(model, random_routes(model)):
        model.merge_adapter()
    with pytest.raises(ValueError, match="are fixed"):
        model(**inputs, instruction_embeds=embedding)
    with pytest.raises(ValueError, match="are fixed"):
        model.generate(**inputs, instruction_embeds=embedding, max_new_tokens=1)
    with pytest.raises(ValueError, match="are fixed"), use_instructions(model, embedding):
        model(**inputs)
    model.unmerge_adapter()
    model(**inputs, instruction_embeds=embedding)


@pytest.mark.parametrize("leave", ["disable_adapter", "set_adapter"])
@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
def test_leaving_a_merged_adapter_unmerges_it(leave):
    """As with LoRA, disabling or setting adapters takes it out of the weights; from then on it is routed again."""
    base, inputs = llama(), text()
    plain = outputs(base, inputs)
    model = trained(copy.deepcopy(base), target_modules=LLAMA_PROJECTIONS)
    routed = outputs(model, inputs)
    with fix_routes(model, random_routes(model)):
        model.merge_adapter()
    if leave == "disable_adapter":
        with model.disable_adapter():
            close(outputs(model, inputs), plain)
    else:
        model.set_adapter("default")
    close(outputs(model, inputs), routed)


def test_conversion_of_pefts_own():
    """`convert_to_lora` takes an adapter with fixed routes, and approximates it; routed, it is refused."""
    model, inputs = trained(llama(), target_modules=["q_proj"], task_type="CAUSAL_LM"), text()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)
    with fix_routes(model, random_routes(model)):
        fixed = outputs(model, inputs)
        config, tensors = convert_to_lora(model, rank=4)
    lora = get_peft_model(model.unload(), config).eval()
    set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(outputs(lora, inputs), fixed, atol=1e-4, rtol=1e-4)


def test_a_merge_that_raises_half_way():
    """`safe_merge` refuses weights that are not finite; what it had merged is named, and can be taken out again."""
    model, inputs = trained(llama(), target_modules=["q_proj"]), text()
    routed = outputs(model, inputs)
    broken = model.base_model.model.model.layers[2].self_attn.q_proj.lora_B["default"].weight
    kept = broken.detach().clone()
    nn.init.constant_(broken, torch.nan)
    with fix_routes(model, random_routes(model)), pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(RuntimeError, match="merged in a part of its modules only"):
        outputs(model, inputs)
    model.unmerge_adapter()
    broken.data.copy_(kept)
    close(outputs(model, inputs), routed)
