"""The outermost call of a model: by whatever door it comes, and the instruction that it brings."""

from functools import partial

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.models import CACHE, LLAMA_PROJECTIONS, adapted, llama, outputs, randomise, text, token_ids


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_doors_of_a_call(task_type):
    """Through PeftModel, its class for the task, the tuner or the base model, the same call gives the same logits."""
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, instruction_dim=5, task_type=task_type)
    randomise(model)
    inputs = text() | {"instruction_embeds": torch.randn(2, 5)}
    expected = outputs(model, inputs)
    for door in (model.base_model, model.base_model.model, model.get_base_model()):
        assert torch.equal(outputs(door, inputs), expected)
    positional = model(inputs["input_ids"], inputs["attention_mask"], instruction_embeds=inputs["instruction_embeds"])
    assert torch.equal(positional.logits, expected)


# Instructions


def test_instruction_moves_the_outputs(model):
    """An instruction changes the outputs of its row, and of no other."""
    inputs = text()
    plain = outputs(model, inputs)
    embeds = torch.stack([5 * torch.randn(5), torch.zeros(5)])
    instructed = outputs(model, inputs | {"instruction_embeds": embeds})
    assert not torch.allclose(instructed[0], plain[0], atol=1e-3)
    torch.testing.assert_close(instructed[1], plain[1])


def test_one_instruction_for_all_rows(model):
    """[1, d_c] is the same as a row for each example."""
    inputs, embeds = text(), torch.randn(1, 5)
    one = outputs(model, inputs | {"instruction_embeds": embeds})
    torch.testing.assert_close(one, outputs(model, inputs | {"instruction_embeds": embeds.expand(2, -1)}))


def test_an_instruction_is_for_one_call(model):
    """After a call with an instruction, or one that failed, the next call has none."""
    inputs = text()
    expected = outputs(model, inputs)
    outputs(model, inputs | {"instruction_embeds": torch.randn(2, 5)})
    assert torch.equal(outputs(model, inputs), expected)
    with pytest.raises(ValueError, match="instructions"):
        outputs(model, inputs | {"instruction_embeds": torch.randn(3, 5)})
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}, {}], ids=str)
def test_instructions_follow_generation(model, settings):
    """Each row keeps its own instruction through all steps, however often `generate` repeats rows."""
    ids, embeds = token_ids(2, 3), 5 * torch.randn(2, 5)
    settings = settings | {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = [
        model.generate(input_ids=ids[row : row + 1], instruction_embeds=embeds[row : row + 1], **settings)
        for row in range(2)
    ]
    assert torch.equal(model.generate(input_ids=ids, instruction_embeds=embeds, **settings), torch.cat(alone))
    swapped = model.generate(input_ids=ids, instruction_embeds=embeds.flip(0), **settings)
    assert not torch.equal(swapped, torch.cat(alone))


@pytest.mark.parametrize(
    "embeds",
    [torch.randn(2, 4), torch.randn(5), torch.randn(2, 1, 5), torch.randn(3, 5), [[0.0] * 5] * 2],
    ids=["width", "one axis", "three axes", "rows", "list"],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_wrong_instruction_is_refused(model, embeds, call):
    """`instruction_embeds` of another shape or kind raises a ValueError that says what fits."""
    function = model if call == "forward" else partial(model.generate, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"`instruction_embeds`.*\[batch, 5\]|3 instructions.*batch size 2"):
        function(input_ids=token_ids(), instruction_embeds=embeds)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_instruction_to_an_adapter_without(call):
    """An adapter that takes no instruction raises a ValueError that says so."""
    model = adapted(llama(), target_modules=["q_proj"])
    function = model if call == "forward" else model.generate
    with pytest.raises(ValueError, match=r"`instruction_embeds`.*'default' takes no instruction.*`instruction_dim"):
        function(input_ids=token_ids(), instruction_embeds=torch.randn(2, 5))


# Prompts that are not what a route was made from


@pytest.mark.parametrize("scope", ["prompt", "sequence"])
@pytest.mark.parametrize("setting", [{"guidance_scale": 1.5}, {"prefill_chunk_size": 2}], ids=str)
def test_settings_with_another_prompt_are_refused(scope, setting):
    """Guidance and chunks show a route of a sequence another prompt than its own."""
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, routing_scope=scope)
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` cannot be used with routing scope \['{scope}'\]"):
        model.generate(input_ids=token_ids(), max_new_tokens=2, pad_token_id=0, **setting)


def test_guidance_in_causal():
    """In `causal`, guidance gives the logits of the two prompts apart, mixed as it says."""
    model = adapted(llama().double(), target_modules=LLAMA_PROJECTIONS)
    randomise(model)
    ids, negative = token_ids(1, 6), token_ids(1, 4)
    settings = {"max_new_tokens": 1, "output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    result = model.generate(
        input_ids=ids, negative_prompt_ids=negative, guidance_scale=1.5, do_sample=False, pad_token_id=0, **settings
    )
    with_prompt, without = (outputs(model, {"input_ids": i})[:, -1].log_softmax(-1) for i in (ids, negative))
    expected = without + 1.5 * (with_prompt - without)
    torch.testing.assert_close(result.scores[0].double(), expected, rtol=0, atol=1e-5)  # `generate` works in float32


@pytest.mark.parametrize("scope", ["causal", "prompt", "sequence"])
def test_a_conversation_that_goes_on(scope):
    """A second `generate` with a longer prompt on a filled cache is exact in `causal`, and refused elsewhere."""
    model = adapted(llama().double(), target_modules=LLAMA_PROJECTIONS, routing_scope=scope)
    randomise(model)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = model.generate(input_ids=token_ids(1, 5), return_dict_in_generate=True, **settings)
    longer = torch.cat([first.sequences, token_ids(1, 4)], dim=1)
    if scope == "causal":
        expected = model.generate(input_ids=longer, **settings)
        assert torch.equal(model.generate(longer, **{CACHE: first[CACHE]}, **settings), expected)
    else:
        with pytest.raises(ValueError, match=rf"from a filled cache with routing scope \['{scope}'\]"):
            model.generate(input_ids=longer, **{CACHE: first[CACHE]}, **settings)


def test_a_conversation_about_an_image_goes_on():
    """A vision tower with one route per image leaves generation free: on a filled cache it is exact."""
    llava = ARCHITECTURES["LLaVA"]
    model = adapted(llava.build().double(), target_modules="all-linear")
    randomise(model)
    inputs = {"pixel_values": llava.inputs()["pixel_values"][:1].double()}
    prompt, image_token = llava.inputs()["input_ids"][:1], model.config.image_token_id
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings["suppress_tokens"] = [image_token]
    first = model.generate(input_ids=prompt, **inputs, return_dict_in_generate=True, **settings)
    longer = torch.cat([first.sequences, token_ids(1, 4).clamp(max=image_token - 1)], dim=1)
    expected = model.generate(input_ids=longer, **inputs, **settings)
    assert torch.equal(model.generate(longer, **{CACHE: first[CACHE]}, **settings), expected)
