"""No generative model of transformers lets a later token move earlier logits through its routes."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from helpers.models import VOCAB, adapted, outputs, randomise
from helpers.scopes import model_classes
from helpers.tiny import LENGTH, inputs, tiny
from helpers.untried import UNTRIED
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")  # of third parties, about models this small
KEPT = LENGTH // 2  # tokens that stay as they are
# Modules that a call refuses by name: loose vectors, tokens picked out of several rows, tokens of a cache.
REFUSED = ["audio_latent_proj", "num_speakers_proj", "duration_delta_proj", "v_proj_delayed"]
REFUSED += ["audio_mlp.gate_proj", "audio_mlp.up_proj", "audio_mlp.down_proj"]
UNKNOWN_TO_LORA = ["router", "o_a_proj", "o_b_proj"]  # no linear layers, though of a subclass


def generative() -> list[str]:
    """Names of the model classes that can generate tokens."""
    untried = {name for names in UNTRIED.values() for name in names.split()}
    classes = {name: getattr(transformers, name) for name in model_classes() if name not in untried}
    parameters = {name: inspect.signature(cls.forward).parameters for name, cls in classes.items()}
    return [
        name
        for name, cls in classes.items()
        if cls.can_generate() and ("input_ids" in parameters[name] or "decoder_input_ids" in parameters[name])
    ]


def leak(model: nn.Module, given: dict[str, Tensor]) -> float:
    """How far the logits of the first tokens move when later ones change."""
    randomise(model)
    name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    before = outputs(model, given)
    assert before.isfinite().all()
    changed = given[name].clone()
    changed[:, KEPT:] = 3 + (changed[:, KEPT:] - 2) % (VOCAB - 4)
    after = outputs(model, {**given, name: changed})
    assert not torch.equal(after, before)
    return (after - before)[:, :KEPT].abs().max().item()


@pytest.mark.parametrize("name", generative())
def test_later_tokens_move_no_earlier_logits(name):
    """As far as with plain LoRA on the same model, which is not at all but for rounding."""
    base = tiny(name)
    given = inputs(base)
    lora = LoraConfig(r=4, target_modules="all-linear", exclude_modules=[*REFUSED, *UNKNOWN_TO_LORA, "out_proj"])
    expected = leak(get_peft_model(tiny(name), lora).eval(), given)
    rounding = 1e-12 if next(base.parameters()).dtype == torch.float64 else 1e-6
    assert expected <= rounding
    assert leak(adapted(base, target_modules="all-linear", exclude_modules=REFUSED), given) <= rounding


def test_untried_classes_are_of_transformers():
    """The list of what is not tried holds no class twice and, where transformers has it, none that cannot generate."""
    names = [name for names in UNTRIED.values() for name in names.split()]
    assert len(set(names)) == len(names)
    assert all(getattr(transformers, name).can_generate() for name in names if name in model_classes())
