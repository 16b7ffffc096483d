"""Our checkpoints as a model of lm-evaluation-harness: `cluscomp lm_eval --model cluscomp ...`.

lm-eval looks for models in its registry alone, so this module has to be imported before: its own command cannot know.
"""

import inspect
from typing import Any

import torch
from lm_eval import models  # noqa: F401 (which fills the registry only while that is empty)
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from cluscomp import checkpoint
from cluscomp.errors import InputError

OF_TOKENIZER = {  # lm-eval's arguments for it, by what transformers calls them
    "add_bos_token": "add_bos_token", "use_fast_tokenizer": "use_fast", "trust_remote_code": "trust_remote_code",
}  # fmt: skip
WITHOUT_EFFECT = (  # arguments of lm-eval's `hf` that it reads only where it loads the model itself
    "revision", "subfolder", "gguf_file", "peft", "delta", "autogptq", "gptqmodel", "parallelize", "tp_plan",
    "max_memory_per_gpu", "max_cpu_memory", "offload_folder",
)  # fmt: skip


@register_model(checkpoint.NAME)
class Checkpoint(HFLM):  # type: ignore[misc]
    """lm-eval's model of transformers over a folder that cluscomp or `save_pretrained` wrote, checked as `load` does.

    It takes what lm-eval's `hf` takes, but for what says how to load a model of another kind. `dtype` "auto" is the one
    that the checkpoint was measured in.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        **more: Any,
    ) -> None:
        """Raises InputError for a folder that is damaged or none of ours, a dtype that torch does not know, and an
        argument that would have no effect.
        """
        _check_effect(more)
        kind = None if dtype == "auto" else getattr(torch, dtype, None)
        if dtype != "auto" and not isinstance(kind, torch.dtype):
            raise InputError(f"dtype={dtype}: auto, float32, bfloat16 or float16")
        model = checkpoint.load(
            pretrained, kind, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        )
        said = {name: more[key] for key, name in OF_TOKENIZER.items() if more.get(key) is not None}
        read = AutoTokenizer.from_pretrained(tokenizer or pretrained, **said)
        super().__init__(pretrained=model, tokenizer=read, **more)


def _check_effect(more: dict[str, Any]) -> None:
    """Raise InputError for the first argument that lm-eval would pass over; one with its default does no harm."""
    known = inspect.signature(HFLM.__init__).parameters
    for key, value in more.items():
        default = known[key].default if key in known else None
        if (key in WITHOUT_EFFECT or key not in known) and value != default:
            raise InputError(f"{key}={value}: has no effect on a checkpoint of cluscomp; leave it out")
