"""What the tests share: a float64 oracle, rows that are hard to compute, and a gloo launcher.

The oracle is dense and written from the definitions p = softmax(z), H = -sum p ln p; of the library
it takes the settings alone.
"""

import contextlib
import itertools
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import TokenLoss, token_loss
from megatron_mile.objectives import OBJECTIVES

IGNORED = -100
MILE = ObjectiveConfig()
# The weight of each objective, from its equation and not from the code: (nll, H, settings) -> w,
# with sum p^2 as `squares` where the objective needs it.
WEIGHTS: dict[str, Callable[..., torch.Tensor]] = {
    "ce": lambda nll, entropy, _: torch.ones_like(nll),
    "mile": lambda nll, entropy, config: (config.sigma + entropy) ** config.gamma,
    "focal": lambda nll, entropy, config: (1 - torch.exp(-nll)).clamp(min=0) ** config.gamma,
    "deft": lambda nll, entropy, config, squares: torch.exp(-nll) ** squares,
    "dft": lambda nll, entropy, _: torch.exp(-nll),
    "eaft": lambda nll, entropy, config: (entropy / config.eaft_scale) ** config.eaft_exponent,
    "power": lambda nll, entropy, config: torch.exp(-nll) ** config.power_q,
}
# The loss of those whose loss is not w * nll, which is differentiated as it stands.
VALUES: dict[str, Callable[[torch.Tensor, ObjectiveConfig], torch.Tensor]] = {
    "power": lambda nll, config: (1 - torch.exp(-nll) ** config.power_q) / config.power_q,
}
# Those of the library whose loss is a weight times nll: each must have its equation above.
WEIGHTED = [
    name
    for name, objective in OBJECTIVES.items()
    if not (objective.needs_cost or objective.inputs)  # whose oracle is in test_frequency.py
]
# Where powers have a kink or amplify, and where nothing safeguards them.
_DELICATE = {"gamma": (0, 0.5, 1, 2, 5), "sigma": (0, 1)}
_DELICATE |= {"eaft_scale": (1, 3), "eaft_exponent": (0, 0.5, 1, 2), "power_q": (0.1, 1, 10)}


def variations(objective: str, **common: Any) -> list[ObjectiveConfig]:
    """Return an objective's configurations over what is delicate, but for those it refuses."""
    own = [setting.name for setting in OBJECTIVES[objective].settings if setting.name in _DELICATE]
    found = []
    for values in itertools.product(*(_DELICATE[name] for name in own)):
        with contextlib.suppress(ValueError):
            found.append(
                ObjectiveConfig(objective, **dict(zip(own, values, strict=True)), **common)
            )
    return found


def weighted_configs(**common: Any) -> dict[str, ObjectiveConfig]:
    """Return every objective that is a weight, some with gamma 2, also through its entropy."""
    gammas = {name: 1 if name == MILE.objective else 2 for name in WEIGHTED}
    configs = {name: ObjectiveConfig(name, gamma=gammas[name], **common) for name in WEIGHTED}
    for name in WEIGHTED:
        if OBJECTIVES[name].weight_slope is not None:
            config = ObjectiveConfig(name, gamma=2, eaft_exponent=2, entropy_grad=True, **common)
            configs[f"{name} through entropy"] = config
    return configs


def smoothed_configs(**common: Any) -> dict[str, ObjectiveConfig]:
    """Return configurations with label smoothing, with z-loss, and with both."""
    both = {"label_smoothing": 0.1, "z_loss": 1e-2}
    return {
        "ce smoothed": ObjectiveConfig("ce", label_smoothing=0.1, **common),
        "ce z": ObjectiveConfig("ce", z_loss=1e-2, **common),
        "mile smoothed z": ObjectiveConfig(label_smoothing=0.3, z_loss=1e-3, **common),
        "mile through entropy smoothed z": ObjectiveConfig(entropy_grad=True, **both, **common),
        "focal smoothed": ObjectiveConfig("focal", gamma=2, label_smoothing=0.9, **common),
        "deft smoothed z": ObjectiveConfig("deft", **both, **common),
    }


def inputs_for(config: ObjectiveConfig, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return an input of 0.25 for each token, wherever the objective takes one."""
    value = torch.full(targets.shape, 0.25, dtype=torch.float64, device=targets.device)
    return dict.fromkeys(config.definition.inputs, value)


class Truth(NamedTuple):
    """What the oracle gives: per-token fields, and the gradient [..., V]; all float64."""

    loss: torch.Tensor
    nll: torch.Tensor
    entropy: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor


def oracle(
    logits: torch.Tensor,
    targets: torch.Tensor,
    config: ObjectiveConfig = MILE,
    upstream: torch.Tensor | None = None,
) -> Truth:
    """Compute the loss per token in float64 from the definitions, and its gradient by autograd.

    Ignored tokens are 0 throughout; other targets outside the vocabulary have NaN for loss, nll and
    gradient. `upstream` is the gradient that reaches the loss, and the z-loss if there is one, 1 if
    not given.
    """
    z = logits.detach().double().requires_grad_()
    valid = targets != IGNORED
    known = (targets >= 0) & (targets < z.size(-1))
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)
    at_target = log_p.gather(-1, torch.where(known, targets, 0).long().unsqueeze(-1)).squeeze(-1)
    nll = torch.where(known, -at_target, torch.nan)
    squares = {"squares": p.square().sum(-1)} if config.definition.needs_squares else {}
    weight = WEIGHTS[config.objective](nll.detach(), entropy, config, **squares)
    eps, smoothed = config.label_smoothing, nll
    if eps:
        smoothed = (1 - eps) * nll - eps * log_p.mean(-1)
    loss = (weight if config.entropy_grad else weight.detach()) * smoothed
    loss = loss.masked_fill((weight == 0) & known, 0)  # the limit where nll is infinite
    if config.objective in VALUES:
        loss = VALUES[config.objective](nll, config)
    total = loss + true_z_loss(z, config) if config.z_loss else loss
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    (grad,) = torch.autograd.grad(total[known], z, upstream[known], materialize_grads=True)
    fields = [x.detach().masked_fill(~valid, 0) for x in (loss, nll, entropy, weight)]
    grad = torch.where(known.unsqueeze(-1), grad, torch.nan)
    return Truth._make([*fields, grad.masked_fill(~valid.unsqueeze(-1), 0)])


def true_z_loss(logits: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """Return c (ln sum_k e^z_k)^2 in float64, whatever the targets."""
    return config.z_loss * logits.double().logsumexp(-1) ** 2


def hard_rows(vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [12, V] and targets [12]: each row is one numerical regime."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(12, vocab, generator=random, dtype=torch.float64)
    targets = torch.randint(vocab, (12,), generator=random)
    logits[1] += 1000
    logits[2] -= 1000
    logits[3, targets[3]] += 200  # certain and right
    logits[4, targets[4] - 1] += 200  # certain and wrong
    logits[5] = 7.0  # equal
    logits[6] -= 150  # e^z underflows in fp32
    logits[7, ::2] = -torch.inf  # half the vocabulary masked ...
    logits[7, targets[7]] = 0.5  # ... but not the target
    targets[8] = IGNORED
    targets[9], targets[10] = vocab, -1  # outside the vocabulary
    logits[11, targets[11]] += 12  # p_y close to 1, entropy small
    return logits.to(dtype), targets


def run_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    config: ObjectiveConfig,
    upstream: torch.Tensor | None = None,
) -> tuple[TokenLoss, torch.Tensor]:
    """Return the library's token_loss and its gradient; `upstream` as in the oracle."""
    leaf = logits.detach().clone().requires_grad_()
    out = token_loss(leaf, targets, config)
    (grad,) = gradients_of(out, leaf, upstream=upstream)
    return out, grad


def gradients_of(
    out: TokenLoss, *leaves: torch.Tensor, upstream: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the loss, and of the z-loss if there is one."""
    outputs = [x for x in (out.loss, out.z_loss) if x is not None]
    upstream = torch.ones_like(out.loss) if upstream is None else upstream
    return torch.autograd.grad(outputs, leaves, [upstream] * len(outputs))


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Return max |a - b| / (1 + |b|); infinite if NaN or infinity stand in other places."""
    a, b = ours.detach().double(), truth.double()
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return torch.inf
    finite = b.isfinite()
    deviation = (a[finite] - b[finite]).abs() / (1 + b[finite].abs())
    return deviation.max().item() if deviation.numel() else 0.0


def assert_close(ours: tuple[Any, ...], truth: Truth, tolerance: float) -> None:
    """Compare (loss, nll, entropy, weight, grad) with the oracle, naming the one that is off."""
    for name, a, b in zip(Truth._fields, ours, truth, strict=True):
        assert error(a, b) <= tolerance, f"{name}: {error(a, b):.2e} > {tolerance:.2e}"


def run_ranks(n: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Run fn(*args) in `n` new processes joined by gloo, and return what each rank returned.

    `fn` is a function of a module, since the processes import it anew; an exception in one rank is
    raised here with its traceback.
    """
    # The server imports torch once for all ranks of all tests: seconds each on a small machine.
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor.debug"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(n, folder, fn, args), nprocs=n, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(n)]


def _rank(rank: int, n: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    names = [name for _, name in socket.if_nameindex()]
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for name in names if name.startswith("lo"))
    store = dist.FileStore(f"{folder}/store", n)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(fn(*args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
