"""Write into the folder named last: Megatron's version, and the files that it was imported from."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import megatron.core

if __name__ == "__main__":
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("megatron.training")
    files = {
        name: module.__file__
        for name, module in sys.modules.items()
        if name.startswith("megatron.") and getattr(module, "__file__", None)
    }
    found = {"version": megatron.core.__version__, "files": files}
    Path(sys.argv[-1], "modules.json").write_text(json.dumps(found))
