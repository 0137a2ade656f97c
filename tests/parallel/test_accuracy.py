"""Whether the target has the largest logit, over gloo ranks, with ties and unusual rows."""

import pytest
import torch
import torch.distributed as dist
from support.helpers import hard_rows, run_ranks

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.linear import linear_token_loss
from megatron_mile.loss import token_loss

V = 64
CONFIGS = [ObjectiveConfig(name) for name in ("ce", "mile", "emo")]
CONFIGS += [ObjectiveConfig(label_smoothing=0.1, z_loss=1e-2)]


def _rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hard rows, and behind them ties of the target with one of another shard, and misses.

    One unit in the last place below the largest is a miss.
    """
    logits, targets = hard_rows(V, dtype)
    more = torch.zeros(4, V, dtype=dtype)
    more[:, V - 1] = 5
    more[0, 3] = more[1, V - 2] = 5
    more[2, 3] = 5 - torch.finfo(dtype).eps * 4
    return torch.cat([logits, more]), torch.cat([targets, torch.tensor([3, V - 2, 3, V - 1])])


def _check(size: int, dtype: torch.dtype) -> None:
    logits, targets = _rows(dtype)
    known = (targets >= 0) & (targets < V)
    at_target = logits.gather(-1, targets.clamp(0, V - 1).unsqueeze(-1)).squeeze(-1)
    truth = (at_target == logits.amax(-1)) & known
    assert truth[-4:].tolist() == [True, True, False, True]
    inside = slice(V // size * dist.get_rank(), V // size * (dist.get_rank() + 1))
    group, shard = dist.group.WORLD, logits[:, inside].clone().requires_grad_()
    for config in CONFIGS:
        cost = (
            CostRows(torch.eye(V, 7, dtype=dtype)[inside]) if config.definition.needs_cost else None
        )
        out = token_loss(shard * 1, targets, config, group, cost=cost, accuracy=True)
        plain = token_loss(shard * 1, targets, config, group, cost=cost)
        assert out.accuracy is not None
        assert out.accuracy.tolist() == truth.tolist()
        assert not out.accuracy.requires_grad
        assert plain.accuracy is None
        for found, expected in zip(out[:7], plain[:7], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    hidden = logits.nan_to_num(neginf=-1e4).requires_grad_()  # 0 * -inf is NaN in a product
    rows = torch.eye(V, dtype=dtype)[inside]
    linear = linear_token_loss(hidden, rows, targets, CONFIGS[1], group, accuracy=True)
    assert linear.accuracy is not None
    assert linear.accuracy.tolist() == truth.tolist()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_accuracy_is_whether_the_target_is_at_the_top(size: int, dtype: torch.dtype) -> None:
    run_ranks(size, _check, size, dtype)
