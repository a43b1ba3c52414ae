"""The check of a user's model: healthy models pass in every scope, and each fault that is put back is found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.architectures import ARCHITECTURES as SPEECH
from helpers.models import (
    ARCHITECTURES,
    adapted,
    close_gates,
    gpt2,
    llama,
    mlp,
    outputs,
    randomise,
    router_of,
    t5,
    token_ids,
)
from helpers.words import tokenizer, words
from peft import PeftModel
from torch import Tensor, nn

from peft_queryable import check_model, record_routing
from peft_queryable.calls.adapter_call import AdapterCall
from peft_queryable.calls.arguments import leading_tensor
from peft_queryable.check import checking
from peft_queryable.check.__main__ import main
from peft_queryable.check.checking import compare
from peft_queryable.check.runs import Runner
from peft_queryable.method import scope as scopes
from peft_queryable.method.router import Router

LENGTHS = (12, 9, 7)
TEXT_CHECKS = {
    "rows alone",
    "rows in another order",
    "padded on the left",
    "padded on the right",
    "later tokens changed",
    "cached steps",
    "generate, cached or not",
    "packed in one row",
    "saved and loaded",
}


def text() -> dict[str, Tensor]:
    """Three rows of other lengths, padded on the right."""
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": token_ids(3, max(LENGTHS)) * mask, "attention_mask": mask}


def inputs(name: str) -> dict[str, Tensor]:
    given = ARCHITECTURES[name].inputs()
    if "input_ids" not in given:
        return given
    return text() | ({"decoder_input_ids": token_ids(3, 6)} if name == "t5" else {})


def small(scope: str = "causal", **kwargs) -> PeftModel:
    """A Llama of two layers, its adapter trained-looking."""
    model = adapted(llama(num_hidden_layers=2), target_modules="all-linear", routing_scope=scope, **kwargs)
    randomise(model)
    return model


def verdicts(report) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def found(report) -> set[str]:
    """Names of the checks that found a difference."""
    assert report.passed == (not any(check.failed for check in report.checks))
    return {name for name, verdict in verdicts(report).items() if verdict == "differs"}


# Healthy models


@pytest.mark.parametrize("scope", ["causal", "prompt", "sequence"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit", "mlp"])
def test_healthy_models_pass(name, scope):
    """Everything that applies is ok, on a new adapter, whose copy gets random values."""
    architecture = ARCHITECTURES[name]
    model = adapted(architecture.build(), target_modules=architecture.targets, routing_scope=scope)
    report = check_model(model, inputs(name))
    assert report.passed
    assert "Values: random" in report.notes[0]
    found_ok = {check for check, verdict in verdicts(report).items() if verdict == "ok"}
    expected = {"rows alone", "rows in another order", "saved and loaded"}
    if name in ("llama", "gpt2", "t5"):
        expected = TEXT_CHECKS - ({"later tokens changed", "cached steps"} if scope == "sequence" else set())
        expected -= {"packed in one row"} if name == "t5" else set()
    if name == "bert":
        expected |= {"padded on the right"}
        assert verdicts(report)["padded on the left"] == "the base model itself differs"  # its pooler reads token 0
    assert found_ok == expected
    assert all(check.difference <= check.allowed for check in report.checks if check.verdict == "ok")


def test_own_values_are_used_where_routes_differ():
    report = check_model(small(), text())
    assert report.passed
    assert "the adapter's own" in report.notes[0]


def test_closed_gates_would_pass_unseen():
    """Gates at zero leave nothing to see, so the copy gets other values; the model keeps its own."""
    model = small()
    close_gates(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = check_model(model, text())
    assert "Values: random" in report.notes[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_stacks_are_told():
    """Names, scopes, layers, blocks and modules of every stack of the active adapter."""
    model = adapted(t5(), target_modules=["q", "k", "v", "o"], num_blocks=2)
    report = check_model(model, inputs("t5"))
    assert [(s.name, s.scope, s.layers, s.blocks, s.modules) for s in report.stacks] == [
        ("encoder", "sequence", 4, 2, 16),
        ("decoder", "causal", 4, 2, 24),
        ("decoder (cross-attention)", "sequence", 4, 2, 8),
    ]


def test_the_model_stays_as_it_was():
    """Values, mode, what is trainable, random numbers, hooks, and outputs to the bit."""
    model, batch = small(instruction_dim=5).train(), text()
    model.base_model.model.model.norm.weight.requires_grad_(True)  # loading an adapter would freeze it
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    expected, state = outputs(model, batch), torch.get_rng_state()
    check_model(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model, batch), expected)
    assert router_of(model).settings.top_k == 3


def test_labels_and_instructions_go_with_their_rows():
    """A training batch with labels and an instruction for each row; a packed row cannot have them."""
    model, batch = small("prompt", instruction_dim=5), text()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :4] = -100
    report = check_model(model, batch | {"labels": labels, "instruction_embeds": torch.randn(3, 5)})
    assert report.passed
    assert {name for name, verdict in verdicts(report).items() if verdict != "ok"} == {"packed in one row"}


def test_a_decoder_beside_speech():
    """Without `input_ids`, the decoder's tokens are still changed and decoded with a cache."""
    whisper = SPEECH["Whisper"]
    report = check_model(adapted(whisper.build(), target_modules="all-linear"), whisper.inputs())
    assert report.passed
    assert {name for name, verdict in verdicts(report).items() if verdict == "ok"} == {
        "rows alone",
        "rows in another order",
        "later tokens changed",
        "cached steps",
        "saved and loaded",
    }


def test_two_active_adapters():
    """Both are saved, loaded and told."""
    model = small()
    model.add_adapter("second", replace(model.peft_config["default"], routing_scope="prompt"))
    model.base_model.set_adapter(["default", "second"])
    randomise(model, "second")
    report = check_model(model.eval(), text())
    assert report.passed
    assert [(s.adapter_name, s.scope) for s in report.stacks] == [("default", "causal"), ("second", "prompt")]
    assert verdicts(report)["saved and loaded"] == "ok"


# Faults put back


def forget_padding(monkeypatch):
    """Pooling takes padding for tokens."""
    for scope in (scopes.Causal, scopes.Sequence):
        monkeypatch.setattr(scope, "masks", lambda self, tokens: ())


def pool_the_whole_sequence(monkeypatch):
    """`causal` pools what is yet to come."""
    monkeypatch.setattr(scopes, "segment_cumsum", lambda x, segments: x.sum(1, keepdim=True).expand_as(x))


def mix_batch_mates(monkeypatch):
    """The mean over the batch in place of each row's own."""
    pool = scopes.Pool.sum
    monkeypatch.setattr(
        scopes.Pool, "sum", lambda self, states: pool(self, states).mean(0, keepdim=True).expand_as(pool(self, states))
    )


def use_the_first_row(monkeypatch):
    """All rows get the route of the first."""
    forward = Router.forward
    monkeypatch.setattr(
        Router, "forward", lambda *args: (weights := forward(*args))[:1].expand_as(weights).contiguous()
    )


def forget_cached_tokens(monkeypatch):
    """Running sums start again in every step."""
    continued = AdapterCall._continued

    def restarted(self, name, sums):
        self.start = {}
        return continued(self, name, sums)

    monkeypatch.setattr(AdapterCall, "_continued", restarted)


def ignore_packing(monkeypatch):
    """A packed row is one sequence."""
    make = scopes.Pool.__init__
    monkeypatch.setattr(
        scopes.Pool, "__init__", lambda self, scope, tokens: make(self, scope, replace(tokens, segments=None))
    )


def lose_the_router(monkeypatch):
    """A loaded adapter has a random router."""
    load = PeftModel.from_pretrained.__func__

    def loaded(cls, *args, **kwargs):
        model = load(cls, *args, **kwargs)
        for parameter in router_of(model).parameters():
            nn.init.normal_(parameter)
        return model

    monkeypatch.setattr(PeftModel, "from_pretrained", classmethod(loaded))


PADDING = {"padded on the left", "padded on the right"}
CACHE = {"cached steps", "generate, cached or not"}
ROWS = {"rows alone", "rows in another order"}
FAULTS = {
    forget_padding: ("causal", {"padded on the left"}),  # on the right, a token sees no padding in this scope
    pool_the_whole_sequence: ("causal", {"later tokens changed", *CACHE}),
    mix_batch_mates: ("sequence", {"rows alone", *PADDING}),
    use_the_first_row: ("causal", {*ROWS, *PADDING}),
    forget_cached_tokens: ("causal", CACHE),
    ignore_packing: ("causal", {"packed in one row"}),
    lose_the_router: ("causal", {"saved and loaded"}),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_found(fault, monkeypatch):
    """The checks that a fault concerns say so, and the report does not pass."""
    scope, expected = FAULTS[fault]
    model = small(scope)
    fault(monkeypatch)
    report = check_model(model, text())
    assert not report.passed
    assert expected <= found(report)
    assert "FAILED: " in str(report)


@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_padding_of_an_encoder(scope, monkeypatch):
    """In `sequence`, padding on the right counts too; a new adapter does not hide it."""
    model = adapted(llama(num_hidden_layers=2), target_modules="all-linear", routing_scope=scope)
    forget_padding(monkeypatch)
    assert found(check_model(model, text())) >= ({"padded on the left"} if scope == "causal" else PADDING)


def test_one_fault_is_seen_alone(monkeypatch):
    """Other checks stay ok: what fails tells where to look."""
    model = small()
    ignore_packing(monkeypatch)
    assert found(check_model(model, text())) == {"packed in one row"}


# Verdicts


class Unlike(nn.Module):
    """A base model whose rows depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) - x.mean(0)


def test_the_base_model_itself_differs():
    """A difference of plain LoRA too is not the library's, and no failure."""
    report = check_model(adapted(Unlike(), target_modules=["linear"]), {"x": torch.randn(4, 8)})
    assert verdicts(report)["rows alone"] == "the base model itself differs"
    assert verdicts(report)["padded on the left"] == "not applicable"
    assert report.passed


def runners() -> tuple[Runner, Runner]:
    model, batch = adapted(mlp(), target_modules=["first"]), {"x": torch.randn(2, 8)}
    return Runner(model, batch), Runner(model, batch, is_plain=True)


def crash(run: Runner):
    return 0.0 if run.is_plain else [][1]


def refuse(run: Runner):
    return 0.0 if run.is_plain else leading_tensor({})


def fail_both(run: Runner):
    raise KeyError("what the base model lacks")


@pytest.mark.parametrize(
    ("compute", "verdict", "failed"),
    [
        (refuse, "refused", False),
        (crash, "raises", True),
        (fail_both, "not applicable", False),
        (lambda run: "in words", "not applicable", False),
        (lambda run: 0.0, "ok", False),
        (lambda run: 2e-6 if run.is_plain else 1e-5, "ok", False),
        (lambda run: 2e-6 if run.is_plain else 1e-4, "differs", True),
        (lambda run: 0.0 if run.is_plain else 1e-6, "ok", False),
        (lambda run: float("inf") if not run.is_plain else 0.0, "differs", True),
        (lambda run: 1e-3, "the base model itself differs", False),
    ],
)
def test_verdicts(compute, verdict, failed):
    """A refusal of the library is told from a crash, and a difference from rounding."""
    check = compare("name", compute, *runners(), floor=1e-6, ceiling=1e-4)
    assert (check.verdict, check.failed) == (verdict, failed)


def test_not_a_number_is_a_difference(monkeypatch):
    """A NaN in one of the outputs does not pass as equal."""
    model = small()
    forward = Router.forward

    def broken(self, block, state, means, shared):
        return forward(self, block, state, means, shared) * (float("nan") if state.shape[0] == 1 else 1)

    monkeypatch.setattr(Router, "forward", broken)
    assert "rows alone" in found(check_model(model, text()))


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (llama, {}, "got LlamaForCausalLM. Unwrap it first"),
        (small, {"input_ids": token_ids(1)}, "at least two rows"),
        (small, {"input_ids": token_ids(2), "adapter_names": ["default"] * 2}, "without `adapter_names`"),
    ],
)
def test_wrong_arguments(model, batch, message):
    with pytest.raises((TypeError, ValueError), match=message):
        check_model(model(), batch)


def test_bfloat16():
    """The dtype's epsilon sets what is allowed."""
    report = check_model(adapted(gpt2().bfloat16(), target_modules=["c_attn"]), text())
    assert report.passed
    assert "rounding (7.8e-03)" in report.notes[2]


def test_no_trace_of_a_recorder():
    """A check inside of a block that records routes adds nothing to it."""
    model = small()
    with record_routing(model) as trace:
        check_model(model, text())
    assert trace.calls == []


# The command


@pytest.fixture
def base(tmp_path) -> str:
    folder = str(tmp_path / "base")
    llama(num_hidden_layers=2, pad_token_id=0).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_command(base, tmp_path, capsys):
    """An adapter with data of its own: a report, and exit code 0."""
    model = adapted(type(llama()).from_pretrained(base), target_modules="all-linear", routing_scope="prompt")
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    lines = [{"prompt": words(i, 5 + i), "completion": words(9 + i, 4)} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main([str(tmp_path / "adapter"), "--data", str(tmp_path / "data.jsonl"), "--rows", "2"]) == 0
    printed = capsys.readouterr().out
    assert "the adapter's own" in printed
    assert printed.endswith("passed\n")


def test_command_on_a_base_model_with_a_fault(base, tmp_path, capsys, monkeypatch):
    """A new adapter on a base model; exit code 1 where something differs."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": words(i, 8 + i)}) for i in range(3)))
    ignore_packing(monkeypatch)
    assert main([base, "--data", str(data), "--scope", "sequence"]) == 1
    assert capsys.readouterr().out.endswith("FAILED: packed in one row\n")


def test_all_checks_are_known():
    assert set(checking.RUNS) == TEXT_CHECKS
