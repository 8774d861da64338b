"""Models of this library, which transformers learns of when a folder names one."""

import importlib
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

LSTM, LSTM_MODULE = "drone-lstm", "drone.lab.lstm_model"


class UnreadLSTMConfig(PreTrainedConfig):
    """Stands for the LSTM's config until a folder names it: drone loads no lab.

    `AutoModelForCausalLM.from_pretrained` then finds the model as any other's.
    """

    model_type = LSTM

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Load the lab's module, which registers config and model, and read by it.

        Raises:
            ImportError: the module needs a package that is not installed.
        """
        try:
            module = importlib.import_module(LSTM_MODULE)
        except ImportError as error:
            raise ImportError(
                f"a {LSTM} needs {error.name}; the extra `lab` brings it."
            ) from error
        return module.LSTMConfig.from_dict(config_dict, **kwargs)


AutoConfig.register(LSTM, UnreadLSTMConfig)
