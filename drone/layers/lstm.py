"""LSTMs whose two products are modules of their own, so that each can be thin."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from drone.devices import multiplies_bfloat16
from drone.layers.linear import LowRankLinear
from drone.math.factorize import factorize
from drone.math.moments import SecondMoment

State = tuple[Tensor, Tensor]  # h and c
Gates = tuple[Tensor, Tensor, Tensor, Tensor]  # i, f, g and o of one step
# PyTorch's kernel for CPUs (oneDNN) rearranges the weights at every call. Measured at
# hidden 650 and 1500: 4 and 9 times slower than plain steps for one step, as fast at
# about ten, faster at 35. So for fewer steps than this, plain ones.
KERNEL_FROM = 16
# With gradients in bfloat16 it is the other way round: at hidden 650 and 1500 plain
# steps with `_Steps` are 2.2 times faster than the kernel, at hidden 64 2 times slower.
STEPS_FROM = 256


class Recurrent(nn.Linear):
    """The product with h_{t-1}: made once a step, and timed so by `drone.costs`."""


class LSTMLayer(nn.Module):
    """One LSTM layer whose two products can be replaced by thin ones. Chapter 6.

    (i, f, g, o) = W_ih x_t + W_hh h_{t-1} + b
    c_t = σ(f) c_{t-1} + σ(i) tanh(g),  h_t = σ(o) tanh(c_t)

    While `recurrent` is dense and there are many steps, PyTorch's own kernel runs
    them; with a thin one, few steps, or in bfloat16 training they are made here. Both
    give what `nn.LSTM` gives; under autocast the kernel keeps to float32 where it has
    not the dtype asked for. Forward pre-hooks of `input` and `recurrent` see what
    enters them; forward hooks of `recurrent` are never called, those of `input` not
    when the kernel runs. Gradients of gradients are refused after plain steps.

    Attributes:
        input: W_ih and b, (4·hidden, in). Its product is made for all steps at once.
        recurrent: W_hh, (4·hidden, hidden), no bias.
        dropout: of what enters, in training.
        hidden: length of h.
    """

    def __init__(self, in_features: int, hidden: int, dropout: float = 0.0) -> None:
        """Draw weights as `nn.LSTM` does; there is one bias instead of its two."""
        super().__init__()
        self.input: nn.Linear | LowRankLinear = nn.Linear(in_features, 4 * hidden)
        self.recurrent: nn.Linear | LowRankLinear = Recurrent(
            hidden, 4 * hidden, bias=False
        )
        self.dropout = nn.Dropout(dropout)
        self.hidden = hidden
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run all steps.

        Args:
            x: (batch, steps, in).
            state: h and c of the step before, each (batch, hidden); None: zeros.

        Returns:
            h of all steps, (batch, steps, hidden), and the last h and c.

        Raises:
            ValueError: a state of another shape.
        """
        x = self.dropout(x)
        needed = (len(x), self.hidden)
        if state is None:
            zeros = x.new_zeros(needed)
            state = (zeros, zeros)
        if any(tuple(part.shape) != needed for part in state):
            shapes = ", ".join(str(tuple(part.shape)) for part in state)
            raise ValueError(f"the state has shapes {shapes}; {needed} is needed.")
        if isinstance(self.recurrent, LowRankLinear) or self._steps_win(x):
            output, last = _steps(self.input(x), state, self.recurrent)
        else:
            if _watched(self.input):
                self.input(x)  # the kernel would not call it, and hooks not see x
            output, last = _kernel(x, state, self.input, self.recurrent)
        if _watched(self.recurrent):
            self.recurrent(torch.cat([state[0][:, None], output[:, :-1]], dim=1))
        return output, last

    def _steps_win(self, x: Tensor) -> bool:
        """Whether plain steps are faster than PyTorch's kernel for CPUs here."""
        if x.device.type != "cpu":
            return False
        trained_in_half = _autocast("cpu") and torch.is_grad_enabled()
        few = x.shape[1] < KERNEL_FROM
        return few or (trained_in_half and self.hidden >= STEPS_FROM)


def _watched(module: nn.Module) -> bool:
    """Whether someone looks at what enters a module, as calibration does.

    One who waits for the output too, as a profile does, would time a product that the
    kernel has not made.
    """
    return bool(module._forward_pre_hooks) and not module._forward_hooks


def _factors(product: nn.Linear | LowRankLinear) -> list[Tensor]:
    """The matrices one multiplies with, the first one first: W, or R and then L."""
    if isinstance(product, LowRankLinear):
        return [product.right, product.left]
    return [product.weight]


def _kernel(
    x: Tensor, state: State, input: nn.Linear | LowRankLinear, recurrent: nn.Linear
) -> tuple[Tensor, State]:
    """Run PyTorch's LSTM kernel. Of a thin W_ih = L R it gets L, and R x for x."""
    *before, weight = _factors(input)
    for factor in before:
        x = F.linear(x, factor)
    bias = input.bias
    assert bias is not None  # `LSTMLayer` always has one
    h, c = state
    weights = [weight, recurrent.weight, bias, torch.zeros_like(bias)]
    kind = x.device.type
    uncast = _autocast(kind) and not _kernel_has_autocast_dtype(x.device)
    if uncast:  # one dtype for all: that of the weights
        x, h, c = (each.to(weight.dtype) for each in (x, h, c))
    if kind == "cuda":
        weights = _in_one_piece(weights)
    with torch.autocast(kind, enabled=False) if uncast else nullcontext():
        output, h, c = torch.lstm(
            x,
            (h[None], c[None]),
            weights,
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            train=torch.is_grad_enabled(),  # there is no dropout in it
            bidirectional=False,
            batch_first=True,
        )
    return output, (h[0], c[0])


def _autocast(kind: str) -> bool:
    """Whether autocast is on for a type of device; some, such as meta, have none."""
    known = torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def _kernel_has_autocast_dtype(device: torch.device) -> bool:
    """Whether the kernel can do what autocast asks for; if not it runs uncast.

    Asked for bfloat16, cuDNN would take float16 without a word, whose gradients vanish
    unless the loss is scaled; a CPU without bfloat16 instructions has no such kernel.
    """
    dtype = torch.get_autocast_dtype(device.type)
    if device.type == "cuda":
        return dtype == torch.float16
    return dtype == torch.bfloat16 and multiplies_bfloat16(device)


def _in_one_piece(weights: Sequence[Tensor]) -> list[Tensor]:
    """Copy weights into one block of memory, one after another, as cuDNN wants them.

    Of weights that lie apart it makes such a copy itself, and warns at every call.
    """
    block = torch.cat([weight.flatten() for weight in weights])
    parts = block.split([weight.numel() for weight in weights])
    return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]


def _steps(
    gates: Tensor, state: State, recurrent: nn.Linear | LowRankLinear
) -> tuple[Tensor, State]:
    """Make the steps, given W_ih x + b of all of them: (batch, steps, 4·hidden)."""
    factors = _factors(recurrent)
    if _autocast(gates.device.type):
        factors = [each.to(gates.dtype) for each in factors]
    if torch.is_grad_enabled():
        output, h, c = _Steps.apply(gates, *state, *factors)
        return output, (h, c)
    _, cells, outputs = _walk(gates, state, factors)
    return torch.stack(outputs[1:], dim=1), (outputs[-1], cells[-1])


def _walk(
    gates: Tensor, state: State, factors: Sequence[Tensor]
) -> tuple[list[Gates], list[Tensor], list[Tensor]]:
    """Return what the gates were at each step, and all c and h from the start on.

    Products are made in the factors' dtype, the state is kept in its own.
    """
    h, c = state
    opened: list[Gates] = []
    cells, outputs = [c], [h]
    for at in gates.unbind(1):
        product = h.to(factors[0].dtype)
        for factor in factors:  # W_hh h, or L (R h): two thin products a step
            product = F.linear(product, factor)
        i, f, g, o = (at + product).to(c.dtype).chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        h = o * c.tanh()
        opened.append((i, f, g, o))
        cells.append(c)
        outputs.append(h)
    return opened, cells, outputs


class _Steps(torch.autograd.Function):
    """The steps, and their gradient with one product a weight instead of one a step.

    Autograd would add up 4·hidden × hidden numbers for W_hh at every step. Here
    δ_t = ∂loss/∂(W_ih x_t + W_hh h_{t-1} + b) is kept for all steps, and at the end
    ∂loss/∂W_hh = Σ_t δ_t h_{t-1}ᵀ is one large product.
    """

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, h: Tensor, c: Tensor, *factors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        opened, cells, outputs = _walk(gates, (h, c), factors)
        stacked = torch.stack([torch.stack(each) for each in opened])
        ctx.save_for_backward(
            stacked, torch.stack(cells), torch.stack(outputs), *factors
        )
        ctx.dtype = gates.dtype
        return torch.stack(outputs[1:], dim=1), outputs[-1], cells[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        of_output, dh, dc = gradients
        opened, cells, outputs, *factors = ctx.saved_tensors
        deltas = []
        for t in reversed(range(len(opened))):
            i, f, g, o = opened[t]
            tanh_c = cells[t + 1].tanh()
            dh = dh + of_output[:, t]
            dc = dc + dh * o * (1 - tanh_c**2)
            into_f, into_o = dc * cells[t], dh * tanh_c
            delta = torch.cat(
                [
                    dc * g * i * (1 - i),
                    into_f * f * (1 - f),
                    dc * i * (1 - g**2),
                    into_o * o * (1 - o),
                ],
                dim=1,
            ).to(factors[0].dtype)
            deltas.append(delta)
            dc = dc * f
            for factor in reversed(factors):
                delta = delta @ factor
            dh = delta.to(dc.dtype)
        deltas.reverse()
        entered = [outputs[:-1].flatten(0, 1).to(factors[0].dtype)]
        for factor in factors[:-1]:
            entered.append(F.linear(entered[-1], factor))
        above, of_factors = torch.cat(deltas), []
        for factor, x in zip(reversed(factors), reversed(entered), strict=True):
            of_factors.append(above.T @ x)
            above = above @ factor
        of_gates = torch.stack(deltas, dim=1).to(ctx.dtype)
        return of_gates, dh, dc, *reversed(of_factors)


class LowRankLSTM(nn.Module):
    """What replaces an `nn.LSTM` in any model: same arguments, same results, thin.

    Attributes:
        layers: one `LSTMLayer` a layer.
        batch_first: as in `nn.LSTM`.
    """

    def __init__(self, layers: list[LSTMLayer], batch_first: bool) -> None:
        """Wrap layers; `from_lstm` makes them from an `nn.LSTM`."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.batch_first = batch_first

    @classmethod
    def from_lstm(
        cls,
        lstm: nn.LSTM,
        ranks: Mapping[str, int],
        moments: Mapping[str, SecondMoment] | None = None,
    ) -> "LowRankLSTM":
        """Replace the weights of an `nn.LSTM` by their best factors.

        Args:
            lstm: in one direction, without `proj_size`; it is left as it was.
            ranks: {`weight_ih_l0`, `weight_hh_l0`, ...: rank}, the names `nn.LSTM`
                gives them; a weight that is left out stays dense.
            moments: of what each is multiplied with, by the same names: of x_t for
                `weight_ih_l0`, of the h_t below for the layers above, of h_{t-1} for
                `weight_hh`. None: plain SVD.

        Raises:
            ValueError: an LSTM of another kind, an unknown name, a rank that is not
                allowed, a missing moment. The message names the weight.
        """
        if lstm.bidirectional or lstm.proj_size:
            raise ValueError(
                "an LSTM in one direction and without proj_size is needed."
            )
        names = [n for n, _ in lstm.named_parameters() if n.startswith("weight")]
        unknown = sorted(set(ranks) - set(names))
        if unknown:
            raise ValueError(f"no weight {unknown[0]!r}; there are {', '.join(names)}.")
        layers = []
        for number in range(lstm.num_layers):
            dropout = lstm.dropout if number else 0.0  # nn.LSTM's lies between layers
            layer = _copied(lstm, number, dropout)
            for kind, part in (("ih", "input"), ("hh", "recurrent")):
                name = f"weight_{kind}_l{number}"
                if name in ranks:
                    dense = getattr(layer, part)
                    if moments is not None and name not in moments:
                        raise ValueError(f"{name}: there is no moment for it.")
                    moment = None if moments is None else moments[name]
                    try:
                        found = factorize(dense.weight, moment)
                        thin = LowRankLinear.from_linear(dense, ranks[name], found)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from error
                    setattr(layer, part, thin)
            layers.append(layer)
        return cls(layers, lstm.batch_first).train(lstm.training)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run all layers.

        Args:
            x: (steps, batch, in), or (batch, steps, in) with `batch_first`.
            state: h and c, each (layers, batch, hidden); None: zeros.

        Returns:
            h of the last layer at all steps, shaped as x is, and the last h and c.

        Raises:
            ValueError: x is no tensor of three dimensions (pad a packed sequence), or
                the state is of another shape.
        """
        if not isinstance(x, Tensor) or x.ndim != 3:
            shown = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x is {shown}; a tensor of three dimensions is needed.")
        if state is not None and {len(part) for part in state} != {len(self.layers)}:
            raise ValueError(f"a state of {len(self.layers)} layers is needed.")
        x = x if self.batch_first else x.transpose(0, 1)
        last = []
        for number, layer in enumerate(self.layers):
            own = None if state is None else (state[0][number], state[1][number])
            x, new = layer(x, own)
            last.append(new)
        h, c = (torch.stack(parts) for parts in zip(*last, strict=True))
        return x if self.batch_first else x.transpose(0, 1), (h, c)


def _copied(lstm: nn.LSTM, number: int, dropout: float) -> LSTMLayer:
    """Take one layer out of an `nn.LSTM`; its two biases become their sum."""
    weights = {
        name.removesuffix(f"_l{number}"): weight
        for name, weight in lstm.named_parameters()
        if name.endswith(f"_l{number}")
    }
    into = weights["weight_ih"]
    with torch.random.fork_rng():  # what is drawn is overwritten
        layer = LSTMLayer(into.shape[1], lstm.hidden_size, dropout).to(into)
    assert layer.input.bias is not None  # every layer has one
    with torch.no_grad():
        *_, dense = _factors(layer.input)
        dense.copy_(into)
        *_, dense = _factors(layer.recurrent)
        dense.copy_(weights["weight_hh"])
        layer.input.bias.zero_()
        for name in ("bias_ih", "bias_hh"):
            if name in weights:
                layer.input.bias.add_(weights[name])
    return layer.requires_grad_(into.requires_grad)
