"""Models whose layers lie on different devices, or in part on disk."""

from __future__ import annotations

import pytest
import torch
from helpers.models import CACHE, LAYERS, adapted, llama, outputs, randomise, text, token_ids
from peft import PeftModel, load_peft_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

DEVICES = ("cpu", "meta")  # two that need no accelerator; fake tensors compute nothing, and refuse to mix devices


def fake(module: nn.Module, device: str) -> None:
    """Replace all tensors of `module` by fakes on `device`."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        tensors[name] = nn.Parameter(tensors[name], tensor.requires_grad)


def place(module: nn.Module, device: str) -> None:
    """Put `module` on `device`, and let its calls move what they are given there, as accelerate does."""
    fake(module, device)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*to(args, device), **to(kwargs, device))


def to(values, device: str):
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), values)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("tokens", ["padded", "packed"])
@pytest.mark.parametrize("scope", ["causal", "prompt", "sequence"])
def test_split_layers(scope, tokens, first):
    """Forward, backward and cached steps meet no tensors of two devices; gradients lie beside their parameters."""
    config = {"target_modules": "all-linear", "routing_scope": scope, "instruction_dim": 4}
    model = adapted(llama(attn_implementation="eager"), **config)
    causal_lm = model.get_base_model()
    front, back = DEVICES[first], DEVICES[1 - first]
    # seq_idx, because fakes do not tell whether positions restart
    positions, sequences = torch.tensor([[0, 1, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1, 1]])
    packed = {"input_ids": token_ids(1, 5), "position_ids": positions, "seq_idx": sequences}
    inputs = text() if tokens == "padded" else packed
    labels = inputs["input_ids"].clone()
    labels[:, :2] = -100
    with FakeTensorMode(allow_non_fake_inputs=True):
        place(causal_lm, front)
        for module in (*causal_lm.model.layers[2:], causal_lm.model.norm, causal_lm.lm_head):
            place(module, back)
        router = model.base_model.queryable_lora_router.default  # which an automatic device map may cut
        fake(router, "cpu")
        fake(router.keys, "meta")  # where the router computes
        result = model.train()(
            **inputs, labels=labels, instruction_embeds=torch.randn(len(labels), 4), use_cache=False
        )
        result.loss.backward()
        assert all(p.grad.device == p.device for p in model.parameters() if p.requires_grad)
        if tokens == "padded":
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            cache = model.eval()(**inputs, use_cache=True)[CACHE]
            model(input_ids=ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], 1), **{CACHE: cache})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A saved tiny Llama; PEFT writes its offloaded copy below the working directory."""
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained(tmp_path / "base")
    return tmp_path


def offloaded(folder, disk: list[int]) -> nn.Module:
    """The model of `folder` with the layers `disk` on disk."""
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(names, "cpu")
    device_map |= {f"model.layers.{i}": "disk" if i in disk else "cpu" for i in range(LAYERS)}
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=device_map, offload_folder=folder / "offload"
    )


def load(base: nn.Module, folder, router: str = "cpu") -> PeftModel:
    """`base` with the adapter of `folder`, everything where `base` has it."""
    device_map = {f"base_model.model.{name}": device for name, device in base.hf_device_map.items()}
    device_map["base_model.queryable_lora_router"] = router
    return PeftModel.from_pretrained(base, folder / "adapter", device_map=device_map, offload_dir=folder)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter in the checkpoint:UserWarning")
@pytest.mark.parametrize("disk", [[0, 2], [1, 2, 3]])
@pytest.mark.parametrize("scope", ["causal", "prompt"])
def test_disk_offload(folder, disk, scope):
    """An adapter loaded onto a model that is in part on disk answers as on one in memory, and can be saved again."""
    model = adapted(
        AutoModelForCausalLM.from_pretrained(folder / "base"), target_modules="all-linear", routing_scope=scope
    )
    randomise(model)
    inputs = text()
    expected = outputs(model, inputs)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    model.save_pretrained(folder / "adapter")
    loaded = load(offloaded(folder, disk), folder)
    assert any(p.is_meta for p in loaded.parameters())
    assert torch.equal(outputs(loaded, inputs), expected)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
    loaded.save_pretrained(folder / "again")
    first, second = (load_peft_weights(folder / name, device="cpu") for name in ("adapter", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter in the checkpoint:UserWarning")
def test_router_on_disk_is_refused(folder):
    """PEFT saves no tensors of the tuner itself for accelerate to find; the error says where the router may go."""
    adapted(llama(), target_modules="all-linear").save_pretrained(folder / "adapter")
    with pytest.raises(ValueError, match=r"atoms.weight.* give `base_model.queryable_lora_router` a device"):
        load(offloaded(folder, [1]), folder, router="disk")


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter in the checkpoint:UserWarning")
def test_new_adapter_on_disk_is_refused(folder):
    """PEFT makes adapters of offloaded layers without data: an error names the layer and the way that works."""
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj' .*on disk.*PeftModel\.from_pretrained"):
        adapted(offloaded(folder, [1]), target_modules="all-linear")
    adapted(llama(), target_modules="all-linear").save_pretrained(folder / "adapter")
    loaded = load(offloaded(folder, [1]), folder)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj' .*on disk"):
        loaded.load_adapter(folder / "adapter", "second")
