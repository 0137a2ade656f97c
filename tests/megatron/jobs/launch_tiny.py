"""Do what `-m megatron_mile.launch pretrain_tiny.py` does, as a script that ranks are forked on."""

import sys
from pathlib import Path

from megatron_mile.launch import main

if __name__ == "__main__":
    main([str(Path(__file__).with_name("pretrain_tiny.py")), *sys.argv[1:]])
