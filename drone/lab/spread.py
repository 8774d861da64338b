"""Calibration on a Dask cluster: workers read parts of the rows, the sums are added."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distributed import Client, as_completed
from torch import nn

from drone.math.moments import SecondMoment
from drone.model.calibrate import calibrate


def calibrate_on(
    client: Client,
    model: nn.Module,
    parts: Sequence[Iterable[Mapping[str, Any]]],
    modules: Iterable[str] | None = None,
) -> dict[str, SecondMoment]:
    """Calibrate a model on the workers of a cluster.

    Args:
        client: of the cluster.
        model: as in `drone.calibrate`; it is sent to the workers once.
        parts: batches, one list a job; more parts than workers even the load out.
        modules: as in `drone.calibrate`.

    Returns:
        As `drone.calibrate` on all batches, but for the order of the additions.

    Raises:
        ValueError: no part, and what `drone.calibrate` raises.
    """
    names = None if modules is None else list(modules)
    sent = client.scatter(model, broadcast=True)
    jobs = [
        client.submit(calibrate, sent, list(part), names, pure=False) for part in parts
    ]
    merged: dict[str, SecondMoment] = {}
    for _, found in as_completed(jobs, with_results=True):
        for name, moment in found.items():
            if name in merged:
                merged[name].merge(moment)
            else:
                merged[name] = moment
    if not merged:
        raise ValueError("no part to calibrate on; at least one is needed.")
    return merged
