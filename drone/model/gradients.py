"""What the loss says about a layer's outputs: moments of its gradients. Chapter 10."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drone import progress
from drone.devices import double
from drone.math.moments import SecondMoment
from drone.model.adapters import encoder_linears, module_named
from drone.model.calibrate import alone, first_input, frozen
from drone.model.inputs import flat, prepared
from drone.model.loss import LossFunction, loss_tensor


@dataclass(frozen=True)
class Gradients:
    """Sums over rows b and tokens t of a layer y = W x, g = ∂L_b/∂y, L_b a row's loss.

    Attributes:
        outputs: Σ g gᵀ, of vectors (out,): which errors of the outputs the loss feels.
        inputs: Σ ‖g‖² x xᵀ, of vectors (in,): inputs, more where the loss looks.
        fisher: (out,) float64, Σ_b Σ_j (∂L_b/∂W_ij)²: FWSVD's weight of each row i.
    """

    outputs: SecondMoment
    inputs: SecondMoment
    fisher: Tensor


def calibrate_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    modules: Iterable[str] | None = None,
    loss: LossFunction | None = None,
) -> dict[str, Gradients]:
    """Run a model over labelled rows, forth and back, and sum its outputs' gradients.

    In eval mode. No parameter gets a gradient; modes, `requires_grad` and the random
    state are restored. A pad's output reaches no loss, so its gradient is 0.

    Args:
        model: any module.
        batches: as in `calibrate`, with labels.
        modules: names of Linears; None: every Linear of the encoder's layers.
        loss: (model, batch) → a scalar, the mean over the batch; None: the model's own.

    Returns:
        {module name: `Gradients`}.

    Raises:
        ValueError: no batch, no labels, a name the model does not have, a module that
            is not reached, runs twice in a pass or does not see one row of the batch a
            row, NaN or Inf in a gradient. The message names the module.

    >>> model = torch.nn.Linear(3, 1)
    >>> batch = {"input": torch.ones(4, 3), "labels": torch.zeros(4)}
    >>> squares = lambda m, b: (m(b["input"])[:, 0] - b["labels"]).square().mean()
    >>> found = calibrate_gradients(model, [batch], [""], squares)[""]
    >>> found.outputs.count, tuple(found.fisher.shape)
    (4, (1,))
    """
    names = list(dict.fromkeys(encoder_linears(model) if modules is None else modules))
    sums: dict[str, Gradients] = {}
    number = -1
    stream = prepared(batches, model)
    with (
        alone(model),
        frozen(model),
        _no_parameter(model),
        torch.enable_grad(),
    ):
        for number, batch in enumerate(progress.bar(stream, desc="gradients")):
            with _watched(model, names, number) as seen:
                value, count = loss_tensor(model, batch, number, loss)
                if value.requires_grad:
                    # The sum of the rows' own losses; float32, half would overflow.
                    (value.float() * count).backward()
            rows = _rows(batch)
            for name in names:
                if name not in seen or seen[name][1] is None:
                    raise ValueError(
                        f"{name or 'the model'}: the loss of batch {number} does not "
                        "depend on it; leave it out."
                    )
                _add(sums, name, number, rows, *seen[name])
    if number < 0:
        raise ValueError("no batch to calibrate on; at least one is needed.")
    return {name: sums[name] for name in names}


@contextmanager
def _no_parameter(model: nn.Module) -> Iterator[None]:
    """Let no parameter collect a gradient inside."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)


@contextmanager
def _watched(
    model: nn.Module, names: Iterable[str], number: int
) -> Iterator[dict[str, list[Any]]]:
    """Note each module's input and, on the way back, its output's gradient."""
    seen: dict[str, list[Any]] = {}
    handles = []

    def attach(name: str) -> None:
        def hook(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Tensor,
        ) -> Tensor:
            if name in seen:
                raise ValueError(
                    f"{name}: runs twice in a pass; its gradients belong together, "
                    "which is not supported. Leave it out."
                )
            note = seen[name] = [first_input(module, name, args, kwargs).detach(), None]
            if not output.requires_grad:  # the first of a path: the graph begins here
                # A copy, for a leaf must not be changed in place by what follows.
                output = output.detach().requires_grad_().clone()
            output.register_hook(lambda gradient: note.__setitem__(1, gradient))
            return output

        module = module_named(model, name)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    try:
        for name in names:
            attach(name)
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _rows(batch: Mapping[str, Any]) -> int:
    """How many rows a batch has."""
    sizes = [len(v) for v in flat(batch).values() if isinstance(v, Tensor) and v.ndim]
    return sizes[0] if sizes else 1


def _add(
    sums: dict[str, Gradients],
    name: str,
    number: int,
    rows: int,
    x: Tensor,
    gradient: Tensor,
) -> None:
    """Add one batch's rows: x (rows, tokens, in) or (rows, in), gradient alike.

    A Fisher information is of rows, so their axis must be known: XLNet has it second,
    OPT puts rows and tokens into one.
    """
    square = x.ndim == 3 and x.shape[0] == x.shape[1] > 1
    if x.ndim not in (2, 3) or len(x) != rows or square:
        raise ValueError(
            f"{name}, batch {number}: its input has shape {tuple(x.shape)}; (rows, "
            f"tokens, in) or (rows, in) is needed, with {rows} rows and another number "
            "of tokens. Give batches of another size, or leave the module out."
        )
    x = double(x).reshape(rows, -1, x.shape[-1])
    gradient = double(gradient).reshape(rows, -1, gradient.shape[-1])
    if not gradient.isfinite().all():
        raise ValueError(f"{name}, batch {number}: a gradient has NaN or Inf.")
    if name not in sums:
        out, into = gradient.shape[-1], x.shape[-1]
        zeros = torch.zeros(out, dtype=torch.float64)
        sums[name] = Gradients(SecondMoment(out), SecondMoment(into), zeros)
    found = sums[name]
    found.outputs.update(gradient)
    found.inputs.update(x * gradient.norm(dim=-1, keepdim=True))
    # Σ_j (Σ_t g_ti x_tj)² = Σ_{t,u} g_ti (x_t · x_u) g_ui: no (out, in) matrix a row.
    meet = x @ x.mT  # (rows, tokens, tokens)
    found.fisher.add_(((meet @ gradient) * gradient).sum((0, 1)).cpu())
