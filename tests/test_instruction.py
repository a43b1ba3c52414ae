"""Where instructions come from, and that every call, row and adapter follows its own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from helpers import reference
from helpers.encoders import Counting
from helpers.models import LLAMA_PROJECTIONS, adapted, learned, llama, mlp, outputs, randomise, text, token_ids
from helpers.trainers import config, settings
from helpers.words import tokenizer, words
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import pipeline
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_queryable import (
    BackboneEncoder,
    InstructionCollator,
    InstructionEncoder,
    QueryableLoraConfig,
    set_default_instruction,
    use_instructions,
)
from peft_queryable.method.router import Router

FIRST, SECOND, THIRD = "w10 w11 w12", "w20 w21", "w30"


class Random(InstructionEncoder):
    """A random vector for each text, always the same."""

    def __init__(self, width: int = 5, name: str | None = None) -> None:
        self.size, self.name = width, name

    def encode(self, texts: list[str]) -> Tensor:
        seeds = [sum(word.encode()[-1] * 31**i for i, word in enumerate(text.split())) for text in texts]
        return torch.stack([3 * torch.randn(self.size, generator=torch.Generator().manual_seed(s)) for s in seeds])


@pytest.fixture
def encoder() -> InstructionEncoder:
    return Random()


@pytest.fixture
def model() -> PeftModel:
    """A tiny Llama with a random adapter that takes instructions of width 5."""
    model = adapted(llama(), target_modules=["q_proj", "v_proj", "down_proj"], instruction_dim=5)
    randomise(model)
    return model


def differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max() > 1e-3


# Order: the call's own, a block's, the adapter's default, none


def test_order(model, encoder):
    """`instruction_embeds` wins over a block, the inner block over the outer, any block over the default."""
    inputs = text()
    first, second, third = (
        outputs(model, inputs | {"instruction_embeds": encoder([name])}) for name in (FIRST, SECOND, THIRD)
    )
    none = outputs(model, inputs)
    assert all(differ(a, b) for a, b in [(first, second), (second, third), (first, third), (first, none)])
    with use_instructions(model, SECOND, encoder):
        assert torch.equal(outputs(model, inputs), second)
    assert torch.equal(outputs(model, inputs), none)
    set_default_instruction(model, FIRST, encoder)
    assert torch.equal(outputs(model, inputs), first)
    with use_instructions(model, SECOND, encoder):
        assert torch.equal(outputs(model, inputs), second)
        assert torch.equal(outputs(model, inputs | {"instruction_embeds": encoder([THIRD])}), third)
        with use_instructions(model, encoder([THIRD])):
            assert torch.equal(outputs(model, inputs), third)
        assert torch.equal(outputs(model, inputs), second)
        with use_instructions(model, None):
            assert torch.equal(outputs(model, inputs), none)
    assert torch.equal(outputs(model, inputs), first)
    set_default_instruction(model, None)
    assert torch.equal(outputs(model, inputs), none)


def test_no_instruction_is_plain(model):
    """An adapter with instruction parameters but no instruction is Queryable LoRA without them."""
    plain = adapted(llama(), target_modules=["q_proj", "v_proj", "down_proj"])
    missing, extra = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all("instruction" in name for name in extra)
    inputs = text()
    assert torch.equal(outputs(model, inputs), outputs(plain, inputs))


@pytest.mark.parametrize("silent", [{"instruction_query_weight": 0.0}, {"query_terms": ("state",)}], ids=str)
@pytest.mark.parametrize("source", [{"instruction_dim": 5}, {"instruction_encoder": "backbone"}], ids=str)
def test_an_instruction_that_says_nothing_is_refused(silent, source):
    """With tau = lambda = 0 an instruction changes nothing (Prop. D.7a), so an adapter that takes one is refused."""
    with pytest.raises(ValueError, match=r"an instruction would change nothing. Pass `instruction_strength=1.0`"):
        QueryableLoraConfig(instruction_strength=0.0, **silent, **source)
    QueryableLoraConfig(instruction_strength=1.0, **silent, **source)
    QueryableLoraConfig(instruction_strength=0.0, **silent)


def test_a_block_ends_with_an_error(model, encoder):
    inputs = text()
    expected = outputs(model, inputs)
    with pytest.raises(KeyboardInterrupt), use_instructions(model, FIRST, encoder):
        raise KeyboardInterrupt
    assert torch.equal(outputs(model, inputs), expected)


def test_rows_follow_their_own_text(model, encoder):
    """Texts of a batch are those of its rows: as if each ran alone; None is no instruction."""
    inputs = text()
    names = [FIRST, None]
    with use_instructions(model, names, encoder):
        together = outputs(model, inputs)
    for row, name in enumerate(names):
        with use_instructions(model, name, encoder):
            alone = outputs(model, {key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(together[row : row + 1], alone)


def test_a_base_model_called_directly(model, encoder):
    """A block reaches calls that do not come through PEFT's wrapper, and calls of the layers' own module."""
    inputs = text()
    for door in (model.get_base_model(), model.get_base_model().model):
        with torch.no_grad():
            none = door(**inputs)[0]
            with use_instructions(model, FIRST, encoder):
                assert differ(door(**inputs)[0], none)


# Generation


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generation_in_a_block(model, encoder, settings):
    """Every step and every beam of a row follows the row's text."""
    ids, names = token_ids(2, 4), [FIRST, SECOND]
    settings = settings | {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(input_ids=ids, instruction_embeds=encoder(names), **settings)
    assert not torch.equal(expected, model.generate(input_ids=ids, **settings))
    with use_instructions(model, names, encoder):
        assert torch.equal(model.generate(input_ids=ids, **settings), expected)
    alone = [
        model.generate(input_ids=ids[row : row + 1], instruction_embeds=encoder([name]), **settings)
        for row, name in enumerate(names)
    ]
    assert torch.equal(expected, torch.cat(alone))


def test_pipeline(model, encoder):
    """A transformers pipeline follows a block, a default, and `instruction_embeds` among its arguments."""
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer())
    kwargs = {"max_new_tokens": 5, "do_sample": False}
    embeds = encoder([FIRST])
    plain, expected = pipe("w7 w8 w9", **kwargs), pipe("w7 w8 w9", instruction_embeds=embeds, **kwargs)
    assert plain != expected
    with use_instructions(model, FIRST, encoder):
        assert pipe("w7 w8 w9", **kwargs) == expected
    set_default_instruction(model, FIRST, encoder)
    assert pipe("w7 w8 w9", **kwargs) == expected


# The default is saved


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_a_loaded_adapter_needs_no_encoder(model, tmp_path, monkeypatch, low_cpu_mem_usage):
    """Text, encoder and revision are in the configuration, the embedding among the weights."""
    encoder = Random(name="someone/encoder")
    encoder.revision = "v2"
    set_default_instruction(model, FIRST, encoder)
    inputs = text()
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    fields = ("default_instruction", "instruction_encoder", "instruction_encoder_revision")
    assert [saved[name] for name in fields] == [FIRST, "someone/encoder", "v2"]
    monkeypatch.setattr("peft_queryable.tuner.model.load_encoder", None)
    loaded = PeftModel.from_pretrained(llama_like(model), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(outputs(loaded, inputs), expected)
    assert loaded.peft_config["default"].default_instruction == FIRST


def llama_like(model: PeftModel):
    """A copy of the base model of `model`."""
    return copy.deepcopy(model).unload()


def test_the_default_is_never_learned(model, encoder):
    """Training moves the router that reads the default, and not the default."""
    set_default_instruction(model, FIRST, encoder)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**text(), labels=token_ids()).loss.backward()
    router = model.base_model.queryable_lora_router["default"]
    assert router.default_instruction.weight.grad is None
    assert router.instruction_prior.weight.grad.any() and router.instruction_query.weight.grad.any()
    optimizer.step()
    assert torch.equal(router.default_instruction.weight, encoder([FIRST]))
    model.set_adapter("default")
    model.set_requires_grad("default", True)
    assert not router.default_instruction.weight.requires_grad
    assert all(p.requires_grad for p in learned(model))


def test_an_instruction_in_a_new_configuration_is_refused():
    """The text alone has no embedding, so only `set_default_instruction` writes it."""
    with pytest.raises(ValueError, match=r"`set_default_instruction\(model, text\)`"):
        QueryableLoraConfig(instruction_dim=5, default_instruction="Add the numbers.")


# Encoders by their name in the configuration


def test_width_comes_from_the_backbone():
    """`instruction_encoder="backbone"` needs no width, and saves the one it found."""
    model = adapted(llama(), target_modules=["q_proj"], instruction_encoder="backbone")
    assert model.peft_config["default"].instruction_dim == 32
    assert model.base_model.queryable_lora_router["default"].instruction_prior.weight.shape == (8, 32)


def test_width_comes_from_the_encoder(monkeypatch, tmp_path):
    """Any other name is loaded once for its width, and not again for a saved adapter."""
    loads = []
    monkeypatch.setattr("peft_queryable.tuner.model.load_encoder", lambda *args: loads.append(args[:2]) or Counting(7))
    model = adapted(mlp(), target_modules=["first"], instruction_encoder="x/y", instruction_encoder_revision="main")
    assert model.peft_config["default"].instruction_dim == 7
    with use_instructions(model, "abc"):
        outputs(model, {"x": torch.randn(2, 8)})
    assert loads == [("x/y", "main")]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).instruction_dim == loaded.peft_config["default"].instruction_dim == 7
    assert len(loads) == 1


def test_words_through_the_backbone(tmp_path):
    """From plain words to logits, with nothing but the base model's folder."""
    llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    base = type(llama()).from_pretrained(tmp_path)
    model = adapted(base, target_modules=["q_proj", "v_proj"], instruction_encoder="backbone")
    randomise(model)
    inputs = text()
    with use_instructions(model, FIRST):
        by_text = outputs(model, inputs)
    embeds = BackboneEncoder(base, tokenizer())([FIRST])
    assert torch.equal(by_text, outputs(model, inputs | {"instruction_embeds": embeds}))
    assert differ(by_text, outputs(model, inputs))


# Several adapters


@pytest.fixture
def several(model, monkeypatch) -> PeftModel:
    """Adapters `default` (width 5), `wide` (width 7, with an encoder) and `mute`, which takes no instruction."""
    monkeypatch.setattr("peft_queryable.tuner.model.load_encoder", lambda name, *_: Random(int(name)))
    for name, encoder in (("wide", "7"), ("mute", None)):
        model.add_adapter(name, QueryableLoraConfig(r=3, target_modules=["q_proj"], instruction_encoder=encoder))
        randomise(model, name)
    return model


def test_every_adapter_has_its_default(several):
    """A default belongs to one adapter, and comes along when it is set or named in a batch."""
    narrow, wide, inputs = Random(5), Random(7), text()
    set_default_instruction(several, FIRST, narrow)
    set_default_instruction(several, SECOND, wide, adapter_name="wide")
    several.base_model.set_adapter(["default", "wide"])
    both = outputs(several, inputs)
    for dim, name in ((5, FIRST), (7, SECOND)):
        with pytest.raises(ValueError, match="`instruction_embeds` must be a tensor of shape"):
            outputs(several, inputs | {"instruction_embeds": Random(dim)([name])})
    set_default_instruction(several, None, adapter_name="wide")
    assert differ(outputs(several, inputs), both)
    with pytest.raises(ValueError, match=r"`adapter_name`: \['default', 'wide'\] are active"):
        set_default_instruction(several, FIRST, narrow)


def test_mixed_batches_follow_the_same_rules(several):
    """In a batch of several adapters, each row follows the block in its adapter's encoding, or its own default."""
    several.peft_config["default"].instruction_encoder = "5"
    set_default_instruction(several, FIRST)
    inputs, names = text(), ["wide", "default"]

    def rows_alone() -> Tensor:
        rows = []
        for row, name in enumerate(names):
            several.set_adapter(name)
            rows.append(outputs(several, inputs)[row : row + 1])
        return torch.cat(rows)

    defaults = rows_alone()
    torch.testing.assert_close(outputs(several, inputs | {"adapter_names": names}), defaults)
    with use_instructions(several, SECOND, adapter_names=names):
        alone = rows_alone()
        torch.testing.assert_close(outputs(several, inputs | {"adapter_names": names}), alone)
    assert differ(alone[0], defaults[0]) and differ(alone[1], defaults[1])
    several.set_adapter("wide")
    with (
        use_instructions(several, SECOND),
        pytest.raises(ValueError, match=r"entered for adapters \['wide'\], and 'default'"),
    ):
        outputs(several, inputs | {"adapter_names": names})


def test_an_adapter_without_instructions_in_a_mixed_batch(several):
    """A block for one adapter leaves another that takes no instruction alone."""
    inputs = text()
    with use_instructions(several, FIRST, Random(5)):
        default = outputs(several, inputs)
        mixed = outputs(several, inputs | {"adapter_names": ["default", "mute"]})
    several.set_adapter("mute")
    torch.testing.assert_close(mixed, torch.cat([default[:1], outputs(several, inputs)[1:]]))


# Errors


def test_errors(several, encoder):
    """What cannot be followed is said when it is given, with the names of adapter and encoder."""
    wrong = Random(6, name="six")
    with pytest.raises(ValueError, match=r"encoded by Random 'six' must be .* \[1, 5\] for adapter 'default', got"):
        set_default_instruction(several, FIRST, wrong)
    for given in (FIRST, encoder([FIRST]), None):
        with pytest.raises(ValueError, match=r"adapter 'mute' takes no instruction.*`instruction_dim=None`"):
            set_default_instruction(several, given, encoder, adapter_name="mute")
    with pytest.raises(ValueError, match=r"'default' names no `instruction_encoder`.*`encoder=`"):
        set_default_instruction(several, FIRST)
    with pytest.raises(ValueError, match=r"one embedding, \[1, d_c\], got 2"):
        set_default_instruction(several, encoder([FIRST, SECOND]))
    with pytest.raises(ValueError, match=r"no adapter 'other', but \['default', 'mute', 'wide'\]"):
        set_default_instruction(several, FIRST, encoder, adapter_name="other")
    with pytest.raises(TypeError, match=r"PeftModel with Queryable LoRA, got LlamaForCausalLM"):
        set_default_instruction(several.get_base_model(), FIRST, encoder)
    with (
        use_instructions(several, [FIRST] * 3, encoder),
        pytest.raises(ValueError, match=r"3 instructions.*batch size 2"),
    ):
        outputs(several, text())
    with (
        pytest.raises(ValueError, match=r"3 instructions.*batch size 2"),
        use_instructions(several, [FIRST] * 3, encoder),
    ):
        several.generate(input_ids=token_ids(), max_new_tokens=2)


@pytest.mark.parametrize("value", [3, ["backbone"], Random()], ids=["number", "list", "encoder"])
def test_an_encoder_in_the_configuration_is_a_name(value):
    with pytest.raises(ValueError, match=r"`instruction_encoder` must be a string or None.*`instruction_dim`"):
        QueryableLoraConfig(instruction_encoder=value)


# Routes


def routes(model: PeftModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Routing weights of every block of one call, each [B, K, M]."""
    seen: list[Tensor] = []
    router = model.base_model.queryable_lora_router["default"]
    hook = router.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs(model, inputs)
    hook.remove()
    return seen


@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_instruction_only_routes_depend_on_nothing_but_the_text(scope, encoder):
    """With `query_terms=("instruction",)` tokens and their number change no route, to the bit; the text does."""
    model = adapted(
        llama(),
        target_modules=LLAMA_PROJECTIONS,
        routing_scope=scope,
        instruction_dim=5,
        query_terms=("instruction",),
    )
    randomise(model)

    def first_rows(name: str, batch: int, length: int) -> list[Tensor]:
        inputs = {"input_ids": token_ids(batch, length), "instruction_embeds": encoder([name])}
        found = routes(model, inputs)
        assert all(torch.equal(weights, weights[:1, :1].expand_as(weights)) for weights in found)
        return [weights[0, 0] for weights in found]

    expected = first_rows(FIRST, 2, 6)
    for other in (first_rows(FIRST, 2, 6), first_rows(FIRST, 3, 9)):
        assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    assert any(differ(a, b) for a, b in zip(first_rows(SECOND, 2, 6), expected, strict=True))


@pytest.fixture(scope="module")
def trained() -> PeftModel:
    """A tiny Llama that learned another answer for each of two instructions."""
    torch.manual_seed(0)
    model = adapted(llama().double(), target_modules=LLAMA_PROJECTIONS, instruction_dim=5, num_atoms=8).train()
    encoder, ids = Random(), token_ids(8, 6)
    labels = {FIRST: ids, SECOND: ids.flip(0)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(30):
        name = (FIRST, SECOND)[step % 2]
        model(input_ids=ids, labels=labels[name], instruction_embeds=encoder([name])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_corollary_5_1_1_on_a_trained_adapter(trained, encoder):
    """In every block and for every token the state utility lost to the instruction is at most log 1 / pi."""
    calls = []
    router: Router = trained.base_model.queryable_lora_router["default"]
    hook = router.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    embeds = encoder([FIRST]).double()
    outputs(trained, {"input_ids": token_ids(2, 5), "instruction_embeds": embeds})
    hook.remove()
    bank = reference.Bank.read(dict(router.named_parameters()), reference.Hyper())
    rho = torch.stack(reference.prior_logits(bank, embeds[0]))
    losses = []
    for (block, states, means, _), weights in calls:
        for row, t in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
            seen = [mean[row, t] for mean in means]
            zeta = torch.stack(
                reference.state_logits(bank, reference.query(bank, block, states[row, t], seen, embeds[0]))
            )
            alpha = weights[row, t]
            active = alpha > 0
            log_pi = (bank.hyper.instruction_strength * rho[active]).log_softmax(0)
            losses.append(zeta[active].max() - alpha[active] @ zeta[active])
            assert -1e-9 < losses[-1] <= -log_pi[zeta[active].argmax()] + 1e-9
    assert max(losses) > 0.01


# Training


def test_collator(encoder):
    """The rest of the batch is the other collator's, the column becomes embeddings."""
    collator = InstructionCollator(DataCollatorForLanguageModeling(pad_token_id=0), encoder)
    examples = [
        {"input_ids": [3, 4, 5], "instruction": FIRST},
        {"input_ids": [6], "instruction": None},
    ]
    batch = collator(copy.deepcopy(examples))
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 0, 0]]
    assert torch.equal(batch["instruction_embeds"], torch.cat([encoder([FIRST]), torch.zeros(1, 5)]))
    renamed = InstructionCollator(DataCollatorForLanguageModeling(pad_token_id=0), encoder, column="task")
    with pytest.raises(ValueError, match=r"no column 'task'; it has \['input_ids', 'instruction'\].*remove_unused"):
        renamed(examples)
    packing = InstructionCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True), encoder)
    row = packing(examples)
    assert row["input_ids"].tolist() == [[3, 4, 5, 6]]
    assert torch.equal(row["instruction_embeds"], batch["instruction_embeds"])
    concatenating = InstructionCollator(lambda features: {"input_ids": torch.zeros(1, 4)}, encoder)
    with pytest.raises(ValueError, match=r"made 1 sequences in 1 rows for 2 instructions"):
        concatenating(examples)


@pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore::FutureWarning:trl")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_sft_over_many_instructions(tmp_path, encoder, checkpointing):
    """One SFTTrainer run mixes instructions: each example trains under its own, as when run by hand."""
    data = Dataset.from_dict(
        {
            "prompt": [words(i, 3) for i in range(4)],
            "completion": [" " + words(9 + i, 3) for i in range(4)],
            "instruction": [FIRST, SECOND, None, FIRST],
        }
    )
    args = settings(tmp_path, remove_unused_columns=False, max_steps=1, gradient_checkpointing=checkpointing)
    base = llama()
    model = get_peft_model(copy.deepcopy(base), config(instruction_dim=5)).eval()
    trainer = SFTTrainer(
        base,
        args=SFTConfig(**args | {"per_device_train_batch_size": 4}),
        train_dataset=data,
        peft_config=config(instruction_dim=5),
        processing_class=tokenizer(),
    )
    trainer.data_collator = InstructionCollator(trainer.data_collator, encoder)
    randomise(trainer.model)
    model.load_state_dict(trainer.model.state_dict())
    examples = [trainer.train_dataset[row] for row in range(4)]
    losses = []
    for example in examples:
        batch = trainer.data_collator([example])
        embeds = batch.pop("instruction_embeds")
        assert torch.equal(embeds, encoder([example["instruction"]]) if example["instruction"] else torch.zeros(1, 5))
        with torch.no_grad():
            losses.append(model(**batch, instruction_embeds=embeds).loss)
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)  # completions of equal length


def test_training_without_a_word_on_instructions_is_refused(model):
    """A trainer that drops its column must not train an adapter that follows nothing; a default or None is a word."""
    inputs = text() | {"labels": text()["input_ids"]}
    model.train()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"first training call brings none. Call `use_instruction_column\(trainer\)`"
        ):
            model(**inputs)
    with use_instructions(model, None):
        model(**inputs)
    model(**inputs)


def test_compiled_training_without_a_word_on_instructions_is_refused(model):
    """A graph remembers no earlier call: each call needs its instructions, a default, or None for a word."""
    inputs = text() | {"labels": text()["input_ids"]}
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    compiled(**inputs, instruction_embeds=torch.ones(1, 5))
    with pytest.raises(RuntimeError, match="training call brings none"):
        compiled(**inputs)
    with use_instructions(model, None):
        compiled(**inputs)
    set_default_instruction(model, torch.ones(1, 5))
    compiled(**inputs)
