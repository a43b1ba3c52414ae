"""Initialisations of PEFT's LoRA: the model starts as its base, learns, and loads as it was."""

import copy

import pytest
import torch
from helpers.models import (
    LLAMA_PROJECTIONS,
    adapted,
    llama,
    outputs,
    randomise,
    router_of,
    sgd,
    text,
    token_ids,
    train_step,
)
from peft import EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_queryable.config import INITIALISATIONS, MOVING_INITIALISATIONS, QueryableLoraConfig

KEEPING = [init for init in INITIALISATIONS if init is not False]  # the function of the model
RANDOM_B = ("orthogonal", *MOVING_INITIALISATIONS)
# Of EVA: what it suggests is tested below.
pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage:UserWarning")


def initialised(base: nn.Module, init: str | bool, **kwargs) -> PeftModel:
    if init == "eva":
        kwargs["eva_config"] = EvaConfig(rho=1.0)
    return adapted(base, target_modules=LLAMA_PROJECTIONS, init_lora_weights=init, **kwargs)


def base_weights(model: PeftModel) -> list[Tensor]:
    return [layer.get_base_layer().weight for layer in model.modules() if isinstance(layer, LoraLayer)]


def data() -> list[dict[str, Tensor]]:
    """Enough batches for EVA's components to converge."""
    return [{"input_ids": token_ids(4, 12), "attention_mask": torch.ones(4, 12, dtype=torch.long)} for _ in range(12)]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 16}], ids=["plain", "rslora"])
@pytest.mark.parametrize("init", KEEPING, ids=str)
def test_the_model_starts_as_its_base(init, settings):
    """A new adapter leaves the function of the model as it was, up to rounding."""
    model, inputs = llama(), text()
    expected = outputs(model, inputs)
    torch.testing.assert_close(outputs(initialised(model, init, **settings), inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", KEEPING, ids=str)
def test_what_starts_at_zero(init):
    """Either B or the atoms start at zero, never both: one of them has to give the other a gradient."""
    model = initialised(llama(), init)
    zeros = [not tensor.any() for name, tensor in model.state_dict().items() if "lora_B" in name]
    assert set(zeros) == {init not in RANDOM_B}
    assert router_of(model).atoms.weight.any() == (init not in RANDOM_B)


@pytest.mark.parametrize("init", INITIALISATIONS, ids=str)
def test_it_learns_and_loads(init, tmp_path):
    """All of the adapter moves within three steps, and a saved adapter loads to the same outputs, bit by bit."""
    base, inputs = llama(), text()
    model = initialised(copy.deepcopy(base), init, top_k=None).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = [train_step(model, inputs, optimizer) for _ in range(3)]
    assert losses[2] < losses[0]
    assert [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])] == []
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert all(map(torch.equal, base_weights(loaded), base_weights(model)))


@pytest.mark.parametrize("init", MOVING_INITIALISATIONS)
def test_moved_base_weights(init):
    """OLoRA and PiSSA take B A out of the base weights, so that a disabled adapter is not the base model."""
    base, inputs = llama(), text()
    model = initialised(copy.deepcopy(base), init, lora_alpha=6)
    for name, layer in ((n, m) for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)):
        update = 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(layer.get_base_layer().weight + update, base.get_submodule(name).weight)
    with model.disable_adapter():
        assert not torch.allclose(outputs(model, inputs), outputs(base, inputs), atol=1e-2)


@pytest.mark.parametrize("init", MOVING_INITIALISATIONS)
def test_moved_base_weights_are_for_one_adapter(init):
    """Beside another adapter, a second one that moves the base weights, or that finds them moved, is refused."""
    config = QueryableLoraConfig(r=4, target_modules=LLAMA_PROJECTIONS, init_lora_weights=init)
    plain = QueryableLoraConfig(r=4, target_modules=LLAMA_PROJECTIONS)
    inputs = text()
    for first, second in ((config, plain), (plain, config)):
        model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, init_lora_weights=first.init_lora_weights)
        randomise(model)
        expected = outputs(model, inputs)
        with pytest.raises(ValueError, match=r"several adapters.*'(default|other)'\] is: they change the base"):
            model.add_adapter("other", copy.deepcopy(second))
        assert torch.equal(outputs(model, inputs), expected)
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("init", MOVING_INITIALISATIONS)
def test_moved_base_weights_are_no_empty_ones(init, tmp_path):
    """With `low_cpu_mem_usage=True` there would be nothing to decompose: refused, before the base is changed."""
    base, inputs = llama(), text()
    initialised(copy.deepcopy(base), init).save_pretrained(tmp_path)
    expected = outputs(base, inputs)
    with pytest.raises(ValueError, match=rf"'default' was made with `init_lora_weights='{init}'`.*mem_usage=False"):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(outputs(base, inputs), expected)


@pytest.mark.parametrize("init", [i for i in INITIALISATIONS if i not in MOVING_INITIALISATIONS], ids=str)
def test_others_load_into_empty_weights(init, tmp_path):
    """All other initialisations load with `low_cpu_mem_usage=True`, to the same outputs, bit by bit."""
    base, inputs = llama(), text()
    model = initialised(copy.deepcopy(base), init)
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_orthogonal_wants_an_even_rank():
    """PEFT's refusal of an odd rank comes through."""
    with pytest.raises(ValueError, match="rank to be even, got 3"):
        initialised(llama(), "orthogonal", r=3)


# EVA


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_eva(low_cpu_mem_usage, tmp_path):
    """PEFT's EVA puts orthonormal components of the inputs into A; the model stays its base, trains, and loads."""
    base, inputs = llama(), text()
    expected = outputs(base, inputs)
    config = {"r": 3, "num_atoms": 6, "router_dim": 8, "init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}
    config = QueryableLoraConfig(target_modules=["q_proj", "down_proj"], **config)
    model = get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=low_cpu_mem_usage)
    initialize_lora_eva_weights(model, data(), show_progress_bar=False)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    for name, A in model.named_parameters():
        if "lora_A" in name:
            torch.testing.assert_close(A @ A.T, torch.eye(3), rtol=0, atol=1e-4)
    assert torch.equal(outputs(model.eval(), inputs), expected)
    train_step(model.train(), inputs, sgd(model))
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_eva_with_other_ranks_is_refused():
    """Components of another number than the rank raise a ValueError with both."""
    model = initialised(llama(), "eva")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=r"'default' has rank r=4 in all its modules, got 5 for one"):
        initialize_lora_eva_weights(model, eva_state_dict={name: torch.randn(5, 32)})
