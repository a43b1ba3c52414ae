"""Queryable LoRA for PEFT: importing this package registers the tuner type `QUERYABLE_LORA`."""

from . import metrics
from .callbacks import RoutingCallback
from .card import model_card
from .check.checking import check_model
from .check.report import Check, CheckReport, StackFound
from .encoders import BackboneEncoder, InstructionEncoder, SentenceEncoder
from .instruction import InstructionCollator, set_default_instruction, use_instructions
from .statistics import RouteStatistics
from .tracing import RoutedCall, RoutingTrace, record_routing
from .tuner.registration import QueryableLoraConfig, QueryableLoraModel, register
from .version import __version__

__all__ = [
    "BackboneEncoder",
    "Check",
    "CheckReport",
    "InstructionCollator",
    "InstructionEncoder",
    "QueryableLoraConfig",
    "QueryableLoraModel",
    "RouteStatistics",
    "RoutedCall",
    "RoutingCallback",
    "RoutingTrace",
    "SentenceEncoder",
    "StackFound",
    "__version__",
    "check_model",
    "metrics",
    "model_card",
    "record_routing",
    "set_default_instruction",
    "use_instructions",
]

register()
