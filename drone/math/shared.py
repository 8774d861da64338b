"""One basis for several layers: W_i ≈ A_i B, the same B (k, in) for all. Chapter 10.

    min over A_1 … A_m and B of Σ_i ‖(W_i − A_i B) X‖_F²

Stack the W_i: it is one weight (Σ out_i, in), and DRONE's problem. X holds the inputs
of all the layers, so that the moments are summed (Basis Sharing, Wang et al., 2024).
Each layer weighed by its own inputs alone would be another problem, without such an
answer: one eigenproblem has room for one metric.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drone.math.factorize import Factorization, checked_moment, factorize
from drone.math.moments import SecondMoment


def factorize_shared(
    weights: Sequence[Tensor], moments: Sequence[SecondMoment | Tensor] | None = None
) -> list[Factorization]:
    """Decompose weights of layers that are to share their right factor.

    Args:
        weights: W_i, (out_i, in): the same number of inputs.
        moments: C_i of each one's inputs; their sum counts. None: all directions alike.

    Returns:
        One `Factorization` a weight, with r = min(in, the least out_i). Their
        `right_parts` are the same tensors. `errors` are ‖(W_i − A_i B) X‖_F, X the
        inputs of all layers; they fall to 0 only if r = in.

    Raises:
        ValueError: as `factorize`; no weight, another number of inputs or of moments.

    >>> a, b = torch.randn(2, 4, 3, dtype=torch.float64)
    >>> first, second = factorize_shared([a, b])
    >>> first.right_parts[0] is second.right_parts[0]
    True
    """
    sizes = {weight.shape[-1] for weight in weights}
    if len(sizes) != 1 or (moments is not None and len(moments) != len(weights)):
        raise ValueError(
            f"{len(weights)} weights with {sorted(sizes)} inputs, "
            f"{'no' if moments is None else len(moments)} moments; at least one "
            "weight, one number of inputs and as many moments are needed."
        )
    stacked = torch.cat([weight.double() for weight in weights])  # (Σ out_i, in)
    total = None
    if moments is not None:
        total = torch.stack([checked_moment(m, stacked) for m in moments]).sum(0)
    found = factorize(stacked, total)
    # ‖b_j X‖², b_j a row of B: they are orthogonal in that metric.
    energy = -found.errors.square().diff()  # (r,)
    outs = [len(weight) for weight in weights]
    most = min(found.max_rank, *outs)
    right = found.right[:most]  # B, (r, in)
    shared = []
    for weight, rows in zip(weights, found.left.split(outs), strict=True):
        lost = energy * rows.square().sum(0)  # of this layer, by each b_j left out
        tail = torch.cat([lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)])
        errors = tail[: most + 1].clamp_min(0).sqrt()
        shared.append(Factorization((rows[:, :most],), (right,), errors, weight.dtype))
    return shared
