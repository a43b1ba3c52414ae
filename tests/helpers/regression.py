"""Small backbones for the tests of recipes/regression, and names to run them with."""

from recipes.regression.backbones import MLP, Transformer

ADAPTERS = ["lora", "dora", "lily", "vblora", "replora", "hyra", "doran", "queryable", "instruction"]
VARIANTS = ["state_only", "one_atom", "shut_gates", "prior*10.0", "num_blocks=16"]


def wide(width=8):
    return Transformer(depth=2, width=width, heads=2)


def deep(depth=6):
    return MLP(depth=depth)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def reciprocal(number: int, epochs) -> float:
    epochs.put(1)
    return 1 / number
