"""Language modelling on words: vocabulary, windows of a text, perplexity."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from drone import progress
from drone.lab.lstm_model import LSTMConfig, LSTMLanguageModel
from drone.model.calibrate import frozen

END, UNKNOWN = "<eos>", "<unk>"
STEPS = 70  # of one call when a text is only read
PARTS = 10  # read side by side then


@dataclass(frozen=True)
class Vocabulary:
    """The words of a corpus; a word's number is its place.

    Attributes:
        words: `<eos>` first, which ends every sentence, then the most frequent ones.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, sentences: Iterable[str]) -> "Vocabulary":
        """Collect the words of a training split.

        Raises:
            ValueError: there is no word.
        """
        counts = Counter(word for line in sentences for word in line.split())
        if not counts:
            raise ValueError("the corpus has no word; at least one is needed.")
        counts.pop(END, None)
        frequent_first = sorted(counts, key=lambda word: (-counts[word], word))
        return cls((END, *frequent_first))

    def __len__(self) -> int:
        """Return the number of words."""
        return len(self.words)

    def encode(self, sentences: Iterable[str]) -> Tensor:
        """Turn sentences into one stream of word numbers, `<eos>` after each.

        A word that is not in the vocabulary becomes `<unk>` if the corpus has that.

        Returns:
            (tokens,) int64.

        Raises:
            ValueError: an unknown word and no `<unk>`, or no sentence at all. The
                message names the word and the sentence.
        """
        ids = {word: number for number, word in enumerate(self.words)}
        unknown = ids.get(UNKNOWN)
        stream = []
        for number, sentence in enumerate(sentences):
            for word in [*sentence.split(), END]:
                at = ids.get(word, unknown)
                if at is None:
                    raise ValueError(
                        f"sentence {number}: {word!r} is not in the vocabulary of "
                        f"{len(ids)} words, and that has no {UNKNOWN}."
                    )
                stream.append(at)
        if not stream:
            raise ValueError("no sentence to encode; at least one is needed.")
        return torch.tensor(stream)


def windows(
    ids: Tensor, batch_size: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a stream into parts side by side, and those into windows, one after another.

    Every token is a label exactly once; the first one's input is `<eos>`, number 0.

    Args:
        ids: (tokens,).
        batch_size: parts; part i + 1 begins where part i ends.
        steps: length of a window; the last may be shorter.

    Yields:
        Inputs and labels, both (batch, steps); -100 where the last part has ended.

    Raises:
        ValueError: fewer tokens than parts, or `steps` below 1.
    """
    if not 1 <= batch_size <= len(ids):
        raise ValueError(f"batch_size is {batch_size}; 1 to {len(ids)} are allowed.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1.")
    length = -(-len(ids) // batch_size)
    short = batch_size * length - len(ids)
    before = F.pad(ids[:-1], (1, short)).view(batch_size, length)
    labels = F.pad(ids, (0, short), value=-100).view(batch_size, length)
    for start in range(0, length, steps):
        yield before[:, start : start + steps], labels[:, start : start + steps]


def batches(
    ids: Tensor, batch_size: int = 20, steps: int = STEPS
) -> list[dict[str, Tensor]]:
    """Make batches for `drone.calibrate` and `drone.search_ranks`, each from zeros.

    Only whole windows: what is left over at the end is not used.

    Args and errors:
        As `windows`.

    Returns:
        `input_ids`, `labels` and an `attention_mask` of ones, each (batch, steps).
    """
    return [
        {
            "input_ids": before,
            "labels": labels,
            "attention_mask": torch.ones_like(before),
        }
        for before, labels in windows(ids, batch_size, steps)
        if before.shape[1] == steps and (labels >= 0).all()
    ]


def token_losses(
    model: LSTMLanguageModel, ids: Tensor, batch_size: int = PARTS
) -> Tensor:
    """Return -log p of every token of a text given all before it, in nats.

    The state is carried through the whole text; with `batch_size` parts read side by
    side, it is lost at the beginning of each part but the first.

    Args:
        model: a language model; its mode is restored.
        ids: (tokens,), from `Vocabulary.encode`.
        batch_size: parts read side by side.

    Returns:
        (tokens,) float32, in order.

    Raises:
        ValueError: fewer tokens than parts, or a loss that is not finite.
    """
    parts = []
    states = None
    total = math.ceil(math.ceil(len(ids) / batch_size) / STEPS)
    with frozen(model):
        cut = windows(ids, batch_size, STEPS)
        for before, labels in progress.bar(cut, desc="perplexity", total=total):
            output = model(before.to(model.device), states=states)
            states = output.states
            losses = F.cross_entropy(
                output.logits.transpose(1, 2).float(),
                labels.to(model.device),
                reduction="none",
            )
            parts.append(losses.cpu())
    losses = torch.cat(parts, dim=1).flatten()[: len(ids)]
    if not losses.isfinite().all():
        raise ValueError(
            f"token {int((~losses.isfinite()).nonzero()[0])}: no finite loss."
        )
    return losses


def perplexity(model: LSTMLanguageModel, ids: Tensor, batch_size: int = PARTS) -> float:
    """Return exp of the mean of `token_losses`: as if choosing among so many words."""
    return float(token_losses(model, ids, batch_size).double().mean().exp())


def language_model(config: LSTMConfig, seed: int = 0) -> LSTMLanguageModel:
    """Return a model with random weights; the caller's random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LSTMLanguageModel(config)
    model.eval()
    return model
