"""PEFT's own tests, run with our method in place of its LoRA: `make peft-tests`."""
