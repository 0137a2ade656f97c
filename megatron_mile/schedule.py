"""gamma over a training: from 0 to its value over the first iterations, to 0 over the last.

    gamma_t = gamma * min(1, t / warmup, (T - 1 - t) / decay),    t = 0 .. T - 1

t counts the iterations that are done, T is the length of the run. So the first iteration of a
warm-up and the last one of a decay have gamma 0, which is plain cross-entropy; iteration t = warmup
is the first with the whole of gamma, and t = T - 1 - decay the last.
"""

import dataclasses

import torch

from megatron_mile.config import ObjectiveConfig


class GammaSchedule:
    """gamma as a tensor that `token_loss` takes, set anew before each iteration.

    The tensor stays the same one: `update` writes into it without waiting for the device, and a
    CUDA graph that has captured the loss reads what was written before its replay.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        warmup: int = 0,
        decay: int = 0,
        train_iters: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Check the schedule; the tensor has the gamma of the first iteration.

        Args:
            config: The objective, which has a gamma: what is reached between the ramps.
            warmup: Iterations of the first ramp, >= 0.
            decay: Iterations of the last ramp, >= 0.
            train_iters: Iterations of the whole run; a decay needs it.
            device: The logits'.

        Raises:
            ValueError: The objective has no gamma, the ramps do not fit into the run, or the
                gradient flows through the entropy and has no bound at a gamma between.
        """
        if "gamma" not in config.own:
            raise ValueError(
                f"a schedule of gamma with the objective {config.objective}, which has none; "
                "expected mile, focal or another that has"
            )
        if min(warmup, decay) < 0:
            raise ValueError(f"warmup is {warmup} and decay {decay}; expected iterations >= 0")
        if train_iters is None and decay:
            raise ValueError(f"decay is {decay} without train_iters; give the run's length")
        if train_iters is not None and warmup + decay > train_iters:
            raise ValueError(
                f"warmup {warmup} and decay {decay} do not fit into {train_iters} iterations; "
                "make them shorter"
            )
        if longest := max(warmup, decay):
            dataclasses.replace(config, gamma=config.gamma / longest)  # the smallest but 0
        self.config, self.warmup, self.decay, self.train_iters = config, warmup, decay, train_iters
        self.gamma = torch.tensor(self.at(0), dtype=torch.float64, device=device)

    def at(self, iteration: int) -> float:
        """Return gamma of the iteration before which `iteration` others were done."""
        parts = [1.0]
        if self.warmup:
            parts.append(iteration / self.warmup)
        if self.decay and self.train_iters is not None:
            parts.append(max(self.train_iters - 1 - iteration, 0) / self.decay)
        return float(self.config.gamma * min(parts))

    def update(self, iteration: int) -> None:
        """Set gamma for the iteration before which `iteration` others were done."""
        self.gamma.fill_(self.at(iteration))

    def inputs(self, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return what `token_loss` takes as `inputs`, and `attach` with this method itself."""
        return {"gamma": self.gamma}
