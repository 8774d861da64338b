"""One factorization for all ranks beside two other ways to it: compare the medians.

The layers of BERT's feed-forward block, from 20,000 tokens. `extra_info` (in
--benchmark-json) holds the relative error on those tokens at some ranks; the best
there is can be no lower, so equal errors mean that both are optimal.
"""

from functools import cache

import pytest
import torch

from drone import SecondMoment, factorize
from drone.math.factorize import output_moment

TOKENS = 20_000
RANKS = [64, 256, 512]
SHAPES = [(3072, 768), (768, 3072)]


@cache
def layer(out, into):
    """A weight, its inputs (in, N), of a spectrum like real ones', and their moment."""
    torch.manual_seed(0)
    spectrum = torch.logspace(0, -2, into)[:, None]
    x = torch.linalg.qr(torch.randn(into, into)).Q @ (
        spectrum * torch.randn(into, TOKENS)
    )
    moment = SecondMoment(into)
    for batch in x.T.split(1024):
        moment.update(batch)
    _ = moment.matrix  # mirrored now, not in the first round
    return torch.randn(out, into) / into**0.5, x, moment


def with_drone(weight, x, moment):
    """`factorize` and all factors, multiplied out."""
    return factorize(weight, moment).truncate(min(weight.shape))


def with_cholesky(weight, x, moment):
    """C = L Lᵀ, W L = U S Vᵀ, right = S Vᵀ L⁻¹: in float32."""
    lower = torch.linalg.cholesky(moment.matrix.float())
    u, s, v = torch.linalg.svd(weight @ lower, full_matrices=False)
    right = torch.linalg.solve_triangular(
        lower, s[:, None] * v, upper=False, left=False
    )
    return u, right


def with_two_full_svds(weight, x, moment):
    """Theorem 1 as printed, from SVDs with all singular vectors: X's are N × N."""
    u_w, s_w, v_w = torch.linalg.svd(weight, full_matrices=True)
    u_x, s_x, _ = torch.linalg.svd(x, full_matrices=True)
    into = len(x)
    z = s_w[:, None] * (v_w @ u_x) * s_x
    u_z, s_z, v_z = torch.linalg.svd(z)
    # W M* = U_W U_Z S_Z V_Zᵀ S_X⁻¹ U_Xᵀ: two thin matrices at once.
    return u_w[:, :into] @ u_z, (s_z[:, None] * v_z / s_x) @ u_x.T


WAYS = {"drone": with_drone, "cholesky float32": with_cholesky}
CASES = [(shape, way) for shape in SHAPES for way in WAYS]


def relative_errors(weight, factors, moment):
    """‖(W − Ŵ_k) X‖ / ‖W X‖ at each of `RANKS`, in float64."""
    left, right = (factor.double() for factor in factors)
    whole = weight.double()

    def norm(matrix):
        return float(output_moment(matrix, moment.matrix).trace().sqrt())

    return {k: norm(whole - left[:, :k] @ right[:k]) / norm(whole) for k in RANKS}


@pytest.mark.parametrize("way", [*WAYS, "two full SVDs float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]} × {s[1]}")
def test_factorize(benchmark, shape, way):
    weight, x, moment = layer(*shape)
    benchmark.group = f"factorize {shape[0]} × {shape[1]}, {TOKENS:,} tokens"
    rounds, solve = 5, WAYS.get(way)
    if solve is None:
        if shape[1] > 768:
            pytest.skip("one size is enough to see that N × N is too much")
        rounds, solve = 1, with_two_full_svds
    factors = benchmark.pedantic(
        solve, args=(weight, x, moment), rounds=rounds, warmup_rounds=int(rounds > 1)
    )
    errors = relative_errors(weight, factors, moment)
    benchmark.extra_info["relative error"] = errors
    best = factorize(weight, moment).errors
    for k, error in errors.items():
        assert error == pytest.approx(float(best[k] / best[0]), rel=1e-3)
