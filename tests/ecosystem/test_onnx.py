"""`torch.onnx.export` of an adapted model, run by onnxruntime, as it runs a LoRA."""

from __future__ import annotations

import pytest
import torch
from helpers.fixed import trained
from helpers.models import llama
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_queryable.method.router import top_k_softmax

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

TARGETS = ["q_proj", "down_proj"]
FORMS = {
    f"{scope}, r {r}, M {num_atoms}": {"routing_scope": scope, "r": r, "num_atoms": num_atoms, "top_k": 2}
    for scope in ("causal", "sequence")
    for r, num_atoms in ((4, 8), (8, 3))
}


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class TopK(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return top_k_softmax(logits, 2)


@torch.no_grad()
def run(module: nn.Module, example: Tensor, inputs: Tensor, path) -> Tensor:
    torch.onnx.export(module.eval(), (example,), dynamo=True, verbose=False).save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


@pytest.mark.parametrize("form", ["lora", *FORMS])
def test_logits(form, tmp_path):
    """Other tokens than those it was traced with have the logits of PyTorch, routes and all."""
    if form == "lora":
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    else:
        model = trained(llama(), target_modules=TARGETS, **FORMS[form])
    module, example, inputs = Logits(model).eval(), *torch.randint(0, 30, (2, 2, 7))
    with torch.no_grad():
        expected = module(inputs)
    torch.testing.assert_close(run(module, example, inputs, tmp_path / "model.onnx"), expected, atol=1e-5, rtol=0)


def test_ties(tmp_path):
    """Equal logits are taken in index order there too."""
    logits = torch.tensor([[1.0, 1, 1, 1, 0, 1], [0, 3, 2, 2, 2, 2], [2, 1, 0, 2, 2, 1]])
    actual = run(TopK(), torch.randn(3, 6), logits, tmp_path / "model.onnx")
    torch.testing.assert_close(actual, top_k_softmax(logits, 2))
