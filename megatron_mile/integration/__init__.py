"""Where Megatron is touched: what it is, flags and refusals, hook, loss function, checkpoints.

No mathematics and no kernel lives here: the hook asks `megatron_mile.loss` for both.
"""
