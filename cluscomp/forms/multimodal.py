"""Models that also see images: how transformers opens them, what of them is for text, what lies beside them."""

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn import Parameter
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

PROCESSOR = (  # files of what turns images and text into a model's inputs, but for the tokenizer's
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip


def opener(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The auto class of transformers that makes the whole model of a config.

    For images and text it is where config.json's `architectures` name such a model, or no causal one is known: some
    families (Qwen 3.5) have both, and their text part alone is the causal one.
    """
    kind = type(config)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    seeing: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]
    named = seeing.__name__ in (config.architectures or [])
    return AutoModelForImageTextToText if named or kind not in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForCausalLM


def for_text(model: nn.Module) -> dict[str, Parameter]:
    """The parameters by name, without those of a model's parts for images, which text does not run through."""
    named = dict(model.named_parameters())
    if not isinstance(model, PreTrainedModel) or opener(model.config) is AutoModelForCausalLM:
        return named
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name: parameter for name, parameter in named.items() if id(parameter) in inside}


def copy_processor(source: Path, target: Path) -> None:
    """Copy a model folder's files for images into another, if it has any."""
    for name in PROCESSOR:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
