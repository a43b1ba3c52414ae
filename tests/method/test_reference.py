"""The library against the loops of reference.py: outputs and the gradient of every trainable tensor, in float64."""

from __future__ import annotations

import copy
import itertools
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from helpers.models import MLP, gpt2, llama, token_ids
from helpers.reference import Bank, Call, Hyper, Tokens, read_parameters, route
from peft import get_peft_model
from torch import Tensor, nn

from peft_queryable import QueryableLoraConfig
from peft_queryable.method.router import Router, RouterSettings

TOLERANCE = 1e-9
INSTRUCTION_DIM = 4
HYPER = Hyper(
    top_k=2,
    attention_temperature=0.7,
    depth_temperature=0.4,
    language_temperature=0.6,
    instruction_strength=1.3,
    instruction_query_weight=0.8,
)
CONFIG = {"r": 3, "lora_alpha": 5, "num_atoms": 5, "num_blocks": 3, "router_dim": 4, **asdict(HYPER)}
TERMS = ("state", "depth", "instruction")
ATTENTION = ["q_proj", "k_proj", "v_proj"]
BATCH, LENGTH = 3, 5
PROMPT_LENGTHS = (2, 1, 3)  # real tokens of each row's prompt
PADDING = {"none": (0, 0, 0), "left": (0, 1, 2), "right": (0, 1, 2)}  # padding tokens of each row


# What is compared


@dataclass
class Case:
    """A base model in float64 and a call of it: keyword arguments for it, and those only the adapted model takes."""

    base: nn.Module
    tokens: Tokens
    inputs: dict[str, Any]
    ours: dict[str, Any]

    @property
    def real(self) -> Tensor:
        """[B, T]: outputs of padding are nobody's concern."""
        return torch.tensor(self.tokens.real or [[True] * self.tokens.length] * self.tokens.batch)


def randomised(base: nn.Module, **config: Any) -> tuple[nn.Module, QueryableLoraConfig]:
    """A copy of `base` with an adapter none of whose tensors is at its initial value."""
    peft_config = QueryableLoraConfig(**(CONFIG | config))
    adapted = get_peft_model(copy.deepcopy(base), peft_config, autocast_adapter_dtype=False).eval()
    for p in adapted.parameters():
        if p.requires_grad:
            assert p.dtype == torch.float64
            nn.init.normal_(p, std=0.3)
    return adapted, peft_config


def outputs(model: nn.Module, **inputs: Any) -> Tensor:
    """[B, T, out] of a model, or of an MLP of rows."""
    output = model(**inputs)
    output = getattr(output, "logits", output)
    return output.unsqueeze(1) if output.ndim == 2 else output


def compare(case: Case, scope: str, **config: Any) -> None:
    """Library and reference agree on the outputs of real tokens and on all gradients of a random scalar of them.

    Args:
        case: the model and the call.
        scope: what `routing_scope` means for it; the configuration says "auto" unless told.
        **config: what differs from `CONFIG`.
    """
    adapted, peft_config = randomised(case.base, **config)
    parameters = read_parameters(adapted)
    instruction = case.ours.get("instruction_embeds")
    with Call(parameters, peft_config, scope, case.tokens, instruction).on(case.base):
        expected = outputs(case.base, **case.inputs)[case.real]
    actual = outputs(adapted, **case.inputs, **case.ours)[case.real]
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    with torch.no_grad():  # the update is there to be compared
        assert (outputs(case.base, **case.inputs)[case.real] - actual).abs().max() > 1e-3

    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((weights * expected).sum(), parameters.values(), materialize_grads=True)
    (weights * actual).sum().backward()
    ours = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for (name, p), grad in zip(ours.items(), expected_grads, strict=True):
        assert p.grad is not None, f"{name} is not in the graph"
        torch.testing.assert_close(p.grad, grad, atol=TOLERANCE, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        is_idle = ".instruction_" in name and instruction is None
        assert is_idle or grad.any(), f"{name} has no gradient to compare"


# Cases


class TokenMLP(MLP):
    """The MLP on [B, T, 8], with the arguments of a model of tokens."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return super().forward(x)


class StackedMLP(nn.Module):
    """Residual layers of two linear maps each in an nn.ModuleList, [..., 8] -> [..., 8]."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8)}) for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x


def instruction(kind: str | None, batch: int) -> dict[str, Tensor]:
    rows = {"each": batch, "one": 1}
    return {} if kind is None else {"instruction_embeds": torch.randn(rows[kind], INSTRUCTION_DIM).double()}


def rows_case(base: nn.Module, kind: str | None = None) -> Case:
    """Rows [B, d] of features: a sequence of one token each."""
    return Case(base.double(), Tokens(BATCH, 1), {"x": torch.randn(BATCH, 8).double()}, instruction(kind, BATCH))


def prompt_marks(padding: str) -> list[list[bool]]:
    """Whether each position is supervised: a turn, then unsupervised tokens again, which are no prompt."""
    marks = []
    for pad, prompt in zip(PADDING[padding], PROMPT_LENGTHS, strict=True):
        length = LENGTH - pad
        row = [t >= prompt and t != prompt + 1 for t in range(length)]
        marks.append([False] * pad + row if padding == "left" else row + [False] * pad)
    return marks


def tokens_case(base: nn.Module, padding: str = "none", prompt: str | None = None, kind: str | None = None) -> Case:
    """Rows of tokens, padded, with `prompt` marked by "labels" or a "prompt_mask"."""
    real = [[True] * (LENGTH - pad) for pad in PADDING[padding]]
    empty = [[False] * pad for pad in PADDING[padding]]
    real = [e + r if padding == "left" else r + e for e, r in zip(empty, real, strict=True)]
    tokens = Tokens(BATCH, LENGTH, real, supervised=prompt_marks(padding) if prompt else None)
    inputs: dict[str, Any] = {"attention_mask": torch.tensor(real).long()} if padding != "none" else {}
    ours = instruction(kind, BATCH)
    if isinstance(base, TokenMLP):
        inputs["x"] = torch.randn(BATCH, LENGTH, 8).double()
    else:
        inputs |= {"input_ids": token_ids(BATCH, LENGTH), "use_cache": False}
    if prompt == "labels":
        ours["labels"] = torch.where(torch.tensor(tokens.supervised), token_ids(BATCH, LENGTH), -100)
    elif prompt == "prompt_mask":  # 1 for the prompt: its mask and nothing else
        ours["prompt_mask"] = torch.tensor(
            [[t in tokens.visible("prompt", row, t) for t in range(LENGTH)] for row in range(BATCH)]
        ).long()
    return Case(base.double(), tokens, inputs, ours)


def packed_case(base: nn.Module, prompt: bool) -> Case:
    """Two packed rows of 3 + 4 and 5 + 2 tokens, told apart by position_ids."""
    lengths = [(3, 4), (5, 2)]
    segments = [[i for i, n in enumerate(row) for _ in range(n)] for row in lengths]
    supervised = [[t >= n - 1 for n in row for t in range(n)] for row in lengths]
    tokens = Tokens(2, 7, segments=segments, supervised=supervised if prompt else None)
    ids = token_ids(2, 7)
    positions = torch.tensor([[t for n in row for t in range(n)] for row in lengths])
    ours = {"labels": torch.where(torch.tensor(supervised), ids, -100)} if prompt else {}
    return Case(base.double(), tokens, {"input_ids": ids, "position_ids": positions, "use_cache": False}, ours)


# The router alone


@pytest.mark.parametrize("terms", [("state", "depth", "instruction"), ("state",), ("depth",), ("instruction",), ()])
@pytest.mark.parametrize("kind", [None, "one", "each"])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_router(top_k, kind, terms):
    """Weights of one state at a time after zero to three earlier blocks; then S and S s of those weights."""
    hyper = Hyper(**(asdict(HYPER) | {"top_k": top_k}))
    settings = RouterSettings(
        3, 6, num_blocks=4, dim=5, instruction_dim=INSTRUCTION_DIM, query_terms=terms, **asdict(hyper)
    )
    router = Router(settings)
    router = router.double()
    bank = Bank.read(dict(router.named_parameters()), hyper)
    state, *means = torch.randn(4, BATCH, 2, 3).double()
    e = instruction(kind, BATCH).get("instruction_embeds")
    for block in range(4):
        weights = router(block, state, means[:block], router.prepare(e))
        operators = router.atoms.transposed_operators(weights).mT
        mixed = router.atoms.mix(weights, state)
        for row, t in itertools.product(range(BATCH), range(2)):
            embedding = None if e is None else e[row if len(e) > 1 else 0]
            alpha = route(bank, block, state[row, t], [mean[row, t] for mean in means[:block]], embedding)
            torch.testing.assert_close(weights[row, t], torch.stack(alpha), atol=1e-12, rtol=0)
            S = sum(a * C for a, C in zip(alpha, bank.C, strict=True))
            torch.testing.assert_close(mixed[row, t], S @ state[row, t], atol=1e-12, rtol=0)
            torch.testing.assert_close(operators[row, t], S, atol=1e-12, rtol=0)


# Multi-layer perceptrons


@pytest.mark.parametrize("kind", [None, "one", "each"])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("seed", range(3))
def test_mlp_of_rows(seed, top_k, kind):
    torch.manual_seed(seed)
    case = rows_case(MLP(), kind)
    compare(case, "sequence", target_modules="all-linear", top_k=top_k, instruction_dim=INSTRUCTION_DIM)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("scope", ["auto", "sequence", "causal", "prompt"])
def test_mlp_of_tokens(scope, padding):
    case = tokens_case(TokenMLP(), padding, prompt="labels" if scope == "prompt" else None)
    resolved = "causal" if scope == "auto" else scope
    compare(case, resolved, target_modules="all-linear", routing_scope=scope)


@pytest.mark.parametrize("terms", [t for n in range(4) for t in itertools.combinations(TERMS, n)], ids="+".join)
def test_query_terms(terms):
    case = tokens_case(TokenMLP(), kind="each")
    compare(case, "causal", target_modules="all-linear", query_terms=terms, instruction_dim=INSTRUCTION_DIM)


@pytest.mark.parametrize(
    ("num_layers", "num_blocks"), [(5, 3), (7, 3), (7, 4), (3, 3), (3, 8), (4, 1), (1, 4)], ids=str
)
def test_layers_split_into_blocks(num_layers, num_blocks):
    """Sizes that do not divide, fewer layers than blocks, and one layer."""
    compare(rows_case(StackedMLP(num_layers)), "sequence", target_modules=["up", "down"], num_blocks=num_blocks)


@pytest.mark.parametrize("target", ["first", "third"])
def test_one_adapted_module(target):
    compare(rows_case(MLP()), "sequence", target_modules=[target])


# Transformers


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("scope", ["auto", "causal", "prompt", "sequence"])
def test_llama(scope, padding, top_k):
    """Grouped queries; a call that marks no prompt is one."""
    resolved = "causal" if scope == "auto" else scope
    targets = [*ATTENTION, "o_proj", "down_proj"]
    compare(tokens_case(llama(), padding), resolved, target_modules=targets, routing_scope=scope, top_k=top_k)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("scope", ["auto", "causal", "prompt", "sequence"])
def test_gpt2(scope, padding):
    """Conv1D modules, and queries, keys and values from one of them."""
    resolved = "causal" if scope == "auto" else scope
    compare(tokens_case(gpt2(), padding), resolved, target_modules=["c_attn", "c_proj", "c_fc"], routing_scope=scope)


@pytest.mark.parametrize("seed", range(1, 4))
def test_llama_with_everything(seed):
    """All seven projections, an instruction for each row, left padding; more seeds."""
    torch.manual_seed(seed)
    case = tokens_case(llama(), "left", kind="each")
    compare(case, "causal", target_modules="all-linear", instruction_dim=INSTRUCTION_DIM)


@pytest.mark.parametrize("kind", [None, "one", "each"])
@pytest.mark.parametrize("scope", ["causal", "sequence"])
def test_instruction(scope, kind):
    case = tokens_case(llama(), "right", kind=kind)
    compare(case, scope, target_modules=["q_proj", "v_proj"], routing_scope=scope, instruction_dim=INSTRUCTION_DIM)


@pytest.mark.parametrize("mark", ["labels", "prompt_mask"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_marked_prompt(build, padding, mark):
    """Tokens before the first supervised one route; unsupervised tokens after it do not, nor does padding."""
    targets = ["q_proj", "v_proj", "up_proj"] if build is llama else ["c_attn", "c_fc"]
    compare(tokens_case(build(), padding, prompt=mark), "prompt", target_modules=targets, routing_scope="prompt")


@pytest.mark.parametrize("scope", ["causal", "prompt", "marked prompt", "sequence"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_packed_rows(build, scope):
    targets = ["q_proj", "v_proj", "up_proj"] if build is llama else ["c_attn", "c_fc"]
    case = packed_case(build(), prompt=scope == "marked prompt")
    scope = scope.removeprefix("marked ")
    compare(case, scope, target_modules=targets, routing_scope=scope)


@pytest.mark.parametrize(
    "targets",
    [ATTENTION, ["q_proj", "v_proj"], ["k_proj", "v_proj", "o_proj"], ["o_proj", "up_proj"], ["gate_proj"]],
    ids="+".join,
)
def test_entry_state(targets):
    """Eq. 16 over those of query, key and value that are adapted; the entry module's own state elsewhere."""
    compare(tokens_case(llama()), "causal", target_modules=targets)


@pytest.mark.parametrize("layers", [[2], [0, 1]], ids=str)
def test_some_layers(layers):
    """Only layers with adapted modules are split into blocks."""
    compare(tokens_case(llama()), "causal", target_modules=ATTENTION, layers_to_transform=layers)
