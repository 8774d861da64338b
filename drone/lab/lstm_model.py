"""An LSTM language model built of layers that can be thin: Zaremba et al., 2014."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.generic import ModelOutput

from drone.layers.lstm import LSTMLayer, State


class Readout(nn.Module):
    """From the last h to a score for every word: the end of the stack.

    Attributes:
        decoder: (words, hidden), with a bias.
        dropout: of what enters, in training.
    """

    def __init__(self, hidden: int, words: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.Linear(hidden, words)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        """(batch, steps, hidden) → (batch, steps, words); it has no state."""
        return self.decoder(self.dropout(x)), None


class LSTMConfig(PreTrainedConfig):
    """What config.json says of an LSTM language model."""

    model_type = "drone-lstm"

    def __init__(
        self,
        vocab_size: int = 10000,
        hidden_size: int = 650,
        num_layers: int = 2,
        dropout: float = 0.5,
        tie_word_embeddings: bool = False,
        **others: Any,
    ) -> None:
        """Take the sizes: of the vocabulary, of h and of an embedding, and so on."""
        super().__init__(**others)
        self.tie_word_embeddings = tie_word_embeddings
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.dropout = dropout


@dataclass
class LanguageModelOutput(ModelOutput):
    """What one pass gives.

    Attributes:
        loss: mean cross-entropy over the labels, in nats; None without labels.
        logits: (batch, steps, words).
        states: h and c of each layer after the last step.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    states: list[State] | None = None


class LSTMLanguageModel(PreTrainedModel):
    """Embedding, LSTM layers, decoder: Zaremba et al., 2014. Chapter 6.

    Attributes:
        embedding: (words, hidden).
        stack: the LSTM layers and the readout, in order.
    """

    config_class = LSTMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: LSTMConfig) -> None:
        """Draw all weights at random; seed PyTorch before, or use `language_model`."""
        super().__init__(config)
        hidden, words = config.hidden_size, config.vocab_size
        self.embedding = nn.Embedding(words, hidden)
        layers: list[nn.Module] = [
            LSTMLayer(hidden, hidden, config.dropout) for _ in range(config.num_layers)
        ]
        readout = Readout(hidden, words, config.dropout)
        self.stack = nn.ModuleList([*layers, readout])
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(readout.decoder.bias)
        if config.tie_word_embeddings:
            name = f"stack.{config.num_layers}.decoder.weight"
            self._tied_weights_keys = {name: "embedding.weight"}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights `__init__` drew."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        states: list[State] | None = None,
        attention_mask: Tensor | None = None,
    ) -> LanguageModelOutput:
        """Predict the word after each word.

        Args:
            input_ids: (batch, steps).
            labels: (batch, steps), the next words; -100 is left out of the loss.
            states: of an earlier pass, to go on from it; None: zeros.
            attention_mask: not used: a text has no pads. `drone.calibrate` wants one.

        Raises:
            ValueError: states of another number of layers, or of other shapes.
        """
        count = len(self.stack) - 1  # the readout has no state
        if states is not None and len(states) != count:
            raise ValueError(f"states of {len(states)} layers; {count} are needed.")
        x = self.embedding(input_ids)
        last = []
        carried: list[State | None] = [None] * count
        if states is not None:
            carried = [*states]
        for layer, own in zip(self.stack, [*carried, None], strict=True):
            x, state = layer(x, own)
            last.append(state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(x.flatten(0, 1), labels.flatten())
        return LanguageModelOutput(loss, x, last[:-1])


AutoConfig.register(LSTMConfig.model_type, LSTMConfig)
AutoModelForCausalLM.register(LSTMConfig, LSTMLanguageModel)
