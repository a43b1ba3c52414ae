"""A stack watches its owner's calls: adapted modules run inside one, and in no replica."""

import pytest
import torch
from helpers.models import adapted, llama, token_ids


def test_data_parallel_is_refused(model):
    """A replica of nn.DataParallel raises an error that names it and what to use."""
    replica = model.base_model.model.model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel.*DistributedDataParallel"):
        replica(token_ids())


def test_a_layer_alone_is_refused():
    """An adapted module called outside its model raises an error that says what to call."""
    model = adapted(llama(), target_modules=["q_proj"])
    with pytest.raises(RuntimeError, match="Call the model, not a layer of it"):
        model.base_model.model.model.layers[0].self_attn.q_proj(torch.randn(1, 2, 32))
