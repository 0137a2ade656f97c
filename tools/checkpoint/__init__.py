"""Checkpoints of Megatron and models of Hugging Face, read, written and converted."""
