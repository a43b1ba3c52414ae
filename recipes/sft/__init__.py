"""LoRA and Queryable LoRA fine-tuned on the same data, and compared on held-out examples."""
