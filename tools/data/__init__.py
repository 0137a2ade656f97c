"""Text, tokens, and the .bin/.idx pairs of Megatron."""
