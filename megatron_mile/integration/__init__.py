"""Where Megatron is touched: the only folder of the library that may import megatron.

No mathematics and no kernel lives here: the hook asks `megatron_mile.loss` for both.
"""
