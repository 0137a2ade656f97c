"""Pretrain as examples/pretrain_gpt.py does, and die by SIGKILL in the second save.

At that moment all data is written but `metadata.json`, which Megatron writes last into the folder.
"""

import os
import runpy
import signal
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "pretrain_gpt.py"
save_config, saves = serialization.save_config, []


def save_config_once(*args: Any) -> None:
    saves.append(args)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save_config(*args)


if __name__ == "__main__":
    serialization.save_config = save_config_once
    runpy.run_path(str(EXAMPLE), run_name="__main__")
