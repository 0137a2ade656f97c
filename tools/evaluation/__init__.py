"""Perplexities, benchmark scores, and runs side by side."""
