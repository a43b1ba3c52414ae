"""Time, memory and size of Queryable LoRA beside PEFT's LoRA and its relatives."""
