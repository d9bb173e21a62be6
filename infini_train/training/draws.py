"""What is left out of a step of training at random.

The draws are functions of the seed and the step, so that they are the same on all ranks and in a resumed run, and
checkpoints hold no random state.
"""

import numpy as np
import torch
from torch import Tensor


def dropped(share: float, *, seed: int, step: int, lane_ids: Tensor) -> Tensor:
    """Return which of these lanes drop their memory before this step's window, bool [lanes].

    The draw of a lane depends on its global number, and not on the rank that has it.

    Args:
        share: probability with which a lane drops its memory in a step.
        seed: seed of the run.
        step: optimizer step.
        lane_ids: int64 [lanes], global lane numbers.
    """
    return torch.from_numpy(_uniform(seed, step, 0, int(lane_ids.max()) + 1) < share)[lane_ids.cpu()]


def window_dropped(share: float, *, seed: int, step: int) -> bool:
    """Return whether this step reads of earlier segments the layers' memories alone, with probability `share`."""
    return share > 0 and bool(_uniform(seed, step, 1, 1) < share)


def _uniform(seed: int, step: int, stream: int, count: int) -> np.ndarray:
    """Return numbers from 0 to 1, float64 [count]; streams are independent of each other."""
    # numpy guarantees that raw Philox output is the same in all its versions.
    key, counter = np.array([seed, step], dtype=np.uint64), np.array([0, 0, 0, stream], dtype=np.uint64)
    return (np.random.Philox(key=key, counter=counter).random_raw(count) >> np.uint64(11)) * 2.0**-53
