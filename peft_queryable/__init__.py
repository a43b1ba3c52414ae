"""Queryable LoRA for PEFT: importing this package registers the tuner type `QUERYABLE_LORA`."""

from .encoders import BackboneEncoder, InstructionEncoder, SentenceEncoder
from .instruction import InstructionCollator, instructions, set_instruction
from .registration import QueryableLoraConfig, QueryableLoraModel, register

__version__ = "0.1.0"

__all__ = [
    "BackboneEncoder",
    "InstructionCollator",
    "InstructionEncoder",
    "QueryableLoraConfig",
    "QueryableLoraModel",
    "SentenceEncoder",
    "__version__",
    "instructions",
    "set_instruction",
]

register()
