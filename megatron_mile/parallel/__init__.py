"""Where the data is split: the only collectives in the library.

`vocab` gathers statistics and looks rows up over the tensor-parallel group, `hidden` gathers and
reduces hidden states there, and `tokens` joins the normaliser over the data- and context-parallel
group. No objective, no kernel and nothing of Megatron may live here.
"""

import torch.distributed as dist
from torch.distributed import ProcessGroup

# torch 2.13 gave them other names, and the old ones warn.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def group_size(group: ProcessGroup | None) -> int:
    """Return the number of ranks in `group`; 1 for None, which means this rank alone.

    Raises:
        ValueError: This rank is not in the group.
    """
    if group is None:
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError(
            f"the process group given ({group}) does not hold this rank; expected one of its own "
            "groups, or None for this rank alone"
        )
    return size
