"""Queryable LoRA for PEFT: importing this package registers the tuner type `QUERYABLE_LORA`."""

from .card import model_card
from .encoders import BackboneEncoder, InstructionEncoder, SentenceEncoder
from .instruction import InstructionCollator, instructions, set_instruction
from .registration import QueryableLoraConfig, QueryableLoraModel, register
from .version import __version__

__all__ = [
    "BackboneEncoder",
    "InstructionCollator",
    "InstructionEncoder",
    "QueryableLoraConfig",
    "QueryableLoraModel",
    "SentenceEncoder",
    "__version__",
    "instructions",
    "model_card",
    "set_instruction",
]

register()
