"""Runs one case: checks every provider, then times all of them in turn, round after round."""

from __future__ import annotations

import gc
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from tools.bench.case import Case, Inputs
from tools.bench.inputs import make_inputs
from tools.bench.measure import (
    PHASES,
    Call,
    count_collectives,
    extra_mib,
    make_buffers,
    time_call,
    time_copy,
)
from tools.bench.providers import providers


def run_case(case: Case, names: Sequence[str], rounds: int) -> tuple[dict[str, Any], list[float]]:
    """Run the case in new processes, one per rank.

    Args:
        case: what is computed.
        names: of providers of the case's workload.
        rounds: calls of each provider that are timed.

    Returns:
        Name -> {"status"} and, as far as the provider got, "loss_error", "gradient_error",
        "extra_mib", "collectives" (phase -> number) and "ms" (each phase that was timed -> one
        number per round); and
        the ms of copying the logits, if they are given. Times and memory are those of the slowest
        and the largest rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (case, list(names), rounds, folder), nprocs=case.tp)
        results, copies = json.loads(Path(folder, "results.json").read_text())
    return results, copies


def _rank(rank: int, case: Case, names: list[str], rounds: int, folder: str) -> None:
    warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed")
    # As Megatron asks for where the all-reduce of d(hidden) overlaps the next product.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.set_num_threads(case.threads)
    device = torch.device(case.device, rank) if case.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_default_device(device)
    else:  # loopback, whatever the name of the host resolves to
        interfaces = [name for _, name in socket.if_nameindex()]
        os.environ["GLOO_SOCKET_IFNAME"] = next(x for x in interfaces if x.startswith("lo"))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(f"{folder}/store", case.tp),
        rank=rank,
        world_size=case.tp,
        timeout=timedelta(minutes=5),
    )
    try:
        inputs = make_inputs(case, rank, device)
        answer = _measure(case, inputs, names, rounds, quiet=rank > 0)
        if rank == 0:
            Path(folder, "results.json").write_text(json.dumps(answer))
    finally:
        dist.destroy_process_group()


def _measure(
    case: Case, inputs: Inputs, names: list[str], rounds: int, quiet: bool
) -> tuple[dict[str, Any], list[float]]:
    """Check the providers, then time those that are right; see `run_case`."""
    results: dict[str, Any] = {}
    calls: dict[str, Call] = {}
    buffers = make_buffers(inputs)
    title = f"{case.dtype} tp {case.tp}"
    for name in tqdm(names, f"{title} check", disable=quiet, leave=False):
        results[name], call = _check(case, name, inputs, buffers)
        if call is not None:
            calls[name] = call
    copied = [(x, torch.empty_like(x)) for name, x in inputs.leaves.items() if name == "logits"]
    copies, times = [], []
    order = list(calls)
    for turn in tqdm(range(rounds), f"{title} rounds", disable=quiet, leave=False):
        copies += [time_copy(*pair, dist.barrier) for pair in copied]
        # Another one begins each round, so that nobody always follows the same neighbour.
        start = turn % max(len(order), 1)
        measured = {
            name: time_call(calls[name], dist.barrier) for name in order[start:] + order[:start]
        }
        times.append([measured[name] for name in order])
    slowest = _largest(times, inputs)
    for i, name in enumerate(order):
        ms = {phase: [row[i][j] for row in slowest] for j, phase in enumerate(PHASES)}
        results[name]["ms"] = {k: column for k, column in ms.items() if not np.isnan(column).any()}
    return results, _largest(copies, inputs) if copies else []


def _check(
    case: Case, name: str, inputs: Inputs, buffers: Sequence[torch.Tensor]
) -> tuple[dict[str, Any], Call | None]:
    """Compare a provider with the oracle and measure its memory; no call if it is not to be timed.

    A provider that raises has failed like one whose numbers are wrong: one broken package must not
    take the others with it.
    """
    provider = providers(case.hidden, case.cost_width, case.settings)[name]
    obstacle = provider.obstacle(case)
    if obstacle:
        return {"status": f"not run: {obstacle}"}, None
    try:
        loss, how = provider.build()
        call = Call(loss, inputs, buffers, dist.group.WORLD)
        call.restore()
        value = call.forward()
        gradients = call.backward(value)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return {"status": f"failed: {type(error).__name__}: {first}"}, None
    result: dict[str, Any] = {"status": f"timed ({how})" if how else "timed"}
    if provider.objective != "none":
        errors = _largest(inputs.errors(provider.objective, value, gradients), inputs)
        result |= _judge(
            case, dict(zip(("loss", *inputs.leaves), errors, strict=True)), provider.slack
        )
    del value, gradients
    if result["status"].startswith("failed"):
        return result, None
    result["collectives"] = count_collectives(call)
    extra = extra_mib(call) - case.gradient_bytes / 2**20
    result["extra_mib"] = _largest(extra, inputs)
    gc.collect()
    if case.device == "cuda":
        try:
            call.capture()
        except RuntimeError as error:
            result["status"] += f"; no graph: {str(error).splitlines()[0]}"
    return result, call


def _judge(case: Case, errors: dict[str, float], slack: float) -> dict[str, Any]:
    """Return the columns of the errors, and a status if one is too large."""
    loss, *gradients = errors.values()
    columns: dict[str, Any] = {"loss_error": loss, "gradient_error": np.max(gradients)}
    for name, off in errors.items():
        limit = slack * case.tolerances[name != "loss"]
        if not off <= limit:  # NaN too
            what = "loss" if name == "loss" else f"d({name})"
            return columns | {"status": f"failed: {what} error {off:.1e} above {limit:.0e}"}
    return columns


def _largest(values: Any, inputs: Inputs) -> Any:
    """Return the numbers' maximum over the ranks, in the same nesting; NaN wins."""
    tensor = torch.tensor(values, dtype=torch.float64, device=inputs.targets.device)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts).amax(0).tolist()
