"""What the hook expects of Megatron, as data: the one place to touch for another version.

`make test-compat` runs the tests on each version of TESTED. 0.20 is not released; the tests passed
on Megatron-LM's main of 22 August 2026 (d98e8a64dd), which calls itself 0.20.0. What it has that
0.19 has not, and concerns us:

* `HybridModel.forward(compute_mtp_loss=False)` (#6119): models.mtp_heads, window._watched_heads.
* `--output-logit-dtype` (#6252): `output_dtype` of the output layer, which fused.py refuses.
* prediction heads that cannot be built without Transformer Engine (#5748): cpu_mode.hybrid_layers.
* evaluation over the data-parallel ranks with those of GTP (#6717): nothing to do, since all that
  evaluates is Megatron's own; figures of a training step went over that group before.
"""

from typing import NamedTuple

Release = tuple[int, int]
TESTED = ("0.12.3", "0.13.1", "0.14.0", "0.15.3", "0.16.1", "0.17.1", "0.18.2", "0.19.2")
# First and last (major, minor) whose facts below were checked; others get a warning.
WINDOW: tuple[Release, Release] = ((0, 12), (0, 20))


class Symbol(NamedTuple):
    """A function or method of Megatron, and the parameters it must have."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    exact: bool = False
    """Whether there may be no other parameters."""


class Model(NamedTuple):
    """A model that calls the loss method, and must not define its own."""

    module: str
    name: str
    since: Release
    """First (major, minor) that has it."""


LOSS_METHOD = Symbol(
    "megatron.core.models.common.language_module.language_module",
    "LanguageModule.compute_language_model_loss",
    ("self", "labels", "logits"),
    exact=True,
)
TP_GROUP = Symbol("megatron.core.parallel_state", "get_tensor_model_parallel_group")
DATA_GROUP = Symbol(
    "megatron.core.parallel_state", "get_data_parallel_group", ("with_context_parallel",)
)
# What the fused projection stands in for.
OUTPUT_LAYER = Symbol(
    "megatron.core.tensor_parallel.layers",
    "ColumnParallelLinear.forward",
    ("self", "input_", "weight", "runtime_gather_output"),
    exact=True,
)
# Patched or called in every step, so resolved when the hook is installed.
CORE = (LOSS_METHOD, TP_GROUP, DATA_GROUP)
MODELS = (
    Model("megatron.core.models.gpt.gpt_model", "GPTModel", (0, 12)),
    Model("megatron.core.models.mamba.mamba_model", "MambaModel", (0, 12)),
    Model("megatron.core.models.hybrid.hybrid_model", "HybridModel", (0, 18)),
)
# Attributes of a model that hold its process groups: from 0.15, in 0.14; before, none does.
GROUP_COLLECTIONS = ("pg_collection", "model_comm_pgs")
# Models whose loss function is not the language-model one.
UNSUPPORTED_MODELS = ("BertModel", "T5Model")
# Settings that give ranks different numbers of micro-batches: to 0.20, and the dev branch's name.
UNEQUAL_MICROBATCHES = ("hybrid_context_parallel", "dynamic_context_parallel")

# For a whole job. Wheels before 0.17 have no megatron.training, Megatron-LM always has.
PRETRAIN = Symbol("megatron.training.training", "pretrain", ("forward_step_func",))
SETUP = Symbol("megatron.training.training", "setup_model_and_optimizer", ("model_type",))
ADD_ARGUMENTS = Symbol("megatron.training.arguments", "add_megatron_arguments", ("parser",))
CHECK_CHECKPOINT = Symbol(
    "megatron.training.checkpointing", "check_checkpoint_args", ("checkpoint_args",)
)
TRAINING = (PRETRAIN, SETUP, ADD_ARGUMENTS, CHECK_CHECKPOINT)
# One iteration; the loop sets args.curr_iteration before it, to the iterations that are done.
TRAIN_STEP = Symbol("megatron.training.training", "train_step", ("forward_step_func", "model"))
# Divides the gradients of a loss per token; the training loop looks it up in its own module.
FINALIZE = Symbol(
    "megatron.core.distributed.finalize_model_grads",
    "finalize_model_grads",
    ("model", "num_tokens"),
)
# From here on finalize_model_grads adds tokens up over context-parallel ranks too.
TOKENS_OVER_CP: Release = (0, 13)
INITIALIZE = Symbol("megatron.training.initialize", "initialize_megatron", ("allow_no_cuda",))
COMPILE_HELPERS = Symbol("megatron.core.datasets.utils", "compile_helpers")

# Where there is no GPU, the import of 0.15 needs this in the environment: it compiles.
IMPORT_WITHOUT_GPU = ("TORCH_CUDA_ARCH_LIST", "8.0")
