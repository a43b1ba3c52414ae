"""A column of instructions in TRL's trainers: every row that they run follows its own."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from helpers.encoders import Fixed
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, randomise
from helpers.trainers import config, settings
from helpers.trl_trainers import ONLINE, QUIET, judgements, preferences, prompts, reward_model
from helpers.words import tokenizer, words
from torch import Tensor
from transformers import Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from peft_queryable import InstructionCollator, QueryableLoraConfig, use_instruction_column
from peft_queryable.tuner.layer import QueryableLoraLayer

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*[Ff]lash.*"),
]
TEXTS = ["one", "two", None, "three"]
PROMPTS = prompts(4)
EXACT = {"rtol": 0, "atol": 1e-10}


class Seen:
    """What a trainer's model was called with and gave, row by row, while the trainer ran."""

    def __init__(self, trainer, encoder) -> None:
        self.model, self.encoder = trainer.model, encoder
        self.rows: list[tuple[Tensor, Tensor, Tensor, Tensor, bool]] = []
        base = self.model.get_base_model()
        self.hooks = [
            base.model.register_forward_hook(lambda module, args, output: setattr(self, "states", output[0])),
            base.register_forward_hook(self.see, with_kwargs=True),
        ]

    def see(self, module, args, kwargs, output) -> None:
        if "logits_to_keep" in kwargs:
            return  # a step of generation
        if kwargs["attention_mask"] is None:
            return  # a packed row, whose states are looked at as a whole
        labels = kwargs["input_ids"] if kwargs["labels"] is None else kwargs["labels"]
        result = output.logits if kwargs["labels"] is None else output.log_probs.sum(1)
        is_off = next(m for m in module.modules() if isinstance(m, QueryableLoraLayer)).disable_adapters
        for row, mask in enumerate(kwargs["attention_mask"].bool()):
            values = (kwargs["input_ids"][row][mask], labels[row][mask], self.states[row][mask], result[row])
            self.rows.append((*(value.detach().clone() for value in values), is_off))

    def alone(self, ids: Tensor, labels: Tensor, text: str | None, is_off: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states, and log-probability of the labels or reward, of one row run alone under `text`."""
        embeds = torch.zeros(1, 5) if text is None else self.encoder([text])
        self.model.eval()
        with torch.no_grad(), self.model.disable_adapter() if is_off else nullcontext():
            output = self.model(input_ids=ids[None], instruction_embeds=embeds, output_hidden_states=True)
        states, logits = output.hidden_states[-1][0], output.logits
        if logits.ndim == 2:
            return states, logits[0]
        scores = logits[0, :-1].log_softmax(-1).gather(-1, labels[1:, None].clamp(min=0))[:, 0]
        return states, scores[labels[1:] != -100].sum()

    def check(self, text_of, number: int, references: int = 0) -> None:
        """Every row came out as it does alone under its text, and differently under another text."""
        for hook in self.hooks:
            hook.remove()
        assert sum(not is_off for *_, is_off in self.rows) == number
        assert sum(is_off for *_, is_off in self.rows) == references
        for ids, labels, states, result, is_off in self.rows:
            expected, score = self.alone(ids, labels, text_of(ids), is_off)
            torch.testing.assert_close(states, expected, **EXACT)
            torch.testing.assert_close(result.double(), score, rtol=0, atol=1e-5)  # TRL's head computes in float32
            if not is_off:
                assert (result - self.alone(ids, labels, "another")[1]).abs() > 1e-4


def by_prompt(ids: Tensor) -> str | None:
    """The instruction of the example whose prompt a row starts with."""
    starts = {tuple(tokenizer()(p)["input_ids"]): text for p, text in zip(PROMPTS, TEXTS, strict=True)}
    return starts[tuple(ids[:3].tolist())]


def arguments(tmp_path, **kwargs) -> dict:
    """One step of four examples that leaves the weights as they are, so that rows can be run again."""
    return (
        settings(tmp_path)
        | {
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "learning_rate": 0.0,
            "remove_unused_columns": False,
        }
        | kwargs
    )


def instructed(columns: dict[str, list]) -> Dataset:
    return Dataset.from_dict(columns | {"instruction": TEXTS})


@pytest.fixture
def encoder() -> Fixed:
    return Fixed()


def prepared(trainer, encoder, **kwargs) -> Seen:
    """The trainer with a random adapter in float64 and a column of instructions."""
    trainer.model.double()
    randomise(trainer.model)
    use_instruction_column(trainer, encoder=encoder, **kwargs)
    return Seen(trainer, encoder)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_dpo(tmp_path, encoder, checkpointing):
    """Chosen and rejected follow the instruction of their pair, the reference none."""
    args = DPOConfig(**arguments(tmp_path, gradient_checkpointing=checkpointing))
    trainer = DPOTrainer(
        llama(),
        args=args,
        train_dataset=instructed(preferences(4)),
        processing_class=tokenizer(),
        peft_config=config(instruction_dim=5),
    )
    seen = prepared(trainer, encoder)
    trainer.train()
    seen.check(by_prompt, 8, references=8)


def test_dpo_with_a_ready_adapter(tmp_path, encoder):
    """The copy that is the reference follows the same instructions."""
    model = adapted(llama().double(), target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM", instruction_dim=5)
    randomise(model)
    args = DPOConfig(**arguments(tmp_path))
    trainer = DPOTrainer(model, args=args, train_dataset=instructed(preferences(4)), processing_class=tokenizer())
    use_instruction_column(trainer, encoder=encoder)
    seen = Seen(trainer, encoder)
    trainer.train()
    seen.check(by_prompt, 16)


def test_kto(tmp_path, encoder):
    """Completions, and those of others that estimate the divergence, follow the instruction of their prompt."""
    trainer = KTOTrainer(
        llama(),
        args=KTOConfig(**arguments(tmp_path)),
        train_dataset=instructed(judgements(4)),
        processing_class=tokenizer(),
        peft_config=config(instruction_dim=5),
    )
    seen = prepared(trainer, encoder)
    trainer.train()
    seen.check(by_prompt, 8, references=8)


def test_reward(tmp_path, encoder):
    trainer = RewardTrainer(
        reward_model(),
        args=RewardConfig(**arguments(tmp_path)),
        train_dataset=instructed(preferences(4)),
        processing_class=tokenizer(),
        peft_config=QueryableLoraConfig(
            r=4, target_modules=LLAMA_PROJECTIONS, task_type="SEQ_CLS", modules_to_save=["score"], instruction_dim=5
        ),
    )
    seen = prepared(trainer, encoder)
    trainer.train()
    seen.check(by_prompt, 8)


@pytest.mark.parametrize("name", ONLINE)
def test_online(tmp_path, encoder, name):
    """One prompt under two instructions: generated, scored and trained on under each, however TRL shuffles it."""
    trainer_class, config_class = ONLINE[name]
    kwargs = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "num_iterations": 2, "top_k": 1}
    rewarded = []

    def reward(completions, instruction, **_):
        rewarded.extend(zip(completions, instruction, strict=True))
        return [float(i) for i in range(len(completions))]

    trainer = trainer_class(
        llama(),
        reward_funcs=reward,
        args=config_class(
            **arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2) | kwargs
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS[:1] * 2, "instruction": ["one", "two"]}),
        processing_class=tokenizer(),
        peft_config=config(instruction_dim=5),
    )
    seen = prepared(trainer, encoder)
    ids = torch.tensor([tokenizer()(PROMPTS[0])["input_ids"]])
    answers = {}
    for text in ("one", "two"):
        answer = trainer.model.generate(
            input_ids=ids, instruction_embeds=encoder([text]), max_new_tokens=6, do_sample=False, eos_token_id=2
        )
        answers[tuple(answer[0].tolist())] = text
    assert len(answers) == 2
    by_text = {text: tokenizer().decode(answer[3:], skip_special_tokens=True) for answer, text in answers.items()}
    trainer.train()
    assert sorted(rewarded) == sorted((by_text[text], text) for text in ("one", "one", "two", "two"))
    seen.check(lambda ids: answers[tuple(ids.tolist())], 4 + 2 * 4, references=4)


def test_evaluation_of_an_online_trainer(tmp_path, encoder):
    """In evaluation too, each row follows its own."""
    rewarded = []

    def reward(completions, instruction, **_):
        rewarded.extend(instruction)
        return [float(i) for i in range(len(completions))]

    data = Dataset.from_dict({"prompt": PROMPTS, "instruction": TEXTS})
    kwargs = {"num_generations": 2, "max_completion_length": 4, "per_device_eval_batch_size": 4}
    trainer = GRPOTrainer(
        llama(),
        reward_funcs=reward,
        args=GRPOConfig(**arguments(tmp_path) | kwargs),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        peft_config=config(instruction_dim=5),
    )
    seen = prepared(trainer, encoder)
    trainer.evaluate()
    assert sorted(rewarded, key=str) == sorted(TEXTS * 2, key=str)
    seen.check(by_prompt, 8)


def test_a_trainer_of_transformers(tmp_path, encoder):
    """Each row of its batch follows the text of its example."""
    ids = [tokenizer()(prompt + " " + words(50 + i, 2))["input_ids"] for i, prompt in enumerate(PROMPTS)]
    model = adapted(llama().double(), target_modules=LLAMA_PROJECTIONS, instruction_dim=5)
    randomise(model)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids, "instruction": TEXTS}),
    )
    use_instruction_column(trainer, encoder=encoder)
    seen = Seen(trainer, encoder)
    seen.hooks.pop().remove()
    batches = []
    hook = model.get_base_model().register_forward_hook(
        lambda module, args, kwargs, output: batches.append((kwargs["input_ids"], seen.states)), with_kwargs=True
    )
    trainer.train()
    hook.remove()
    seen.hooks.pop().remove()
    ((rows, states),) = batches
    assert len(rows) == 4
    for row, found in zip(rows, states, strict=True):
        torch.testing.assert_close(found, seen.alone(row, row, by_prompt(row))[0], **EXACT)
        assert (found - seen.alone(row, row, "another")[0]).abs().max() > 1e-4


# Padding-free and packed rows


def sft(tmp_path, **kwargs) -> SFTTrainer:
    return SFTTrainer(
        llama(),
        SFTConfig(**arguments(tmp_path, padding_free=True, max_length=None) | kwargs),
        train_dataset=Dataset.from_dict(
            {
                "prompt": PROMPTS,
                "completion": [" " + words(20 + i, 2 + i) for i in range(4)],
                "instruction": TEXTS,
            }
        ),
        processing_class=tokenizer(),
        peft_config=config(instruction_dim=5),
    )


@pytest.mark.parametrize("kwargs", [{}, {"pad_to_multiple_of": 8}], ids=str)
@pytest.mark.parametrize("pack_to", [None, 16], ids=["padding free", "packed"])
def test_packed(tmp_path, encoder, pack_to, kwargs):
    """In padding-free and packed rows each example has the hidden states that it has alone under its instruction."""
    trainer = sft(tmp_path, **kwargs)
    examples = list(trainer.train_dataset)
    seen = prepared(trainer, encoder, pack_to=pack_to)
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    assert len(rows) == (4 if pack_to is None else 2)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        trainer.compute_loss(trainer.model.eval(), dict(batch))
    for hook in seen.hooks:
        hook.remove()
    starts = {tuple(example["input_ids"]): example["instruction"] for example in examples}
    bounds = batch["cu_seq_lens_q"].tolist()
    for start, end in list(pairwise(bounds))[:4]:  # after them comes what fills up the row
        ids, found = batch["input_ids"][0, start:end], seen.states[0, start:end]
        expected, _ = seen.alone(ids, ids, starts[tuple(ids.tolist())])
        torch.testing.assert_close(found, expected, **EXACT)
        assert (found - seen.alone(ids, ids, "another")[0]).abs().max() > 1e-4
    trainer.train()


# What would drop a column, or not know whose instruction is whose


def test_a_trainer_that_would_drop_the_column(tmp_path, encoder):
    trainer = sft(tmp_path, remove_unused_columns=True)
    with pytest.raises(ValueError, match=r"SFTTrainer would drop.*SFTConfig\(\.\.\., remove_unused_columns=False\)"):
        use_instruction_column(trainer, encoder=encoder)
    trainer = sft(tmp_path, packing=True, max_length=16)
    with pytest.raises(ValueError, match=r"packs and so drops the column.*pack_to=16"):
        use_instruction_column(trainer, encoder=encoder)
    trainer = sft(tmp_path)
    with pytest.raises(ValueError, match="has no column 'task'; it has"):
        use_instruction_column(trainer, "task", encoder=encoder)
    with pytest.raises(ValueError, match="A sequence of 9 tokens does not fit into a row: use `pack_to=9`"):
        use_instruction_column(trainer, encoder=encoder, pack_to=8)
    trainer = sft(tmp_path, padding_free=False)
    with pytest.raises(ValueError, match=r"`pack_to=16` is for.*padding_free=True"):
        use_instruction_column(trainer, encoder=encoder, pack_to=16)


def test_trainers_that_are_not_known(tmp_path, encoder):
    trainer = sft(tmp_path)
    kind = type("OtherTrainer", (SFTTrainer,), {"__module__": "trl.experimental.other"})
    other = copy.copy(trainer)
    other.__class__ = kind
    with pytest.raises(TypeError, match="Whether a OtherTrainer gives the model a column"):
        use_instruction_column(other, encoder=encoder)


def test_generation_by_other_means(tmp_path, encoder):
    trainer = GRPOTrainer(
        llama(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**arguments(tmp_path, num_generations=2)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "instruction": TEXTS}),
        processing_class=tokenizer(),
        peft_config=config(instruction_dim=5),
    )
    trainer.args.use_vllm = True
    with pytest.raises(ValueError, match=r"GRPOTrainer generates with \['use_vllm'\]"):
        use_instruction_column(trainer, encoder=encoder)


def test_examples_that_cannot_be_followed(encoder):
    """Instructions by turn, and references computed before, are refused with what to do."""
    collator = InstructionCollator(lambda features: {"input_ids": torch.zeros(len(features), 2)}, encoder)
    with pytest.raises(ValueError, match=r"2 instructions for 1 sequences.*an example of each turn"):
        collator([{"input_ids": [3, 4], "instruction": ["one", "two"]}])
    with pytest.raises(ValueError, match=r"1 instructions for 2 sequences"):
        collator([{"input_ids": [3, 4], "seq_lengths": [1, 1], "instruction": "one"}])
    with pytest.raises(ValueError, match=r"\['ref_logps'\] that were computed before.*precompute_ref_log_probs=False"):
        collator([{"input_ids": [3, 4], "ref_logps": 0.5, "instruction": "one"}])
