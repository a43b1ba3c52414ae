"""What `auto` means in every stack of every model class of the installed transformers."""

import pytest
import transformers
from helpers.scopes import TABLE, model_classes, scopes, table

# Stacks whose outputs predict or generate a later token, or are the heads of such stacks.
CAUSAL = {
    "PaliGemmaForConditionalGeneration": "model.language_model",
    "RoFormerForCausalLM": "roformer.encoder",
    "BlipForConditionalGeneration": "text_decoder.bert.encoder",
    "GitForCausalLM": "git.encoder",
    "LEDForConditionalGeneration": "led.decoder",
    "PegasusXForConditionalGeneration": "model.decoder",
    "FSMTForConditionalGeneration": "model.decoder",
    "NllbMoeForConditionalGeneration": "model.decoder",
    "ModernBertDecoderForCausalLM": "model",
    "ImageGPTForCausalImageModeling": "transformer",
    "BertLMHeadModel": "cls.predictions.transform",
    "BertForSequenceClassification": None,
    "BigBirdModel": None,
    "ViTModel": None,
}


@pytest.mark.parametrize("name", CAUSAL)
def test_known_stacks(name):
    """Decoders of every kind are causal, their heads included; encoders that cannot generate are not."""
    found = scopes(name)
    if CAUSAL[name] is None:
        assert set(found.values()) == {"sequence"}
    else:
        assert found[CAUSAL[name]] == "causal"


@pytest.mark.filterwarnings("ignore")  # default configurations set off all kinds of them
def test_table(caplog):
    """The scopes are those of the table, which somebody has read: a change shows the classes that it moves."""
    transformers.logging.set_verbosity_error()
    kept = dict(line.split(" | ", 1) for line in TABLE.read_text().splitlines())
    made = dict(line.split(" | ", 1) for line in table(model_classes()))
    assert len(made.keys() & kept.keys()) > 500  # optional packages decide what can be built
    assert {name: made[name] for name in made.keys() & kept.keys() if made[name] != kept[name]} == {}


def test_generating_towers_only_are_sequence():
    """In classes that generate, only encoders, towers and cross-attention to them are `sequence`."""
    words = ("encoder", "vision", "visual", "audio", "image", "tower", "resampler", "token2wav", "cross-attention")
    others = {}
    for line in TABLE.read_text().splitlines():
        name, *parts = line.split(" | ")
        stacks = [stack for part in parts if part.startswith("sequence: ") for stack in part[10:].split(", ")]
        unknown = [stack for stack in stacks if not any(word in stack for word in words)]
        if unknown and getattr(transformers, name).can_generate():
            others[name] = unknown
    assert others == {}
