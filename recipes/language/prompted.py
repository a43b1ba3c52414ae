"""An adapter that is told the prompt: its instruction is what the base makes of it, as in the library's encoders."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from recipes.language.skills import PROMPT, task_lines, tasks_of

MEASURED = 512  # lines that centre and scale are measured on
SEED = 1_000_000  # of those lines; runs draw theirs from smaller seeds


class PromptStates:
    """Mean last hidden states of prompts, centred and scaled to a standard deviation of 1 by those of other lines.

    Args:
        bases: the model of each run.
        condition: how the task is told.
    """

    def __init__(self, bases: Sequence[nn.Module], condition: str) -> None:
        decoders = [base.model for base in bases]
        self.template, self.tensors = decoders[0], stack_module_state(decoders)
        self.centre, self.scale = torch.zeros(()), torch.ones(())
        generator = torch.Generator().manual_seed(SEED)
        lines = task_lines(condition, tasks_of(condition, 0, MEASURED), generator)
        states = self(lines.expand(len(bases), -1, -1))
        self.centre, self.scale = states.mean(1, keepdim=True), states.std(1, keepdim=True)

    @torch.no_grad()
    def __call__(self, lines: Tensor) -> Tensor:
        """Embeddings [R, n, 64] of the prompts of lines [R, n, 15]."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], lines: Tensor) -> Tensor:
            inputs = {"input_ids": lines[:, : PROMPT + 1]}
            return functional_call(self.template, (parameters, buffers), (), inputs).last_hidden_state.mean(1)

        return (vmap(one)(*self.tensors, lines) - self.centre) / self.scale
