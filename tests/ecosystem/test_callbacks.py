"""`RoutingCallback` in transformers' and TRL's trainers: what it logs is what the routes of the loss were."""

import warnings
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from helpers.models import LLAMA_PROJECTIONS, VOCAB, adapted, llama, randomise, router_of, text
from helpers.trainers import config, settings
from helpers.trl_trainers import QUIET
from helpers.words import tokenizer, words
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_queryable import RouteStatistics, RoutingCallback, record_routing
from peft_queryable.metrics import concentration, drift, gates, gradient_norms

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Atoms .* are dead:UserWarning"),  # with six atoms and few routes
]
LOGGED = ["entropy", "by_input", "by_block", "load_balance", "top_atom", "dead", "gate_mean", "gradient_concentration"]


def examples(count: int = 16) -> list[dict]:
    """Sequences of different lengths, so that batches have padding."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, VOCAB, (8 + i % 5,), generator=generator).tolist() for i in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, callback, prepare=lambda model: None, **kwargs) -> Trainer:
    torch.manual_seed(0)
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, task_type="CAUSAL_LM")
    randomise(model)
    prepare(model)
    arguments = TrainingArguments(**settings(folder, max_steps=4, **kwargs))
    collator = DataCollatorForSeq2Seq(tokenizer(), padding=True)
    data = Dataset.from_list(examples())
    return Trainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=[callback])


def entries(trained: Trainer) -> list[dict]:
    return [entry for entry in trained.state.log_history if "loss" in entry]


def routing(entry: dict) -> dict[str, float]:
    return {name.removeprefix("routing/"): value for name, value in entry.items() if name.startswith("routing/")}


class Watch(RoutingCallback):
    """Keeps, at each step's end, what a plain recording of the whole step says."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.expected: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.watching = record_routing(self.model)
        self.trace = self.watching.__enter__()
        super().on_step_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        index = concentration(torch.stack(list(gradient_norms(self.model).values()))).item()
        self.expected.append({"gradient_concentration": index})

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.watching.__exit__(None, None, None)
        statistics = RouteStatistics()
        statistics.add(self.trace.weights())
        own = gates(self.model)
        self.expected[-1] |= statistics.summary() | {"gate_mean": sum(own.values()) / len(own)}


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"max_grad_norm": 0.01}],
    ids=["plain", "accumulation", "checkpointing", "clipping"],
)
def test_what_is_logged_is_what_was_routed(tmp_path, kwargs):
    """Each entry says what a recording of all routes of its step says, every micro batch and no padding."""
    callback = Watch(every=1)
    trained = trainer(tmp_path, callback, **kwargs)
    trained.train()
    assert len(entries(trained)) == 4
    for entry, expected in zip(entries(trained), callback.expected, strict=True):
        assert routing(entry) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert list(routing(entry)) == LOGGED
    assert list(callback.usages) == [1, 2, 3, 4]


def test_accumulated_batches_count_as_one_batch(tmp_path):
    """Two batches of two are logged as one of four with the same examples."""
    logged = []
    for batch, parts in ((4, 1), (2, 2)):
        trained = trainer(
            tmp_path, RoutingCallback(every=1), per_device_train_batch_size=batch, gradient_accumulation_steps=parts
        )
        trained.train()
        logged.append(routing(entries(trained)[0]))
    del (
        logged[0]["gradient_concentration"],
        logged[1]["gradient_concentration"],
    )  # a mean per batch is weighted otherwise
    assert logged[0] == pytest.approx(logged[1], abs=1e-6)


def test_training_is_the_same_with_it(tmp_path):
    """The model learns the same, to the bit, evaluation batch included."""
    states = []
    for callback in (RoutingCallback(every=2, eval_batch=text()), None):
        trained = trainer(tmp_path, callback) if callback else trainer(tmp_path, RoutingCallback(every=99))
        if callback is None:
            trained.remove_callback(RoutingCallback)
        trained.train()
        states.append({name: p.detach().clone() for name, p in trained.model.named_parameters()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_steps_between_are_not_counted(tmp_path):
    """Of four steps, the first and the third; the other entries say nothing of routes."""
    trained = trainer(tmp_path, RoutingCallback(every=2))
    trained.train()
    assert [bool(routing(entry)) for entry in entries(trained)] == [True, False, True, False]


def test_nothing_waits_for_the_device_between_logs(tmp_path, monkeypatch):
    """Between logging steps no tensor is read; at one, the table of sums is, once."""
    read = []
    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, original=original, name=name, **kwargs):
            if any(inside):
                read.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    inside: list[bool] = []

    class Inside(RoutingCallback):
        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name not in ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_step_end", "_record"):
                return value

            def watched(*args, **kwargs):
                inside.append(True)
                try:
                    return value(*args, **kwargs)
                finally:
                    inside.pop()

            return watched

    trained = trainer(tmp_path, Inside(every=1), logging_steps=4)
    trained.train()
    assert read == []
    assert routing(entries(trained)[0])


def test_drift_is_that_of_the_evaluation_batch(tmp_path):
    """From one entry to the next, and from the start, on the same batch."""
    batch, seen = text(), []

    class Keep(RoutingCallback):
        def _eval_routes(self):
            seen.append(super()._eval_routes())
            return seen[-1]

    trained = trainer(tmp_path, Keep(every=1, eval_batch=batch))
    with record_routing(trained.model) as trace:
        trained.model(**batch)
    trained.train()
    assert torch.equal(seen[0], torch.cat(list(trace.weights().values())))
    found = [routing(entry) for entry in entries(trained)]
    assert [entry["drift"] for entry in found] == [drift(a, b).item() for a, b in pairwise(seen)]
    assert [entry["drift_from_start"] for entry in found] == [drift(seen[0], routes).item() for routes in seen[1:]]
    assert found[-1]["drift_from_start"] > 0


def fix_routes(model) -> None:
    """The routes of new adapters before centring: a prior beside which the states are nothing."""
    router_of(model).block_prior.weight.data.mul_(1e4)


def test_constant_routes_are_warned_of_once(tmp_path):
    with pytest.warns(UserWarning, match="Routes are constant") as caught:
        trainer(tmp_path, RoutingCallback(every=1), prepare=fix_routes).train()
    assert sum("Routes are constant" in str(warning.message) for warning in caught) == 1


def test_moving_routes_are_not_warned_of(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, RoutingCallback(every=1)).train()
    assert not [w for w in caught if "Routes are constant" in str(w.message) or "takes" in str(w.message)]


@pytest.mark.filterwarnings("ignore:Routes are constant:UserWarning")
def test_one_atom_is_warned_of(tmp_path):
    def send_all_to_one(model) -> None:
        router = router_of(model)
        router.block_prior.weight.data = 1e4 * router.keys.weight.data[:1].repeat(4, 1)
        router.attention_scale *= 50

    with pytest.warns(UserWarning, match="Atom 0 takes 100% of all weight"):
        trainer(tmp_path, RoutingCallback(every=1), prepare=send_all_to_one).train()


def sft(folder, callbacks, **kwargs) -> SFTTrainer:
    return SFTTrainer(
        llama(),
        SFTConfig(**settings(folder, **kwargs)),
        train_dataset=Dataset.from_dict({"text": [words(i, 5 + i % 4) for i in range(8)]}),
        processing_class=tokenizer(),
        peft_config=config(),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("added", [False, True], ids=["given", "added"])
def test_sft_leaves_our_card(tmp_path, added):
    """Where TRL leaves its own in the control; and its own metrics stay in the same entry."""
    sft(tmp_path / "trl", [], save_strategy="steps", save_steps=2).train()
    assert "pipeline" in (tmp_path / "trl/README.md").read_text().split("---")[2]
    trained = sft(tmp_path / "ours", [] if added else [RoutingCallback(every=1)], save_strategy="steps", save_steps=2)
    if added:
        trained.add_callback(RoutingCallback(every=1))
    trained.train()
    trained.save_model()
    card = (tmp_path / "ours/README.md").read_text()
    assert "import peft_queryable" in card and "pipeline(" not in card and "TRL" not in card
    for entry in entries(trained):
        assert {"routing/entropy", "mean_token_accuracy", "num_tokens"} <= entry.keys()


def test_generation_does_not_count(tmp_path):
    """GRPO generates between a step's beginning and its loss: only the routes of the loss are logged."""
    counted = []

    class Count(RoutingCallback):
        def _record(self, call):
            super()._record(call)
            counted.append((torch.is_grad_enabled(), len(self.calls)))

    trained = GRPOTrainer(
        llama(),
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
        args=GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=6, beta=0.1)),
        train_dataset=Dataset.from_dict({"prompt": [words(i, 3) for i in range(8)]}),
        processing_class=tokenizer(),
        peft_config=config(),
        callbacks=[Count(every=1)],
    )
    trained.train()
    assert {with_gradient for with_gradient, _ in counted} == {True, False}
    assert max(calls for _, calls in counted) == 1
    assert all(routing(entry) for entry in entries(trained))


def test_a_model_without_an_adapter(tmp_path):
    arguments = TrainingArguments(**settings(tmp_path))
    plain = Trainer(llama(), arguments, train_dataset=Dataset.from_list(examples()), callbacks=[RoutingCallback()])
    with pytest.raises(ValueError, match="no Queryable LoRA adapter"):
        plain.train()


def test_every_is_a_number_of_steps():
    with pytest.raises(ValueError, match="takes `every` of 1 or more, got 0"):
        RoutingCallback(every=0)
