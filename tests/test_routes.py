"""Sets of routes: means, those of an instruction, and what is refused as one."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.fixed import close, random_routes, trained
from helpers.models import (
    llama,
    outputs,
    text,
)
from peft import PeftModel

from peft_queryable import (
    Routes,
    export_lora,
    fix_routes,
    instruction_routes,
    mean_routes,
    record_routing,
    set_default_instruction,
    use_instructions,
)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_instruction_routes(tmp_path):
    """Exact where nothing but the instruction chooses; elsewhere a mean over calibration data, which is asked for."""
    inputs = text()
    model = trained(llama(), target_modules=["q_proj"], query_terms=("instruction",), instruction_dim=5)
    embedding = torch.randn(1, 5)
    with use_instructions(model, embedding):
        expected = outputs(model, inputs)
    routes = instruction_routes(model, embedding)
    with fix_routes(model, routes):
        close(outputs(model, inputs), expected)
        with pytest.raises(
            ValueError, match="An instruction was given, but the routes of adapter 'default' are fixed"
        ):
            model(**inputs, instruction_embeds=embedding)
    with use_instructions(model, embedding), fix_routes(model, routes), pytest.raises(ValueError, match="are fixed"):
        model(**inputs)
    with pytest.raises(ValueError, match="depend on the input"):
        export_lora(model, tmp_path / "lora")
    model = trained(llama(), target_modules=["q_proj"], instruction_dim=5)
    with pytest.raises(ValueError, match="depend on the tokens too"):
        instruction_routes(model, embedding)
    calibrated = instruction_routes(model, embedding, calibration=[inputs])
    with use_instructions(model, embedding), record_routing(model) as trace:
        model(**inputs)
    close(calibrated.weights, mean_routes(trace).weights)
    assert "given: mean of 10 routes" in calibrated.source


def test_default_instruction_is_exported(tmp_path):
    """It is known what an adapter does that reads nothing but an instruction, once a default is set."""
    base, inputs = llama(), text()
    model = trained(copy.deepcopy(base), target_modules=["q_proj"], query_terms=("instruction",), instruction_dim=5)
    set_default_instruction(model, None)
    with pytest.raises(ValueError, match="depend on the input"):
        export_lora(model, tmp_path / "lora")
    set_default_instruction(model, torch.randn(1, 5))
    with use_instructions(model, torch.randn(1, 5)), pytest.raises(ValueError, match="depend on the input"):
        export_lora(model, tmp_path / "lora")
    export_lora(model, tmp_path / "lora")
    exported = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    close(outputs(exported, inputs), outputs(model, inputs))
    assert "the default instruction" in (tmp_path / "lora" / "routes.json").read_text()
    with pytest.raises(NotImplementedError, match="cannot be merged"):  # an instruction would change nothing any more
        model.merge_adapter()


def test_means_by_group():
    """The mean of a group is that of its rows alone, without padding."""
    model, inputs = trained(llama(), target_modules=["q_proj"]), text()
    with record_routing(model) as trace:
        model(**inputs)
        model(**{k: v.flip(0) for k, v in inputs.items()})
    groups = mean_routes(trace, by=["a", "b", "b", "a"])
    for row, group in enumerate("ab"):
        with record_routing(model) as alone:
            model(**{k: v[row : row + 1] for k, v in inputs.items()})
        close(groups[group].weights, mean_routes(alone).weights)
    with pytest.raises(ValueError, match="`by` has 3 groups, but model was called with 4 rows"):
        mean_routes(trace, by=["a", "b", "b"])


def broken(change):
    def make(model):
        weights = dict(random_routes(model).weights)
        change(weights)
        return Routes(weights)

    return make


BAD_ROUTES = {
    "a block is missing": (broken(lambda w: w.pop(2)), r"blocks 0 to 3, got \[0, 1, 3\]"),
    "a block too many": (broken(lambda w: w.update({4: w[0]})), "blocks 0 to 3"),
    "atoms": (broken(lambda w: w.update({1: w[1][:-1]})), r"Block 1 .* shape \(5,\), but the adapter has 6 atoms"),
    "sum": (broken(lambda w: w.update({1: w[1] * 1.1})), "Block 1 .* of sum 1.1"),
    "negative": (broken(lambda w: w.update({3: torch.tensor([2.0, -1, 0, 0, 0, 0])})), "Block 3 .* least value -1"),
    "nan": (broken(lambda w: w.update({0: w[0] * torch.nan})), "Block 0 .* nan"),
    "adapter": (lambda model: Routes(random_routes(model).weights, "other"), "There is no adapter 'other'"),
    "none": (lambda model: None, r"depend on the input.*mean_routes\(trace\)"),
}


@pytest.mark.parametrize("case", BAD_ROUTES)
def test_bad_routes(case, tmp_path):
    """Routes that are not the router's raise, and nothing is written."""
    model, (make, message) = trained(llama(), target_modules=["q_proj"]), BAD_ROUTES[case]
    with pytest.raises(ValueError, match=message):
        export_lora(model, tmp_path / "lora", make(model))
    assert list(tmp_path.iterdir()) == []
    if case != "none":
        with pytest.raises(ValueError, match=message), fix_routes(model, make(model)):
            pass
