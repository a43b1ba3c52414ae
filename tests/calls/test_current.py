"""Which call is running: a call that raises leaves nothing behind, and threads do not see each other's."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.generation import PROMPT, SCOPES, decoder, full_logits
from helpers.models import adapted, llama, outputs, randomise, token_ids


@pytest.fixture(scope="module", params=SCOPES)
def model(request):
    return decoder(request.param)


def test_exception_leaves_no_state(model):
    """A call that fails half-way changes nothing for the next one."""
    ids = token_ids(2, PROMPT)
    expected = full_logits(model, ids)
    layer = model.base_model.model.model.layers[2]
    hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, prompt_mask=torch.zeros_like(ids))
    hook.remove()
    assert all(stack.current.call is None for stack in model.base_model.stacks)
    assert torch.equal(full_logits(model, ids), expected)


def test_threads_with_a_model_each():
    """Two models in two threads do not see each other."""
    models, ids, expected = [], token_ids(2, PROMPT), []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(adapted(llama().double(), target_modules="all-linear"))
        randomise(models[-1])
        expected.append(outputs(models[-1], {"input_ids": ids}))
    differences: list[float] = []

    def run(model, reference):
        for _ in range(20):
            differences.append((outputs(model, {"input_ids": ids}) - reference).abs().max().item())

    threads = [threading.Thread(target=run, args=pair) for pair in zip(models, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differences) == 40
    assert max(differences) < 1e-12
