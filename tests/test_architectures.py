"""Each supported architecture: what the table of docs/architectures.md says of it.

`--write-table` (see conftest.py) writes that table from the outcome of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.architectures import ARCHITECTURES, Architecture
from helpers.models import VOCAB, adapted, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_queryable import QueryableLoraConfig

ROUNDING = 1e-5  # of float32, in logits of about 1 after four layers and as many routes
pytestmark = pytest.mark.filterwarnings("ignore")  # of third parties, about models this small


def result(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def build(architecture: Architecture, config_class=QueryableLoraConfig) -> PeftModel:
    """The architecture with a trained-looking adapter, always the same."""
    torch.manual_seed(0)
    sizes = {"num_atoms": 6, "top_k": 3, "router_dim": 8} if config_class is QueryableLoraConfig else {}
    config = config_class(r=4, target_modules=architecture.targets, **sizes)
    model = get_peft_model(architecture.build().eval(), config).eval()
    randomise(model, scale=architecture.scale)
    return model


def assert_equal_as_lora(architecture: Architecture, difference: Callable[[PeftModel], float]) -> None:
    """What `difference` finds is rounding: nothing more than with plain LoRA, but for a router's share of it."""
    assert difference(build(architecture)) <= 4 * difference(build(architecture, LoraConfig)) + ROUNDING


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    architecture = ARCHITECTURES[request.param]
    if architecture.missing:
        pytest.skip(architecture.missing)
    return architecture


def test_identity(architecture):
    """`auto` finds the scopes; a new adapter leaves the output as plain LoRA's new adapter does: as it was."""
    torch.manual_seed(0)
    model, inputs = architecture.build().eval(), architecture.inputs()
    expected = result(model, inputs)
    model = adapted(model, target_modules=architecture.targets)
    scopes = {str(key): stack.plans["default"].scope.name for key, stack in model.base_model.stacks.by_key.items()}
    assert scopes == {name or "the model": scope for name, scope in architecture.scopes.items()}
    with model.disable_adapter():  # T5 moves by a rounding as soon as its modules are wrapped, by LoRA too
        wrapped = result(model, inputs)
    torch.testing.assert_close(wrapped, expected)
    assert torch.equal(result(model, inputs), wrapped)


def test_gradients(architecture):
    """Every trainable tensor of a module that runs gets a gradient."""
    model = build(architecture)
    unused = unused_modules(model, architecture.inputs())
    output = model(**architecture.inputs())
    (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = {name for name, p in parameters.items() if p.grad is None and not name.startswith(unused)}
    assert not missing
    assert all(p.grad.isfinite().all() for p in parameters.values() if p.grad is not None)
    assert all(p.grad.abs().max() > 0 for name, p in parameters.items() if "router.default.atoms" in name)


def unused_modules(model: PeftModel, inputs: dict[str, Tensor]) -> tuple[str, ...]:
    """Names of adapted modules that a call does not run, as a pooler whose output nobody asks for."""
    ran, hooks = set(), []
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "queryable_lora_gate")}
    for name, module in layers.items():
        hooks.append(module.register_forward_hook(lambda *_, name=name: ran.add(name)))
    result(model, inputs)
    for hook in hooks:
        hook.remove()
    return tuple(name for name in layers if name not in ran) or ("nothing",)


def test_reload(architecture, tmp_path):
    """A saved adapter gives the same output, to the bit where plain LoRA's does (not in Mamba)."""
    inputs = architecture.inputs()

    def difference(model) -> float:
        model.save_pretrained(tmp_path, save_embedding_layers="auto" if "input_ids" in inputs else False)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(architecture.build().eval(), tmp_path).eval()
        return (result(loaded, inputs) - result(model, inputs)).abs().max().item()

    assert difference(build(architecture)) <= 4 * difference(build(architecture, LoraConfig))


def test_cache(architecture):
    """Cached generation gives the tokens of uncached, and the same logits."""
    if not architecture.generates:
        pytest.skip("does not generate")
    torch.manual_seed(1)
    inputs = architecture.inputs()
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings |= {"suppress_tokens": [VOCAB - 1], "output_logits": True, "return_dict_in_generate": True}

    def difference(model) -> float:
        runs = [model.generate(**inputs, **settings, use_cache=use_cache) for use_cache in (True, False)]
        assert torch.equal(runs[0].sequences, runs[1].sequences)
        return (torch.stack(runs[0].logits) - torch.stack(runs[1].logits)).abs().max().item()

    assert_equal_as_lora(architecture, difference)


def test_padding(architecture):
    """A padded row gets what it gets alone."""
    if not architecture.pads:
        pytest.skip("has no padding")
    torch.manual_seed(1)
    inputs = architecture.inputs()
    alone = {name: tensor[1:] for name, tensor in inputs.items()}
    alone |= {"input_ids": alone["input_ids"][:, :5], "attention_mask": alone["attention_mask"][:, :5]}
    inputs["input_ids"][1, 5:] = inputs["attention_mask"][1, 5:] = 0

    def difference(model) -> float:
        expected = result(model, alone)
        return (result(model, inputs)[1:, : expected.shape[1]] - expected).abs().max().item()

    assert_equal_as_lora(architecture, difference)


def test_table_of_the_docs():
    """The table of the docs lists every architecture tested here."""
    table = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text()
    for name, architecture in ARCHITECTURES.items():
        assert f"| {name} |" in table
        assert architecture.note in table
