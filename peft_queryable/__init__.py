"""Queryable LoRA for PEFT: importing this package registers the tuner type `QUERYABLE_LORA`."""

from .registration import QueryableLoraConfig, QueryableLoraModel, register

__version__ = "0.1.0"

__all__ = ["QueryableLoraConfig", "QueryableLoraModel", "__version__"]

register()
