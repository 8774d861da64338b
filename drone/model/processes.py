"""Calibration over processes: each reads its own rows, and the sums are added."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from drone.math.moments import SecondMoment


def merge_over_processes(
    moments: Mapping[str, SecondMoment], group: Any = None
) -> dict[str, SecondMoment]:
    """Add the moments that all processes of a group have collected.

    Call it in every process, after `drone.calibrate` on the rows that are that
    process's own. Moments are sums, so that where the rows were read does not matter:
    `matrix`, `total` (and with it `mean`) and `count` are what one process would have
    found on all rows, but for the order of the additions.

    Args:
        moments: {module name: its moment}, the same names in all processes.
        group: of `torch.distributed`; None: all processes. With its backend NCCL the
            moments have to be on that process's GPU, with Gloo on the CPU.

    Returns:
        {module name: a moment of its own}, in the order of this process's names.

    Raises:
        ValueError: `torch.distributed` is not initialised, or the processes have other
            modules or sizes. Every process raises then, and none waits.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> moment = SecondMoment(2)
    >>> moment.update(torch.eye(2))
    >>> merge_over_processes({"layer": moment})["layer"].count
    2
    >>> dist.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "torch.distributed is not initialised; call init_process_group first."
        )
    own = {name: moment.dim for name, moment in moments.items()}
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    for number, other in enumerate(every):
        odd = dict(set(own.items()) ^ set(other.items()))
        if odd:
            raise ValueError(
                f"process {number} of the group has other modules or sizes, "
                f"{', '.join(sorted(odd))}; calibrate the same ones everywhere."
            )
    merged = {name: moment.copy() for name, moment in moments.items()}
    for name in sorted(merged):  # the same order everywhere, or sums would be mixed
        moment = merged[name]
        count = torch.tensor(moment.count, device=moment.device)
        for part in (moment.matrix, moment.total, count):
            dist.all_reduce(part, group=group)
        moment.count = int(count)
    return merged
