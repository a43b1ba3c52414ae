"""When does the method beat LoRA on a language model? Tiny models, many runs."""
