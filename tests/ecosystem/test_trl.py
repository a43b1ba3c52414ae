"""TRL's trainers, unmodified, with tiny models."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, outputs, randomise, token_ids
from helpers.trainers import config, settings
from helpers.trl_trainers import ONLINE, QUIET, judgements, preferences, prompts, reward_model
from helpers.words import tokenizer, words
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from peft_queryable import QueryableLoraConfig
from peft_queryable.method.scope import Pool

pytestmark = QUIET

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %} w5 "
    "{% generation %}{{ message.content }} </s>{% endgeneration %}"
    "{% else %} w4 {{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %} w5 {% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    result = tokenizer()
    result.chat_template = CHAT_TEMPLATE
    return result


def assert_trained(trainer) -> None:
    """Every trainable tensor of the adapter has moved, the bank's too, and nothing else has."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved <= trainable
    assert any("router" in name for name in moved)
    assert {name for name in trainable if "lora_B" in name} <= moved


SFT = {
    "plain": ({"text": [words(i, 5 + i % 4) for i in range(8)]}, {}),
    "packed": ({"text": [words(i, 5 + i % 4) for i in range(8)]}, {"packing": True, "max_length": 16}),
    "padding free": ({"text": [words(i, 5 + i % 4) for i in range(8)]}, {"padding_free": True, "max_length": None}),
    "completion only": (
        {"prompt": [words(i, 3 + i % 2) for i in range(8)], "completion": [" " + words(9 + i, 3) for i in range(8)]},
        {"completion_only_loss": True},
    ),
    "assistant only": (
        {
            "messages": [
                [{"role": "user", "content": words(i, 3)}, {"role": "assistant", "content": words(9 + i, 3)}]
                for i in range(8)
            ]
        },
        {"assistant_only_loss": True},
    ),
}


@pytest.mark.parametrize("scope", ["causal", "prompt"])
@pytest.mark.parametrize("kind", SFT)
@pytest.mark.filterwarnings("ignore:.*[Ff]lash.*", "ignore:.*every token of its first training call is supervised")
def test_sft(tmp_path, kind, scope):
    columns, kwargs = SFT[kind]
    trainer = SFTTrainer(
        llama(),
        SFTConfig(**settings(tmp_path, **kwargs)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=chat_tokenizer(),
        peft_config=config(routing_scope=scope),
    )
    assert_trained(trainer)


PREFERENCE = {"dpo": (DPOTrainer, DPOConfig, preferences(8)), "kto": (KTOTrainer, KTOConfig, judgements(8))}


def preference_trainer(name: str, model, tmp_path, **kwargs):
    """Trains a new adapter of `model`; `kwargs` are of its configuration."""
    trainer_class, config_class, data = PREFERENCE[name]
    return trainer_class(
        model,
        args=config_class(**settings(tmp_path)),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        peft_config=config(**kwargs),
    )


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_with_a_configuration(tmp_path, name):
    """The reference is the base model under `disable_adapter`, to the bit, after training too."""
    ids = token_ids()
    model = llama()
    base = outputs(model, {"input_ids": ids})
    trainer = preference_trainer(name, model, tmp_path)
    assert_trained(trainer)
    with trainer.model.disable_adapter():
        assert torch.equal(outputs(trainer.model.eval(), {"input_ids": ids}), base)


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_with_a_ready_model(tmp_path, name):
    """The adapter `ref` is a true copy of a trained one, bank included, and stays it."""
    trainer_class, config_class, data = PREFERENCE[name]
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = token_ids()
    start = outputs(model, {"input_ids": ids})
    trainer = trainer_class(
        model,
        args=config_class(**settings(tmp_path)),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
    )
    assert_trained(trainer)
    trained = trainer.model.eval()
    assert not torch.equal(outputs(trained, {"input_ids": ids}), start)
    trained.set_adapter("ref")
    assert torch.equal(outputs(trained, {"input_ids": ids}), start)


def online_trainer(name: str, tmp_path, **kwargs):
    """Generates two completions per prompt; `kwargs` are of the adapter's configuration."""
    trainer_class, config_class = ONLINE[name]
    return trainer_class(
        llama(),
        reward_funcs=lambda completions, **_: [
            float(len(set(c.split()))) + 0.1 * i for i, c in enumerate(completions)
        ],
        args=config_class(**settings(tmp_path, num_generations=2, max_completion_length=6, beta=0.1)),
        train_dataset=Dataset.from_dict({"prompt": prompts(8)}),
        processing_class=tokenizer(),
        peft_config=config(**kwargs),
    )


@pytest.mark.parametrize("name", ONLINE)
def test_online(tmp_path, name):
    """Generation inside training, then a step on what was generated."""
    assert_trained(online_trainer(name, tmp_path))


BATCHED = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 8},
}


@pytest.mark.parametrize("peft_type", [LoraConfig, QueryableLoraConfig])
@pytest.mark.parametrize("name", ONLINE)
def test_continuous_batching(tmp_path, name, peft_type):
    """Completions are those of `generate`, where nothing is left to chance."""
    trainer_class, config_class = ONLINE[name]
    runs = []
    for arguments in ({}, BATCHED):
        seen: list[str] = []

        def reward(completions, seen=seen, **_):
            seen += completions
            return [float(i) for i, _ in enumerate(completions)]

        torch.manual_seed(0)
        model = get_peft_model(llama(), peft_type(r=4, target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM"))
        randomise(model)
        arguments = {"num_generations": 2, "max_completion_length": 6, "top_k": 1, **arguments}
        arguments |= {
            "optim": "sgd",
            "per_device_train_batch_size": 4,
        }  # Adam would blow up the rounding of a zero loss
        trainer_class(
            model,
            reward_funcs=reward,
            args=config_class(**settings(tmp_path, **arguments)),
            train_dataset=Dataset.from_dict({"prompt": [words(i, 3 + i % 3) for i in range(8)]}),
            processing_class=tokenizer(),
        ).train()
        runs.append(seen)
    plain, batched = runs
    assert batched == plain
    assert len(set(plain)) == 4  # of two prompts in each of two steps


@pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="gives the model no labels")
@pytest.mark.parametrize("name", [*PREFERENCE, *ONLINE])
def test_labels_tell_the_prompt(tmp_path, monkeypatch, name):
    """In scope `prompt`, what is trained on is routed by its prompt of three tokens."""
    if name in ONLINE:
        trainer = online_trainer(name, tmp_path, routing_scope="prompt")
    else:
        trainer = preference_trainer(name, llama(), tmp_path, routing_scope="prompt")
    prompts = []

    def spy(self, scope, tokens):
        original(self, scope, tokens)
        if torch.is_grad_enabled():
            prompts.append(self.mask.sum(1))

    original = Pool.__init__
    monkeypatch.setattr(Pool, "__init__", spy)
    trainer.train()
    assert prompts
    assert all((lengths == 3).all() for lengths in prompts)


def test_reward(tmp_path):
    """A sequence classifier of a decoder, its head trained in full."""
    trainer = RewardTrainer(
        reward_model(),
        args=RewardConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_dict(preferences(8)),
        processing_class=tokenizer(),
        peft_config=QueryableLoraConfig(
            r=4, target_modules=LLAMA_PROJECTIONS, task_type="SEQ_CLS", modules_to_save=["score"]
        ),
    )
    assert_trained(trainer)
