"""Every trainable tensor of an adapter can learn, at the edges of the configuration too."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from helpers.models import adapted, mlp, randomise, router_of

TARGETS = ["first", "second", "third", "head"]
EDGES = {
    "r": [1, 4],
    "num_atoms": [1, 4],
    "top_k": [1, 2, None],
    "router_dim": [2, 8],
    "num_blocks": [1, 2, 4],
    "query_terms": [(), ("state",), ("depth",), ("instruction",), ("state", "depth", "instruction")],
    "instruction": [None, (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)],
}


def configurations() -> list[dict]:
    """One value of each edge beside the rest of them in full: every pair of values occurs."""
    usual = {"r": 4, "num_atoms": 4, "top_k": 2, "router_dim": 8, "num_blocks": 4, "instruction": (1.0, 1.0)}
    usual["query_terms"] = ("state", "depth", "instruction")
    found = []
    for a, b in itertools.combinations(EDGES, 2):
        for x, y in itertools.product(EDGES[a], EDGES[b]):
            config = usual | {a: x, b: y}
            if config["top_k"] is not None:
                config["top_k"] = min(config["top_k"], config["num_atoms"])
            if config not in found:
                found.append(config)
    return found


def fields(config: dict) -> dict:
    """The configuration's fields; its instruction is None, or its strength and its weight in the query."""
    fields = {name: value for name, value in config.items() if name != "instruction"}
    if config["instruction"] is not None:
        strength, weight = config["instruction"]
        fields |= {"instruction_dim": 5, "instruction_strength": strength, "instruction_query_weight": weight}
    return fields


@pytest.mark.parametrize("config", configurations(), ids=lambda config: "-".join(map(str, config.values())))
def test_every_tensor_learns(config):
    """Each trainable tensor has a gradient that is not zero, or the configuration is refused, or warned of."""
    says_nothing = config["instruction"] == (0.0, 1.0) and "instruction" not in config["query_terms"]
    if says_nothing:
        with pytest.raises(ValueError, match="an instruction would change nothing"):
            adapted(mlp(), target_modules=TARGETS, **fields(config))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "With `")
        model = adapted(mlp(), target_modules=TARGETS, **fields(config))
    model = model.double().train()
    randomise(model, scale=0.5)
    instruction = {} if config["instruction"] is None else {"instruction_embeds": torch.randn(6, 5).double()}
    output = model(torch.randn(6, 8).double(), **instruction)
    (output * torch.randn_like(output)).sum().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trainable.items() if p.grad is None] == []
    still = {name for name, p in trainable.items() if p.grad.abs().max() < 1e-9}
    if 1 in (config["num_atoms"], config["top_k"]):
        assert ["is one atom with weight 1" in str(warning.message) for warning in caught] == [True]
        router = {
            f"base_model.queryable_lora_router.default.{name}" for name, _ in router_of(model).named_parameters()
        }
        assert still == {name for name in router & trainable.keys() if "atoms" not in name}
    else:
        assert not caught and still == set()
