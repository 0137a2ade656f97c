"""What the hook expects of Megatron, as data: the one place to touch for another version."""

from typing import NamedTuple

TESTED = ("0.19.2",)
# First and last (major, minor) whose facts below were checked; others get a warning.
WINDOW = ((0, 19), (0, 19))


class Symbol(NamedTuple):
    """A function or method of Megatron, and the parameters it must have."""

    module: str
    name: str
    parameters: tuple[str, ...]
    exact: bool = False
    """Whether there may be no other parameters."""


LOSS_METHOD = Symbol(
    "megatron.core.models.common.language_module.language_module",
    "LanguageModule.compute_language_model_loss",
    ("self", "labels", "logits"),
    exact=True,
)
# Models that call the method, and must not define their own.
MODELS = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel"),
    ("megatron.core.models.hybrid.hybrid_model", "HybridModel"),
)
# What the fused projection stands in for.
OUTPUT_LAYER = Symbol(
    "megatron.core.tensor_parallel.layers",
    "ColumnParallelLinear.forward",
    ("self", "input_", "weight", "runtime_gather_output"),
    exact=True,
)
PRETRAIN = Symbol("megatron.training.training", "pretrain", ("forward_step_func",))
SETUP = Symbol("megatron.training.training", "setup_model_and_optimizer", ("model_type",))
ADD_ARGUMENTS = Symbol("megatron.training.arguments", "add_megatron_arguments", ("parser",))
CHECK_CHECKPOINT = Symbol(
    "megatron.training.checkpointing", "check_checkpoint_args", ("checkpoint_args",)
)
# Models whose loss function is not the language-model one.
UNSUPPORTED_MODELS = ("BertModel", "T5Model")
