"""Registration of the method with PEFT."""

from __future__ import annotations

from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "queryable_lora"

if NAME.upper() not in PeftType.__members__:  # PEFT's enum is closed, and it registers no method without a member
    extend_enum(PeftType, NAME.upper(), NAME.upper())

from ..config import QueryableLoraConfig  # noqa: E402  (the config names the new member)
from .model import QueryableLoraModel  # noqa: E402


def register() -> None:
    """Make `QUERYABLE_LORA` known to `get_peft_model`, `PeftModel.from_pretrained` and their like; at most once."""
    if PeftType.QUERYABLE_LORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME, config_cls=QueryableLoraConfig, model_cls=QueryableLoraModel, prefix=QueryableLoraModel.prefix
        )
