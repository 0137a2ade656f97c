"""Checks of what is said of a Megatron that is not as expected, run by test_hook.py.

The symbols are moved by hand here: a version that has moved them does not exist yet.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import gpt_model
from packaging.version import Version
from support.hook_model import HOST, MILE, build_model, raises, run_checks

from megatron_mile import install
from megatron_mile.errors import MileCompatError
from megatron_mile.integration import versions
from megatron_mile.integration.hook import METHOD, installed_config, resolve
from megatron_mile.integration.models import data_group, tp_group

RANKS = 1
RELEASE = Version(megatron.core.__version__).release[:2]
HAS_TRAINING = importlib.util.find_spec("megatron.training") is not None


def message(function: Callable[..., Any], *args: Any) -> str:
    """The text of the MileCompatError that the call ends in."""
    with pytest.raises(MileCompatError) as caught:
        function(*args)
    return str(caught.value)


def check_install_names_what_has_moved() -> None:
    gpt = "megatron.core.models.gpt.gpt_model"
    changes = {
        f"LanguageModule.{METHOD}(self, labels, logits), found None": (
            lambda patch: patch.delattr(LanguageModule, METHOD)
        ),
        f"LanguageModule.{METHOD}(self, labels, logits), found parameters (self, hidden)": (
            lambda patch: patch.setattr(LanguageModule, METHOD, lambda self, hidden: hidden)
        ),
        "parallel_state.get_tensor_model_parallel_group(), found None": (
            lambda patch: patch.delattr(parallel_state, "get_tensor_model_parallel_group")
        ),
        "get_data_parallel_group(with_context_parallel), found parameters ()": (
            lambda patch: patch.setattr(parallel_state, "get_data_parallel_group", lambda: None)
        ),
        f"{gpt}.GPTModel without a {METHOD} of its own, found None": (
            lambda patch: patch.delattr(gpt_model, "GPTModel")
        ),
        f"a module {gpt}, found": lambda patch: patch.setitem(sys.modules, gpt, None),
    }
    for expected, change in changes.items():
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            text = message(install, MILE)
            assert installed_config(getattr(LanguageModule, METHOD, None)) is None
        assert expected in text, text
        assert f"megatron.core {megatron.core.__version__} ({megatron.core.__file__}):" in text
        assert "install one of these, or report the version" in text
        assert "\n" not in text
    assert LanguageModule.__dict__[METHOD] is HOST


def check_job_names_what_has_moved() -> None:
    if not HAS_TRAINING:
        text = "before 0.17 have no megatron.training"
        raises(MileCompatError, text, resolve, versions.PRETRAIN)
        return
    others = (versions.TRAIN_STEP, versions.INITIALIZE, versions.COMPILE_HELPERS)
    for symbol in (*versions.TRAINING, *others):
        assert callable(resolve(symbol))
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(f"{symbol.module}.{symbol.name}")
            text = message(resolve, symbol)
        assert f"expected {symbol.module}.{symbol.name}({', '.join(symbol.parameters)})" in text


def check_install_warns_outside_the_window() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install(MILE)  # this version is inside
    text = re.escape(f"not {megatron.core.__version__}; signatures are checked, numbers are not")
    for window in (((0, 1), (0, 2)), ((9, 0), (9, 1))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(versions, "WINDOW", window)
            with pytest.warns(UserWarning, match=text):
                install(MILE)
        assert installed_config(getattr(LanguageModule, METHOD)) == MILE


def check_models_are_known() -> None:
    for module, name, since in versions.MODELS:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
        assert (module in sys.modules) == (since <= RELEASE), name


def check_groups_are_the_models_own_where_it_has_any() -> None:
    model = build_model()
    held = [name for name in versions.GROUP_COLLECTIONS if hasattr(model, name)]
    expected = {(0, 12): [], (0, 13): [], (0, 14): ["model_comm_pgs"]}
    assert held == expected.get(RELEASE, ["pg_collection"])
    assert tp_group(model) is parallel_state.get_tensor_model_parallel_group()
    assert data_group(model) is parallel_state.get_data_parallel_group(with_context_parallel=True)
    for name in held:
        own = SimpleNamespace(tp=object(), dp_cp=object())
        setattr(model, name, own)
        assert (tp_group(model), data_group(model)) == (own.tp, own.dp_cp)


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1])
