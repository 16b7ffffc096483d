"""Tasks that ask about images, and the model's processor that makes its inputs of these."""

from pathlib import Path
from typing import Any

from cluscomp.errors import InputError


def sees(task: Any) -> bool:
    """Whether a task of lm-eval asks about images."""
    return getattr(task.config, "doc_to_image", None) is not None


def hashed(rows: list[Any]) -> list[Any]:
    """Lists of a task's rows with the hash of each image in its place."""
    from lm_eval.utils import hash_dict_images

    return list(hash_dict_images({"rows": rows})["rows"])


def check_processor(folder: Path) -> None:
    """Raise InputError unless a model's folder has what makes inputs of images, and that can be used here."""
    from transformers import AutoProcessor, ProcessorMixin

    try:
        found = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a processor class makes of files and packages that are not there
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"tasks.names: asks about images, but the processor of {folder} fails: {reason}") from error
    if not isinstance(found, ProcessorMixin):
        raise InputError(f"tasks.names: asks about images, but the model of {folder} sees none; give tasks of text")
