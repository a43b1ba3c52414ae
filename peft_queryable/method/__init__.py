"""The paper's equations: choose a route, apply it, pool what it is chosen from. Tensors in, tensors out.

Nothing here knows of PEFT, transformers or forward calls. `tests/helpers/reference.py` says the same in loops.
"""
