"""The description of each function, as the instruction of its runs."""

from functools import cache

import torch
from torch import Tensor

from peft_queryable import SentenceEncoder
from recipes.common.minilm import minilm_folder
from recipes.regression.baselines import INSTRUCTION_DIM
from recipes.regression.functions import FUNCTIONS


@cache
def sentence_encoder(name: str | None) -> SentenceEncoder:
    """The encoder `name`, or all-MiniLM-L6-v2 from its package."""
    return SentenceEncoder(str(minilm_folder()) if name is None else name)


def instruction(function: str, encoder: str | None) -> Tensor:
    """The embedded description of `function` [1, INSTRUCTION_DIM], by a fixed random projection."""
    embeds = sentence_encoder(encoder)([FUNCTIONS[function].description])
    projection = torch.randn(embeds.shape[1], INSTRUCTION_DIM, generator=torch.Generator().manual_seed(0))
    return embeds @ projection / INSTRUCTION_DIM**0.5
