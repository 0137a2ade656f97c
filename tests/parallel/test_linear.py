"""linear_token_loss over gloo ranks and blocks of tokens, against the float64 oracle."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.collectives import CommDebugMode
from support.helpers import (
    error,
    gradients_of,
    oracle,
    run_ranks,
    smoothed_configs,
    weighted_configs,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mile import ObjectiveConfig, linear
from megatron_mile.linear import block_tokens, linear_token_loss
from megatron_mile.loss import token_loss

# Measured: fp64 4e-16; fp32 4e-7.
FIELDS = {torch.float64: 1e-12, torch.float32: 2e-6}
# Measured: fp64 8e-15; fp32 9e-6 where terms up to 95 cancel, as with a projection of its own.
GRADIENTS = {torch.float64: 1e-12, torch.float32: 2e-5}
CONFIGS = {**weighted_configs(), **smoothed_configs()}
WIDTH = 24
# Borders of the shards, and the tokenizer's size where the rest is padding.
SPLITS = {
    "one": ([0, 60], None),
    "one padded": ([0, 64], 60),
    "equal": ([0, 30, 60], None),
    "ragged": ([0, 41, 60], None),
    "padded": ([0, 20, 40, 60, 80], 50),  # one shard with some padding, one of nothing else
}
TOKENS = (4, 3)


class Problem:
    """Hidden states [4, 3, H], the whole weight, targets, upstream gradient, and the truth."""

    def __init__(self, dtype: torch.dtype, split: str, name: str) -> None:
        random = torch.Generator().manual_seed(3)
        borders, size = SPLITS[split]
        self.config, self.size = CONFIGS[name], size

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        self.hidden = draw(*TOKENS, WIDTH).to(dtype)
        self.weight = (draw(borders[-1], WIDTH) / 2).to(dtype)
        self.targets = torch.randint(size or borders[-1], TOKENS, generator=random)
        self.targets[1, 1] = -100
        self.upstream = draw(*TOKENS).to(dtype)
        self.upstream[2, 2] = 0
        real = self.weight[:size].double()
        self.truth = oracle(
            self.hidden.double() @ real.t(), self.targets, self.config, self.upstream
        )
        self.d_hidden = self.truth.grad @ real
        d_real = self.truth.grad.flatten(0, 1).t() @ self.hidden.double().flatten(0, 1)
        self.d_weight = torch.cat([d_real, d_real.new_zeros(borders[-1] - len(d_real), WIDTH)])


def _check(
    case: tuple[torch.dtype, str, str], chunk: int, sequence_parallel: bool, fused: bool
) -> None:
    """Compare fields and gradients of this rank with the truth."""
    dtype, split, _ = case
    problem = Problem(*case)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    borders = SPLITS[split][0]
    start, end = borders[rank : rank + 2]
    mine = slice(4 // ranks * rank, 4 // ranks * (rank + 1)) if sequence_parallel else slice(None)
    hidden = problem.hidden[mine].clone().requires_grad_()
    weight: Any = problem.weight[start:end].clone().requires_grad_()
    before = torch.randn(weight.shape, dtype=torch.promote_types(dtype, torch.float32))
    weight.main_grad, weight.grad_added_to_main_grad = before.clone(), False
    out = linear_token_loss(
        hidden,
        weight,
        problem.targets,
        problem.config,
        dist.group.WORLD,
        None if split == "equal" else (start, end),
        chunk_tokens=chunk,
        vocab_size=problem.size,
        sequence_parallel=sequence_parallel,
        gradient_accumulation_fusion=fused,
    )
    upstream = problem.upstream.to(out.loss.dtype)
    d_hidden, d_weight = gradients_of(out, hidden, weight, upstream=upstream)
    assert weight.grad_added_to_main_grad == fused
    if fused:
        d_weight = weight.main_grad - before
    for field, truth in zip(out[:4], problem.truth[:4], strict=True):
        assert error(field, truth) <= FIELDS[dtype]
    assert error(d_hidden, problem.d_hidden[mine]) <= GRADIENTS[dtype]
    assert error(d_weight, problem.d_weight[start:end]) <= GRADIENTS[dtype]


def _check_all(split: str) -> None:
    """Every precision and form in the processes of one split."""
    for dtype in FIELDS:
        for name in CONFIGS:
            for chunk in (1, 5, 12, 1000):
                _check((dtype, split, name), chunk, False, False)
            _check((dtype, split, name), 5, True, False)
            _check((dtype, split, name), 5, False, True)


@pytest.mark.parametrize("split", SPLITS)
def test_linear_token_loss_matches_oracle(split: str) -> None:
    run_ranks(len(SPLITS[split][0]) - 1, _check_all, split)


def _counts(sequence_parallel: bool) -> tuple[list[str], list[str]]:
    """Return the collectives of a forward over five blocks, and of its backward."""
    ranks = dist.get_world_size()
    hidden = torch.randn(10 // ranks if sequence_parallel else 10, 4, requires_grad=True)
    weight = torch.randn(8, 4, requires_grad=True)
    with CommDebugMode() as forward:
        loss = linear_token_loss(
            hidden,
            weight,
            torch.arange(10),
            CONFIGS["mile"],
            dist.group.WORLD,
            chunk_tokens=2,
            sequence_parallel=sequence_parallel,
        ).loss
    with CommDebugMode() as backward:
        loss.sum().backward()
    return _names(forward), _names(backward)


def _names(mode: CommDebugMode) -> list[str]:
    return sorted(
        str(op).rsplit(".", 1)[-1]
        for op, count in mode.get_comm_counts().items()
        for _ in range(count)
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_linear_token_loss_collectives(sequence_parallel: bool) -> None:
    gather, scatter = "_allgather_base_", "_reduce_scatter_base_"
    (forward, backward), _ = run_ranks(2, _counts, sequence_parallel)
    if sequence_parallel:
        assert (forward, backward) == ([gather, gather], [gather, scatter])
    else:
        assert (forward, backward) == ([gather], ["allreduce_"])


class _Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("fault", [None, RuntimeError, TypeError, "a wrong sum"])
def test_a_product_is_added_to_a_wider_sum_if_torch_does_so(
    fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only a GPU's torch does. It is played here: as from 2.10, as in 2.8 and 2.9, as before.
    calls = []

    def addmm(total: Any, a: Any, b: Any, out_dtype: torch.dtype, out: Any) -> None:
        calls.append(out_dtype)
        if isinstance(fault, type):
            raise fault
        assert (total.dtype, a.dtype, b.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
        out += a.float() @ b.float() + (fault is not None)

    monkeypatch.setattr(torch, "addmm", addmm)
    linear._try_wider_sum.cache_clear()
    d_logits, rows = torch.randn(2, 5, 3).bfloat16()
    for _ in range(2):
        total = torch.ones(3, 3)
        linear._add_product(total, d_logits, rows)
        assert error(total, 1 + d_logits.double().t() @ rows.double()) <= 1e-6
    linear._try_wider_sum.cache_clear()
    assert len(calls) == (3 if fault is None else 1)  # tried once


def test_a_sum_that_is_rounded_to_the_product_is_not_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    def addmm(total: Any, a: Any, b: Any, out_dtype: torch.dtype, out: Any) -> None:
        out.copy_((total + a.float() @ b.float()).to(a.dtype))

    monkeypatch.setattr(torch, "addmm", addmm)
    linear._try_wider_sum.cache_clear()
    assert not linear.adds_to_wider(torch.device("cpu"), torch.bfloat16)
    linear._try_wider_sum.cache_clear()


def test_what_has_no_values_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def addmm(total: Any, a: Any, b: Any, out_dtype: torch.dtype, out: Any) -> None:
        out += a.float() @ b.float()

    monkeypatch.setattr(torch, "addmm", addmm)
    linear._try_wider_sum.cache_clear()
    with FakeTensorMode():
        assert linear.adds_to_wider(torch.device("cpu"), torch.bfloat16)
    linear._try_wider_sum.cache_clear()


def test_memory_that_is_short_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def addmm(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(torch, "addmm", addmm)
    linear._try_wider_sum.cache_clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        linear.adds_to_wider(torch.device("cpu"), torch.bfloat16)
    monkeypatch.undo()
    assert not linear.adds_to_wider(torch.device("cpu"), torch.bfloat16)  # asked again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_token_loss_compiles_as_one_graph(dtype: torch.dtype) -> None:
    linear._try_wider_sum.cache_clear()
    hidden, weight = torch.randn(6, 8, dtype=dtype), torch.randn(50, 8, dtype=dtype)

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_token_loss(hidden, weight, torch.arange(6), ObjectiveConfig()).loss.sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for eager, compiled in zip(*grads, strict=True):
        assert torch.equal(eager, compiled)


def test_blocks_are_counted_in_bytes() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert block_tokens(32000, 2, gpu) == 8320  # 0.5 GiB are 8388.6
    assert block_tokens(16384, 2, gpu) == 16384
    assert block_tokens(32000, 4, cpu) == 1024
    assert block_tokens(1 << 40, 4, gpu) == block_tokens(1 << 40, 4, cpu) == 128
    assert block_tokens(0, 4, gpu) == 1 << 29  # a shard without a column


def test_linear_token_loss_never_holds_all_logits() -> None:
    tokens, vocab = 512, 128
    hidden, weight = torch.randn(tokens, 4), torch.randn(vocab, 4)
    hidden.requires_grad_(), weight.requires_grad_()
    with _Largest() as mode:
        loss = linear_token_loss(
            hidden, weight, torch.arange(tokens) % vocab, CONFIGS["mile"], chunk_tokens=16
        ).loss
        loss.sum().backward()
    assert mode.numel < tokens * vocab // 8
    with _Largest() as mode:
        token_loss(hidden @ weight.t(), torch.arange(tokens) % vocab, CONFIGS["mile"])
    assert mode.numel >= tokens * vocab  # the measure sees it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_token_loss_is_not_above_the_separate_projection(dtype: torch.dtype) -> None:
    """Against the truth of the logits that are rounded to the dtype, as both make them."""
    hidden, weight = torch.randn(300, 64).to(dtype), (torch.randn(500, 64) / 4).to(dtype)
    targets = torch.arange(300)
    logits = hidden @ weight.t()
    grad = oracle(logits, targets).grad
    d_weight, d_hidden = grad.t() @ hidden.double(), grad @ weight.double()
    errors = []
    for fused in (True, False):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            out = linear_token_loss(x, w, targets, CONFIGS["mile"], chunk_tokens=64)
        else:
            out = token_loss(x @ w.t(), targets, CONFIGS["mile"])
        out.loss.sum().backward()
        errors.append((error(x.grad, d_hidden), error(w.grad, d_weight)))
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= theirs * 1.01


def test_linear_token_loss_two_backwards_are_bitwise_equal() -> None:
    problem = Problem(torch.float32, "one", "mile")
    hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
    loss = linear_token_loss(hidden, weight, problem.targets, problem.config, chunk_tokens=5).loss
    first = torch.autograd.grad(loss.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_linear_token_loss_of_a_frozen_weight_and_of_no_tokens() -> None:
    problem = Problem(torch.float64, "one", "mile")
    hidden = problem.hidden.clone().requires_grad_()
    out = linear_token_loss(hidden, problem.weight, problem.targets, problem.config)
    (gradient,) = torch.autograd.grad(out.loss, hidden, problem.upstream)
    assert error(gradient, problem.d_hidden) <= GRADIENTS[torch.float64]
    weight = problem.weight.clone().requires_grad_()
    empty = linear_token_loss(hidden[:0], weight, problem.targets[:0], problem.config)
    empty.loss.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_linear_token_loss_adds_to_a_main_grad_of_any_width() -> None:
    problem = Problem(torch.float32, "one", "mile")
    for dtype in (torch.float64, torch.bfloat16):
        weight: Any = problem.weight.clone().requires_grad_()
        weight.main_grad = torch.ones_like(weight, dtype=dtype)
        loss = linear_token_loss(
            problem.hidden,
            weight,
            problem.targets,
            problem.config,
            chunk_tokens=5,
            gradient_accumulation_fusion=True,
        ).loss
        loss.backward(problem.upstream)
        assert weight.grad is None  # nobody has asked for a placeholder
        # Rounded to main_grad's dtype once.
        expected = (1 + problem.d_weight).to(dtype)
        limit = max(GRADIENTS[torch.float32], torch.finfo(dtype).eps)
        assert error(weight.main_grad, expected) <= limit


def test_linear_token_loss_takes_a_single_token() -> None:
    hidden, weight = torch.randn(4, requires_grad=True), torch.randn(5, 4)
    for dims in ((), (1,)):
        targets = torch.full(dims, 3)
        loss = linear_token_loss(hidden.view(*dims, 4), weight, targets, CONFIGS["mile"]).loss
        (gradient,) = torch.autograd.grad(loss.sum(), hidden)
        truth = oracle(hidden @ weight.t(), torch.tensor(3)).grad @ weight.double()
        assert error(gradient, truth) <= 2e-6  # measured 1e-7


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": torch.zeros(60, 7)}, "weight is torch.float32 (60, 7)"),
        ({"weight": torch.zeros(60, WIDTH).double()}, "expected one dtype"),
        ({"targets": torch.zeros(4, 2).long()}, "targets have shape (4, 2); expected (4, 3)"),
        ({"targets": torch.zeros(4, 3)}, "targets are torch.float32"),
        ({"hidden": torch.zeros(4, 3, WIDTH).long()}, "hidden states are torch.int64"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; expected 1 or more"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_linear_token_loss_refuses_what_does_not_fit(change: dict[str, Any], text: str) -> None:
    given = {
        "hidden": torch.zeros(4, 3, WIDTH),
        "weight": torch.zeros(60, WIDTH),
        "targets": torch.zeros(4, 3).long(),
        "config": CONFIGS["mile"],
    }
    with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)")):
        linear_token_loss(**{**given, **change})
