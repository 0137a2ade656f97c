"""What the checks of the hook share: a tiny GPTModel, a batch, a forward step, and their runner.

Ranks on gloo in CPU mode, fp32. The checks' scripts run by themselves, because the process that
runs the tests does not import Megatron.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mile import ObjectiveConfig, uninstall
from megatron_mile.cpu_mode.hybrid_layers import use_local_layers
from megatron_mile.integration.hook import METHOD

MILE = ObjectiveConfig("mile", gamma=2.0)
HOST = LanguageModule.__dict__[METHOD]
HAS_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None  # from 0.18

# Sequences of 8, a batch of 3 with 2, 5 and 8 tokens that count: masks and layouts differ by axis.
S, B, V, HIDDEN = 8, 3, 96, 32
MASK = (torch.arange(S) < torch.tensor([[2], [5], [8]])).float()
Report = dict[str, torch.Tensor]
Step = tuple[torch.Tensor, Callable[..., Any]]


def build_model(tied: bool = False, **settings: Any) -> GPTModel:
    """A training model with weights drawn wide, so that entropies differ between tokens."""
    config = build_config(**settings)
    spec, heads = get_gpt_layer_local_spec(), None
    if config.mtp_num_layers:
        use_local_layers()
        heads = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
    model = GPTModel(
        config, spec, V, S, share_embeddings_and_output_weights=tied, mtp_block_spec=heads
    )
    return model.train()


def build_hybrid(pattern: str = "*-", **settings: Any) -> Any:
    """The same as a HybridModel, of attention (*) and MLPs (-)."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    use_local_layers()
    config = build_config(**{"num_layers": len(pattern), **settings})
    return HybridModel(config, hybrid_stack_spec, V, S, hybrid_layer_pattern=pattern).train()


def build_config(**settings: Any) -> TransformerConfig:
    """The models' settings, and the seed of their weights."""
    torch.manual_seed(1)
    usual: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "init_method_std": 0.3,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**{**usual, **settings})


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, [b, s]."""
    text = torch.randint(V, (B, S + 1), generator=torch.Generator().manual_seed(2))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def forward(model: Any, labels: torch.Tensor | None, **settings: Any) -> torch.Tensor:
    """The model's loss per token [b, s], or without labels its logits [b, s, V/tp]."""
    tokens, _ = batch()
    later = torch.ones(S, S).triu(1).bool()[None, None]
    return model(tokens, torch.arange(S).expand(B, S), later, labels=labels, **settings)


def host_loss(
    mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """A loss function in the form of Megatron's."""
    total, count = (output * mask).sum(), mask.sum()
    return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}


def forward_step(iterator: Any, model: Any) -> Step:
    """A forward step in the form of Megatron's."""
    return forward(model, batch()[1]), functools.partial(host_loss, MASK)


def raises(
    kind: type[Exception] | tuple[type[Exception], ...],
    text: str,
    function: Callable[..., Any],
    *args: Any,
) -> None:
    """Fail unless the call ends in this error."""
    with pytest.raises(kind, match=re.escape(text)):
        function(*args)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Take the gradient of every weight by its name, and leave none behind."""
    taken = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    assert all(grad is not None for grad in taken.values())
    return taken


def checks_of(names: Mapping[str, Any]) -> dict[str, Callable[[], None]]:
    """The functions called check_* that a script defines; what it imports is not its own."""
    return {
        name: value
        for name, value in names.items()
        if name.startswith("check_") and value.__module__ == names["__name__"]
    }


def run_checks(names: Mapping[str, Any], folder: str, tensor_parallel: int = 1) -> None:
    """Run each function called check_* of a script on its RANKS, from the unpatched state.

    The ranks that tensor parallelism leaves are data-parallel. A script with a number PRETENDED
    runs as the first of so many ranks, of which there are no others. Writes checks.json into the
    folder: the tracebacks of each check, "" where it passed.
    """
    torch.set_num_threads(1)
    pretended = names.get("PRETENDED")
    if pretended:
        # Its collectives talk to nobody and leave their outputs as they are.
        torch.distributed.init_process_group(
            "fake", store=FakeStore(), rank=0, world_size=pretended
        )
    else:
        torch.distributed.init_process_group("gloo")
        assert torch.distributed.get_world_size() == names["RANKS"]
    without_gloo = {"create_gloo_process_groups": False} if pretended else {}
    parallel_state.initialize_model_parallel(tensor_parallel, **without_gloo)
    model_parallel_cuda_manual_seed(1)
    failures = {}
    for name, check in checks_of(names).items():
        try:
            check()
            failures[name] = ""
        except (Exception, pytest.fail.Exception):
            failures[name] = traceback.format_exc()
        uninstall()
    ranks: list[dict[str, str]] = [failures] * torch.distributed.get_world_size()
    if not pretended:
        torch.distributed.all_gather_object(ranks, failures)
    if torch.distributed.get_rank() == 0:
        joined = {name: "\n".join({rank[name] for rank in ranks}) for name in failures}
        Path(folder, "checks.json").write_text(json.dumps(joined))
    torch.distributed.destroy_process_group()
