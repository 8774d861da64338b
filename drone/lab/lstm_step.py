"""One step of training an LSTM language model, dense or thin; captured on a GPU."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from drone.lab.lstm_model import LSTMLanguageModel

# A model is its weights by name, as in `state_dict()`, each as one matrix, (W,), or as
# two thin ones whose product it is, (L, R).
Parts = dict[str, tuple[Tensor, ...]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP = 3  # runs of a step before it is captured, as PyTorch asks for
# Largest relative differences of the loss in `checked_step`. Captured and plain run the
# same kernels; bfloat16 has three digits.
SAME, NEAR = 1e-3, 2e-2


def multiplied(parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the dense weights: Ŵ = L R where a weight is thin, made in `dtype`.

    A thin W_hh costs PyTorch's LSTM kernel (it must be multiplied a step at a time), a
    product made once a training step keeps it; by the chain rule, ∂/∂L = ∂/∂Ŵ Rᵀ and
    ∂/∂R = Lᵀ ∂/∂Ŵ, the gradients of L and R are the same.
    """
    weights = {}
    for name, factors in parts.items():
        first, *others = (factor.to(dtype) for factor in factors)
        for other in others:
            first = first @ other
        weights[name] = first
    return weights


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let a GPU multiply float32 matrices with 10-bit mantissas inside, or forbid it.

    For training, never for a perplexity that is reported.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.backends.cuda.matmul.allow_tf32 = before[1]


class Step:
    """A step of plain gradient descent, clipped; truncated back-propagation.

    Everything it reads and writes stays where it is (windows, states, weights, the
    rate), so that on a GPU all its kernels can be captured once and played again by
    one call: the LSTM has hundreds of small ones, and Python cannot start them as fast
    as they run.

    Attributes:
        parts: the weights, float32, changed in place.
        precision: of the products: `float32` or `bfloat16` (the weights stay float32).
        inputs, labels: (batch, steps) int64; -100 is left out of the loss.
        rate: 0-dim, the learning rate.
        states: h and c of each layer after the last step.
        total, count: 0-dim, sum of the losses so far, and of how many labels.
        graph: the captured step; None: each step is run.
    """

    def __init__(
        self,
        shell: LSTMLanguageModel,
        parts: Parts,
        shape: tuple[int, int],
        clip: float,
        precision: str,
    ) -> None:
        """Take a model for its structure; its own weights are not used.

        Args:
            shell: dense, on the device of the parts; its mode and dropout count.
            parts: weights of all its names.
            shape: (batch, steps).
            clip: largest norm of the gradient.
            precision: one of `DTYPES`.

        Raises:
            ValueError: names or a precision that do not fit.
        """
        names = set(shell.state_dict())
        if set(parts) != names:
            odd = sorted(set(parts) ^ names)[0]
            raise ValueError(f"the parts and the model's weights differ in {odd}.")
        self.shell, self.parts, self.clip = shell, parts, clip
        device = next(shell.parameters()).device
        if precision not in DTYPES or (precision != "float32" and device.type == "cpu"):
            raise ValueError(
                f"the precision is {precision}; {', '.join(DTYPES)} are allowed, the "
                "latter on a GPU only."
            )
        self.precision, dtype = precision, DTYPES[precision]
        self.leaves = [factor for factors in parts.values() for factor in factors]
        self.inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        self.labels = torch.zeros_like(self.inputs)
        self.rate = torch.zeros((), device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros_like(self.total)
        hidden, layers = shell.config.hidden_size, shell.config.num_layers
        zeros = torch.zeros(2 * layers, shape[0], hidden, dtype=dtype, device=device)
        self.states = [(zeros[2 * i], zeros[2 * i + 1]) for i in range(layers)]
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self) -> None:
        """Begin a text: states of zeros, no loss yet."""
        for each in (
            self.total,
            self.count,
            *(s for pair in self.states for s in pair),
        ):
            each.zero_()

    def __call__(self, inputs: Tensor, labels: Tensor) -> None:
        """Make one step on a window; a shorter one is filled up with what is ignored.

        Args:
            inputs: (batch, up to `steps`).
            labels: of the same shape.
        """
        steps = inputs.shape[1]
        if steps < self.inputs.shape[1]:
            self.labels.fill_(-100)
        self.inputs[:, :steps].copy_(inputs)
        self.labels[:, :steps].copy_(labels)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def _run(self) -> None:
        for leaf in self.leaves:
            leaf.requires_grad_()
        weights = multiplied(self.parts, DTYPES[self.precision])
        states = {"states": self.states}
        output = functional_call(self.shell, weights, (self.inputs,), states)
        # Softmax in float32: its sums over all words would lose bfloat16's few digits
        scores = output.logits.flatten(0, 1).float()
        loss = F.cross_entropy(scores, self.labels.flatten())
        gradients = torch.autograd.grad(loss, self.leaves)
        with torch.no_grad():
            norm = nn.utils.get_total_norm(gradients)
            shrunk = (self.clip / (norm + 1e-6)).clamp(max=1)
            step = -self.rate * shrunk  # stays on the device: no number is waited for
            for leaf, gradient in zip(self.leaves, gradients, strict=True):
                leaf.requires_grad_(False)
                leaf.addcmul_(gradient, step)
            for kept, new in zip(self.states, output.states, strict=True):
                kept[0].copy_(new[0])  # the state goes on, the gradient does not
                kept[1].copy_(new[1])
            here = (self.labels >= 0).sum()
            self.total += loss.detach() * here
            self.count += here

    def capture(self) -> None:
        """Record the step's kernels; from now on a step plays them. GPU only.

        Weights and states are as before afterwards.

        Raises:
            RuntimeError: something in the step cannot be captured.
        """
        kept = [leaf.clone() for leaf in self.leaves]
        self.rate.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self.graph = graph
        for leaf, old in zip(self.leaves, kept, strict=True):
            leaf.copy_(old)
        self.start()


def checked_step(
    shell: LSTMLanguageModel,
    parts: Parts,
    windows: list[tuple[Tensor, Tensor]],
    clip: float,
    precision: str,
    capture: bool,
) -> tuple[Step, dict[str, Any]]:
    """Make a step as asked for, and compare it with one that needs no trust.

    Plain float32 steps are the measure. bfloat16 must give nearly their loss and a
    captured step the loss of a plain one, without dropout, over three steps; and with
    dropout two played steps must differ, or the masks would be frozen. What fails is
    not used: float32 for bfloat16, plain for captured. It is never silent: what was
    asked, what was taken and why is printed and returned for the record.

    Args:
        shell: as in `Step`.
        parts: as in `Step`; they are left as they were.
        windows: at least three, all of one shape, on the device.
        clip: as in `Step`.
        precision: what is asked for.
        capture: whether a captured step is asked for.

    Returns:
        The step, and `asked`, `precision`, `captured`, `failed` (a list of what was
        not taken and why), `losses` (each way's three) and `milliseconds` (each
        way's a step, and those of the one taken).

    Raises:
        ValueError: a plain float32 step gives a loss that is not finite.
    """
    shape = (windows[0][0].shape[0], windows[0][0].shape[1])
    report: dict[str, Any] = {
        "asked": {"precision": precision, "captured": capture},
        "failed": [],
        "losses": {},
        "milliseconds": {},
    }

    def make(kind: str) -> Step:
        return Step(shell, parts, shape, clip, kind)

    step = make("float32")
    reference = _three_losses(step, windows)
    report["losses"]["float32"] = reference
    report["milliseconds"]["float32"] = _milliseconds(step, windows)
    if not all(abs(loss) < 1e4 for loss in reference):
        raise ValueError(f"the first losses are {reference}; finite ones are needed.")
    if precision != "float32":
        tried = _attempt(report, precision, lambda: make(precision), parts, windows)
        near = tried and _worst(tried[1], reference) <= NEAR
        if tried and near:
            step, reference = tried
        elif tried:
            report["failed"].append(f"{precision}: too far from float32")
    if capture:
        plain = step

        def captured() -> Step:
            new = make(plain.precision)
            with _no_dropout(shell):
                new.capture()
            return new

        tried = _attempt(report, f"{step.precision} captured", captured, parts, windows)
        if tried and _worst(tried[1], reference) > SAME:
            report["failed"].append("captured: not the losses of plain steps")
        elif tried:
            new = make(plain.precision)
            new.capture()
            if _masks_differ(new, windows[0]):
                step = new
            else:
                report["failed"].append("captured: dropout masks are frozen")
    report |= {"precision": step.precision, "captured": step.graph is not None}
    report["milliseconds"]["taken"] = _milliseconds(step, windows)
    for line in report["failed"]:
        print(f"NOT TAKEN {line}", flush=True)
    print(f"step: {report}", flush=True)
    return step, report


def _attempt(
    report: dict[str, Any],
    title: str,
    make: Callable[[], Step],
    parts: Parts,
    windows: list[tuple[Tensor, Tensor]],
) -> tuple[Step, list[float]] | None:
    """Make a step and take its three losses; None, noted, where the device refuses."""
    kept = {name: [f.clone() for f in fs] for name, fs in parts.items()}
    try:
        step = make()
        losses = _three_losses(step, windows)
        report["milliseconds"][title] = _milliseconds(step, windows)
    except RuntimeError as error:  # what cuDNN, cuBLAS and a capture raise
        report["failed"].append(f"{title}: {type(error).__name__}: {str(error)[:300]}")
        for name, factors in parts.items():  # it may have stopped anywhere
            for factor, old in zip(factors, kept[name], strict=True):
                factor.requires_grad_(False).copy_(old)
        return None
    report["losses"][title] = losses
    return step, losses


def _three_losses(step: Step, windows: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Take three steps without dropout; weights and states are as before afterwards."""
    kept = [leaf.clone() for leaf in step.leaves]
    step.start()
    losses = []
    with _no_dropout(step.shell):
        for inputs, labels in windows[:3]:
            step.rate.fill_(1.0)
            step(inputs, labels)
            losses.append(float(step.total / step.count))
    for leaf, old in zip(step.leaves, kept, strict=True):
        leaf.copy_(old)
    step.start()
    return losses


def _worst(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference; NaN counts as infinite."""
    gaps = [abs(a / b - 1) for a, b in zip(losses, reference, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)


def _masks_differ(step: Step, window: tuple[Tensor, Tensor]) -> bool:
    """Whether the same window gives another loss at each play, as dropout must."""
    rates = [m.p for m in step.shell.modules() if isinstance(m, nn.Dropout)]
    if not any(rates):
        return True
    losses = []
    for _ in range(2):
        step.start()
        step.rate.zero_()
        step(*window)
        losses.append(float(step.total))
    step.start()
    return losses[0] != losses[1]


def _milliseconds(step: Step, windows: list[tuple[Tensor, Tensor]]) -> float:
    """Time a step that changes nothing; its mean over as many as there are windows."""
    step.start()
    step.rate.zero_()
    step(*windows[0])
    float(step.total)  # wait for the device
    started = time.perf_counter()
    for window in windows:
        step(*window)
    float(step.total)
    taken = time.perf_counter() - started
    step.start()
    return round(1000 * taken / len(windows), 3)


@contextmanager
def _no_dropout(shell: nn.Module) -> Iterator[None]:
    """Every dropout has the share 0 inside."""
    layers = [m for m in shell.modules() if isinstance(m, nn.Dropout)]
    shares = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer.p = share


def parts_of(model: nn.Module, device: torch.device | str) -> Parts:
    """Copy a dense model's weights, each as one matrix, to a device, in float32."""
    state: Mapping[str, Tensor] = model.state_dict()
    return {
        name: (weight.detach().to(device, torch.float32, copy=True),)
        for name, weight in state.items()
    }
