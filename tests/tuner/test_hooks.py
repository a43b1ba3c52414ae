"""Hooks on the factors: pruning makes their weights in hooks, and gradients per example are read in hooks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from helpers.models import adapted, llama, outputs, randomise, text
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
METHODS = {
    "lora": lambda base: get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS)).eval(),
    "queryable": lambda base: adapted(base, target_modules=TARGETS),
}


@pytest.fixture(params=METHODS)
def model(request) -> nn.Module:
    """A random adapter in float64: plain LoRA is the control."""
    model = METHODS[request.param](llama(num_hidden_layers=2).double())
    randomise(model)
    return model


def factors(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("lora_A.default")]


def test_pruned_factors_are_those_of_this_call(model):
    """After a step the outputs are those of the new pruned weights in the first call, and a step can follow."""
    inputs = text()
    for factor in factors(model):
        torch.nn.utils.prune.l1_unstructured(factor, "weight", amount=0.5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    first = outputs(model, inputs)
    assert torch.equal(first, outputs(model, inputs))
    for factor in factors(model):
        torch.nn.utils.prune.remove(factor, "weight")
    torch.testing.assert_close(first, outputs(model, inputs), rtol=0, atol=1e-10)


def test_gradients_per_example_add_up(model):
    """Of inputs and output gradients that hooks see of A, gradients per example add up to the gradient of A."""
    gradients = {factor: torch.zeros(2, *factor.weight.shape).double() for factor in factors(model)}

    def forward(module: nn.Module, args: tuple, output: Tensor) -> None:
        def backward(gradient: Tensor) -> None:
            gradients[module] += torch.einsum("btr,btd->brd", gradient, args[0].detach())

        output.register_hook(backward)

    for factor in gradients:
        factor.register_forward_hook(forward)
    inputs = text()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for factor, gradient in gradients.items():
        torch.testing.assert_close(gradient.sum(0), factor.weight.grad, rtol=0, atol=1e-10)


def test_hooks_on_B_see_its_output(model):
    """A forward hook may keep what B gave, and a full backward hook, whose output is a view, may stand there."""
    kept = {}

    def keep(module: nn.Module, args: tuple, output: Tensor) -> None:
        kept[module] = (args[0], output)

    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(keep)
            module.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    inputs = text()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(kept) == len(factors(model))
    for module, (x, output) in kept.items():
        torch.testing.assert_close(output, x @ module.weight.T, rtol=0, atol=1e-12)
