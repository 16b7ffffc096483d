"""Our checkpoints as a model of lm-evaluation-harness: `cluscomp lm_eval --model cluscomp ...`.

lm-eval looks for models in its registry alone, so this module has to be imported before: its own command cannot know.
"""

from typing import Any

import torch
from lm_eval import models  # noqa: F401 (which fills the registry only while that is empty)
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from cluscomp import checkpoint
from cluscomp.errors import InputError


@register_model(checkpoint.NAME)
class Checkpoint(HFLM):  # type: ignore[misc]
    """lm-eval's model of transformers over a folder that cluscomp or `save_pretrained` wrote, checked as `load` does.

    It takes what lm-eval's `hf` takes; `dtype` "auto" is the one the checkpoint was measured in.
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
        """Raises InputError for a folder that is damaged or none of ours, and for a dtype that torch does not know."""
        kind = None if dtype == "auto" else getattr(torch, dtype, None)
        if dtype != "auto" and not isinstance(kind, torch.dtype):
            raise InputError(f"dtype={dtype}: auto, float32, bfloat16 or float16")
        model = checkpoint.load(
            pretrained, kind, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        )
        bos = {key: more[key] for key in ("add_bos_token",) if more.get(key) is not None}
        read = AutoTokenizer.from_pretrained(tokenizer or pretrained, **bos)
        super().__init__(pretrained=model, tokenizer=read, **more)
