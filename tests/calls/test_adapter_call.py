"""Rank states as one adapter's call takes them: whatever their shape, its tokens row by row."""

import pytest
import torch
from helpers.models import adapted, mlp, opt, outputs, randomise, text
from torch import nn

SCOPES = ["causal", "prompt", "sequence"]


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 2, 5, 8), (3, 0, 8)], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_activation_shapes(shape, scope):
    """[B, d], [B, T, d] and [B, ..., d] activations keep their shape, and rows do not see each other."""
    model = adapted(mlp().double(), target_modules=["first", "second"], routing_scope=scope)
    randomise(model)
    x = torch.randn(*shape, dtype=torch.float64)
    result = outputs(model, {"x": x})
    assert result.shape == (*shape[:-1], 3)
    for row in range(shape[0]):
        torch.testing.assert_close(outputs(model, {"x": x[row : row + 1]}), result[row : row + 1])


@pytest.mark.parametrize("scope", SCOPES)
def test_middle_dimensions_are_tokens(scope):
    """[B, H, W, d] activations are [B, H W, d] ones."""
    model = adapted(mlp().double(), target_modules=["first", "second"], routing_scope=scope)
    randomise(model)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    flat = outputs(model, {"x": x.flatten(1, 2)})
    torch.testing.assert_close(outputs(model, {"x": x}), flat.view(2, 3, 4, 3))


@pytest.mark.parametrize("targets", [["fc1", "fc2"], ["fc1"], ["q_proj", "fc2"]], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_flattened_activations(targets, scope):
    """OPT's fc1 and fc2 get [B T, d]: rows are told apart all the same, padding included, also without others."""
    model = adapted(opt().double(), target_modules=targets, routing_scope=scope, num_blocks=2)
    randomise(model)
    inputs = text()
    result = outputs(model, inputs)
    torch.testing.assert_close(outputs(model, {"input_ids": inputs["input_ids"][:1]}), result[:1])
    torch.testing.assert_close(outputs(model, {"input_ids": inputs["input_ids"][1:, :4]}), result[1:, :4])


def test_rows_that_are_not_rows_are_refused():
    """Activations whose leading dimension is not the batch raise a ValueError with their shape and a remedy."""

    class Regroup(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.view(-1, 4))

    model = adapted(Regroup(), target_modules=["inner"])
    with pytest.raises(ValueError, match=r"shape \[5, 'features'\] .* batch size 2, .*`exclude_modules`"):
        model(torch.randn(2, 10))
    with pytest.raises(ValueError, match=r"shape \[4, 'features'\] .* batch size 2, .*`exclude_modules`"):
        model(torch.randn(2, 8))  # twice the batch: sizes that happen to divide are no evidence
