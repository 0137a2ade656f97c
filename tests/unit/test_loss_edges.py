"""token_loss at its edges: ignored and invalid targets, layouts, in place, refusals."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import IGNORED, MILE, WEIGHTED, assert_close, inputs_for, oracle, run_loss
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.linear import linear_token_loss
from megatron_mile.loss import reduce_loss, token_loss
from megatron_mile.objectives import NEED_COST, OBJECTIVES


def test_token_loss_keeps_byte_targets_apart_from_ignore_index() -> None:
    # -100 as uint8 is 156, which is a target like any other.
    logits, targets = torch.zeros(2, 256), torch.tensor([156, 3], dtype=torch.uint8)
    out = token_loss(logits, targets, ObjectiveConfig())
    assert out.valid.all()
    assert torch.equal(out.nll, torch.full((2,), 256.0).log())


def test_token_loss_of_ignored_tokens_is_exactly_zero_whatever_the_logits_hold() -> None:
    logits = torch.tensor([[torch.nan] * 4, [torch.inf, 1, 2, 3], [-torch.inf] * 4, [1, 2, 3, 4]])
    for entropy_grad in (False, True):
        config = ObjectiveConfig(entropy_grad=entropy_grad)
        out, grad = run_loss(
            logits, torch.full((4,), IGNORED), config, upstream=torch.full((4,), 3.0)
        )
        assert torch.equal(torch.stack(out[:4]), torch.zeros(4, 4))
        assert torch.equal(grad, torch.zeros(4, 4))
        assert not out.valid.any()


def test_token_loss_honours_an_ignore_index_inside_the_vocabulary() -> None:
    out = token_loss(torch.randn(3, 5), torch.tensor([0, 2, 0]), MILE, ignore_index=0)
    assert out.valid.tolist() == [False, True, False]
    assert (out.loss != 0).tolist() == [False, True, False]


# Just outside, far outside, and where target - start would overflow.
@pytest.mark.parametrize("target", [-1, 5, 1 << 40, -(1 << 63), (1 << 63) - 1])
@pytest.mark.parametrize("name", WEIGHTED)
def test_token_loss_of_an_invalid_target_is_nan_with_its_gradient(name: str, target: int) -> None:
    logits, targets = torch.randn(2, 5), torch.tensor([target, 1])
    config = ObjectiveConfig(objective=name, gamma=0)
    out, grad = run_loss(logits, targets, config)
    assert out.valid.all()
    for field in (out.loss, out.nll, grad):
        assert field[0].isnan().all()
        assert field[1].isfinite().all()


def test_token_loss_gradient_is_exactly_zero_where_none_comes_in() -> None:
    logits = torch.stack([torch.full((4,), torch.nan), torch.randn(4), torch.randn(4)])
    for entropy_grad in (False, True):
        _, grad = run_loss(
            logits,
            torch.tensor([1, 99, 2]),  # NaN logits; garbage target; fine
            ObjectiveConfig(entropy_grad=entropy_grad),
            upstream=torch.tensor([0.0, 0.0, 1.0]),
        )
        assert torch.equal(grad[:2], torch.zeros(2, 4))
        assert (grad[2] != 0).all()


def test_token_loss_of_a_row_without_a_finite_logit_is_nan() -> None:
    out, grad = run_loss(torch.full((1, 4), -torch.inf), torch.tensor([2]), MILE)
    assert out.loss.isnan().all()
    assert grad.isnan().all()


def test_token_loss_of_a_masked_target_is_infinite() -> None:
    out, grad = run_loss(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), MILE)
    assert (out.loss.item(), out.entropy.item()) == (torch.inf, 0)
    assert grad.tolist() == [[1, -1]]


# Layouts a host has: [s, b, V], its transpose, a slice of a padded vocabulary, a strided one, a
# vocabulary that is not the fastest dimension, one token without leading dimension, no token.
LAYOUTS = {
    "three dimensions": lambda x: x.view(3, 4, 10),
    "transposed": lambda x: x.view(3, 4, 10).transpose(0, 1),
    "padded": lambda x: x.view(3, 4, 10)[..., :7],
    "strided": lambda x: x.view(3, 4, 10)[:, ::2, 1::2],
    "vocabulary first": lambda x: x.view(10, 12).t(),
    "one token": lambda x: x[:10],
    "no token": lambda x: x.view(12, 10)[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_loss_takes_any_strides_without_a_copy(layout: str) -> None:
    base = torch.randn(120, dtype=torch.float64, requires_grad=True)
    logits = LAYOUTS[layout](base)
    targets = torch.randint(logits.size(-1), logits.shape[:-1])
    out = token_loss(logits, targets, MILE)
    assert out.loss.shape == targets.shape
    node: Any = out.loss.grad_fn
    assert node.saved_tensors[0].data_ptr() == logits.data_ptr()
    (grad,) = torch.autograd.grad(out.loss.sum(), logits)
    assert_close((*out[:4], grad), oracle(logits, targets), 1e-12)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_token_loss_takes_narrow_targets(dtype: torch.dtype) -> None:
    # 300 columns: the vocabulary's end does not fit uint8.
    logits, targets = torch.randn(6, 300), torch.tensor([0, 1, 100, 127, 50, 3])
    assert torch.equal(
        token_loss(logits, targets.to(dtype), MILE).loss, token_loss(logits, targets, MILE).loss
    )


def test_token_loss_only_loss_carries_a_gradient() -> None:
    out = token_loss(torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2]), MILE)
    assert [field.requires_grad for field in out[:5]] == [True, False, False, False, False]
    assert out.emo is None


def test_token_loss_keeps_logits_and_repeats_its_backward() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    before, version = logits.detach().clone(), logits._version
    out = token_loss(logits, torch.tensor([0, 3, 8, 1]), MILE)
    grads = [torch.autograd.grad(out.loss.sum(), logits, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads)
    assert torch.equal(logits, before)
    assert logits._version == version


@pytest.mark.parametrize("node", ["token_loss", "emo", "linear_token_loss"])
@pytest.mark.parametrize("power", [1, 2])
def test_every_node_refuses_a_second_derivative(node: str, power: int) -> None:
    # With an incoming gradient that is a constant (power 1) torch itself would say nothing.
    leaf, targets = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    if node == "linear_token_loss":
        out = linear_token_loss(leaf, torch.randn(7, 5), targets, MILE)
    else:
        cost = CostRows(torch.randn(5, 4)) if node == "emo" else None
        config = ObjectiveConfig("emo") if cost else MILE
        out = token_loss(leaf, targets, config, cost=cost)
    with pytest.raises(RuntimeError, match="whose gradient has no gradient"):
        torch.autograd.grad((out.loss**power).sum(), leaf, create_graph=True)


@pytest.mark.parametrize("layout", ["three dimensions", "transposed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_token_loss_inplace_writes_the_same_gradient_over_the_logits(
    layout: str, dtype: torch.dtype, entropy_grad: bool
) -> None:
    config = ObjectiveConfig(entropy_grad=entropy_grad)
    base = torch.randn(120, requires_grad=True, dtype=dtype) * 1
    logits = LAYOUTS[layout](base)
    targets = torch.randint(logits.size(-1), logits.shape[:-1])
    _, expected = run_loss(logits.detach().clone(), targets, config)
    grads: list[torch.Tensor] = []
    logits.register_hook(grads.append)
    token_loss(logits, targets, config, inplace=True).loss.sum().backward()
    assert grads[0].data_ptr() == logits.data_ptr()
    assert torch.equal(grads[0], logits)
    # bf16 keeps e^(z-m) in its own precision in between: two roundings of 2^-8 instead of one.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(logits.detach(), expected, rtol=tolerance, atol=0)


def test_token_loss_inplace_stops_operations_that_saved_the_logits() -> None:
    source = torch.randn(2, 5, requires_grad=True)
    logits = source.exp()  # saves its result
    out = token_loss(logits, torch.tensor([0, 1]), MILE, inplace=True)
    # Also before the loss's own backward has written anything.
    for loss in (logits.sum(), out.loss.sum()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_token_loss_inplace_passes_the_gradient_on() -> None:
    hidden, head = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True)
    targets = torch.tensor([0, 3, 8, 1])
    grads = [
        torch.autograd.grad(
            token_loss(F.linear(hidden, head), targets, MILE, inplace=inplace).loss.sum(),
            (hidden, head),
        )
        for inplace in (False, True)
    ]
    for plain, inplace in zip(*grads, strict=True):
        assert torch.equal(plain, inplace)


def test_token_loss_inplace_refuses_a_second_backward() -> None:
    logits = torch.randn(2, 5, requires_grad=True) * 1
    loss = token_loss(logits, torch.tensor([0, 1]), MILE, inplace=True).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=False to run the backward twice"):
        loss.backward()


@pytest.mark.parametrize(
    "logits",
    [torch.randn(1, 5).expand(3, 5), torch.randn(9).unfold(0, 5, 2)],
    ids=["expanded", "sliding window"],
)
def test_token_loss_inplace_refuses_overlapping_logits(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="overlap in memory"):
        token_loss(logits, torch.tensor([0, 1, 2]), MILE, inplace=True)
    token_loss(logits, torch.tensor([0, 1, 2]), MILE)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, dtype=torch.int64), "torch.int64"),
        (torch.ones(2, 5), torch.ones(2), "targets are torch.float32"),
        (torch.ones(2, 5), torch.ones(2, dtype=torch.bool), "targets are torch.bool"),
        (torch.ones(2, 5), torch.ones(2, 1, dtype=torch.int64), r"\(2, 1\).*\(2, 5\)"),
        (torch.ones(()), torch.ones((), dtype=torch.int64), "without its last dimension"),
    ],
)
def test_token_loss_refuses_what_does_not_fit(
    logits: torch.Tensor, targets: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_loss(logits, targets, MILE)


@pytest.mark.parametrize("vocab_range", [(0, 4), (-1, 4), (7, 2), (5, 11)])
def test_token_loss_refuses_a_range_that_does_not_fit(vocab_range: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"vocab_range is \({vocab_range[0]}, .*has 5 columns"):
        token_loss(torch.ones(1, 5), torch.tensor([0]), MILE, vocab_range=vocab_range)


def test_token_loss_refuses_a_backend_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="triton"):
        token_loss(torch.ones(1, 5), torch.tensor([0]), ObjectiveConfig(backend="triton"))


def _slices_without_a_driver() -> bool:
    """Whether torch can slice a GPU's tensor without values where there is no GPU."""
    try:
        with FakeTensorMode():
            return torch.empty(2, device="cuda")[:1].device.type == "cuda"
    except RuntimeError:
        return False


@pytest.mark.skipif(not _slices_without_a_driver(), reason="this torch asks a driver to slice")
@pytest.mark.parametrize("inplace", [False, True], ids=["kept", "in place"])
@pytest.mark.parametrize("normalize", ["global", "official"])
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in NEED_COST])
def test_forward_on_a_gpu_stays_there(objective: str, normalize: str, inplace: bool) -> None:
    # On the path of a GPU, without one: reading a value raises, and so does a tensor of the CPU.
    # Autograd would need a driver; tests/megatron/jobs/launch_checks.py has it, on "meta".
    with FakeTensorMode():
        logits = torch.empty(2, 3, 50, device="cuda")
        targets = torch.empty(2, 3, dtype=torch.long, device="cuda")
        config = ObjectiveConfig(objective, normalize=normalize)
        inputs = inputs_for(config, targets)
        out = token_loss(logits, targets, config, inplace=inplace, vocab_size=40, inputs=inputs)
        loss = reduce_loss(out, mask=out.valid, config=config)
        assert {x.device.type for x in (*out[:5], loss)} == {"cuda"}


@pytest.mark.parametrize("inplace", [False, True], ids=["kept", "in place"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_token_loss_never_waits_for_a_value(objective: str, inplace: bool) -> None:
    # As CUDA graphs need it: a tensor without values raises where one is read.
    config = ObjectiveConfig(objective, backend="torch")
    with FakeTensorMode():
        leaf = torch.empty(2, 3, 50, requires_grad=True)
        targets = torch.empty(2, 3, dtype=torch.long)
        cost = CostRows(torch.empty(50, 6)) if config.definition.needs_cost else None
        given = {"vocab_size": 40, "cost": cost, "inputs": inputs_for(config, targets)}
        out = token_loss(leaf * 1, targets, config, inplace=inplace, **given)
        reduce_loss(out, mask=out.valid, config=config).backward()
        assert leaf.grad is not None


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("objective", ["dft", "deft"])
def test_a_weight_of_zero_adds_nothing_for_a_masked_target(objective: str, backend: str) -> None:
    leaf = torch.tensor([[1.0, -torch.inf, 2.0], [0.5, 0.25, 1.0]], requires_grad=True)
    config = ObjectiveConfig(objective, backend=backend)
    out = token_loss(leaf, torch.tensor([1, 2]), config)
    (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    assert out.nll[0].isinf()
    assert out.loss[0] == 0
    assert not grad[0].any()
    assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1,), (2, 4)])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    logits, targets = torch.ones(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^inputs\['gamma'\] is .* expected one number, or one"):
        token_loss(logits, targets, MILE, inputs={"gamma": torch.ones(shape)})


def test_an_ignored_token_is_no_hit() -> None:
    logits, targets = torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([1, 0])
    out = token_loss(logits, targets, MILE, ignore_index=1, accuracy=True)
    assert out.accuracy is not None
    assert out.accuracy.tolist() == [0, 0]


def test_reduce_loss_says_what_batch_needs_where_tokens_have_weights() -> None:
    config = ObjectiveConfig("ce", normalize="batch")
    out = token_loss(torch.ones(2, 3), torch.zeros(2).long(), config, token_weight=torch.ones(2))
    with pytest.raises(ValueError, match="needs the weights of the whole global batch"):
        reduce_loss(out, out.valid, config)
