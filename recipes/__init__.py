"""What to copy: programs that train, instruct and measure Queryable LoRA. README.md lists them with their commands."""
