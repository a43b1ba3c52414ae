"""Exports: a plain LoRA, or a whole model, of an adapter whose routes are fixed."""
