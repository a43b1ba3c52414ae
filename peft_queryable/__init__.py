"""Queryable LoRA for PEFT: importing this package registers the tuner type `QUERYABLE_LORA`."""

from . import metrics
from .callbacks import RoutingCallback
from .card import model_card
from .check.checking import check_model
from .check.report import Check, CheckReport, StackFound
from .columns import InstructionCollator, use_instruction_column
from .encoders import BackboneEncoder, InstructionEncoder, SentenceEncoder
from .export.lora import export_lora
from .instruction import set_default_instruction, use_instructions
from .routes import Routes, fix_routes, instruction_routes, mean_routes, set_fixed_routes
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
    "Routes",
    "RoutingCallback",
    "RoutingTrace",
    "SentenceEncoder",
    "StackFound",
    "__version__",
    "check_model",
    "export_lora",
    "fix_routes",
    "instruction_routes",
    "mean_routes",
    "metrics",
    "model_card",
    "record_routing",
    "set_default_instruction",
    "set_fixed_routes",
    "use_instruction_column",
    "use_instructions",
]

register()
