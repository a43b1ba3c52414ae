"""What one forward call carries: a model call holds stack calls, and a stack call holds one call for each adapter.

`model_call` (the outermost call) > `stack_call` (one run of layers) > `adapter_call` (one adapter's routes in it).
"""
