"""What every tool needs: command line, output, pictures, Megatron."""
