"""Programs that train, instruct and measure Queryable LoRA; README.md lists their commands."""
