"""A model that is already quantised: to be scored as it is.

By us, by another quantizer that transformers knows, by any library that wrote the dense weights its numbers stand for
and beside them what these really take (`Stated`), or by what wrote a GGUF file (`OfGguf`).
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from cluscomp import checkpoint
from cluscomp.errors import InputError
from cluscomp.forms.apart import take_apart
from cluscomp.forms.layers import in_file, size_of
from cluscomp.forms.linear import unique_tensors
from cluscomp.forms.multimodal import opener
from cluscomp.models.files import weight_files
from cluscomp.models.gguf_file import COUNTED, matrices_in
from cluscomp.models.original import Original, block_names, blocks, linears, quantizer, without_numbers
from cluscomp.models.sources import read_config
from cluscomp.settings import settings
from cluscomp.store.tensor_files import tensor_bytes, weight_bytes

STATED = "stored_bits.json"


@settings
class Stated:
    """What the file stored_bits.json in a folder of dense weights says of the quantised ones these stand for.

    `method` and `library` are words for the record; `original` is the model as tables name it, beside whose other
    methods this one is to stand (an id of the hub, a GGUF file's name; null: it stands alone). `calibration` names what
    the method learned from: a text's domain (wikitext, c4), or any other words (null: unknown). `ledger` holds the bits
    that the matrices inside the blocks take, all together and by part (codes, scales, zeros, codebooks, ...), those
    that stayed in 16 bits too.
    """

    method: str = Field(min_length=1)
    library: str = Field(min_length=1)
    ledger: dict[str, int] = Field(min_length=1)
    original: str | None = None
    calibration: str | None = None


class Dequantised(Original):
    """A folder of dense weights that another library's numbers stand for, which says itself what those take."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Raises InputError as `Original`, and for a stored_bits.json that cannot be right."""
        super().__init__(folder, dtype, device)
        try:
            self._stated = TypeAdapter(Stated).validate_json((folder / STATED).read_bytes())
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, wrong["loc"])) or "the file"
            raise InputError(f"{folder / STATED}: {place}: {wrong['msg']}") from error
        bits, weights = sum(self._stated.ledger.values()), sum(self._matrices.values())
        if not 0 < bits <= 16 * weights:
            raise InputError(
                f"{folder / STATED}: {bits} bits in all for {weights} weights inside the blocks; "
                "more than 0 and at most 16 each can be"
            )

    @cached_property
    def _matrices(self) -> dict[str, int]:
        return matrices(dense_outline(self.config))

    def size(self) -> dict[str, Any]:
        """Bits per weight and bytes as stated, with 16 bits for each number outside of the matrices."""
        numbers = sum(tensor.numel() for tensor in unique_tensors(dense_outline(self.config)).values())
        inside, bits = sum(self._matrices.values()), sum(self._stated.ledger.values())
        in_all = bits + 16 * (numbers - inside)
        return {
            "paper_bits_per_weight": bits / inside,
            "linear_bits_per_weight": bits / inside,
            "model_bits_per_weight": in_all / numbers,
            "checkpoint_bytes": -(-in_all // 8),
            "stated": asdict(self._stated),
        }

    def external(self) -> dict[str, Any]:
        """What the folder states."""
        return asdict(self._stated)


class OfGguf(Original):
    """A folder of the dense weights that the numbers of a quantised GGUF file stand for, with the bits of that file."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, of: str | None, calibration: str | None):
        """Open it, with what is said of it beside the file.

        Args:
            folder: the model's.
            dtype: to compute in.
            device: to compute on.
            of: the model, as tables name it, beside whose methods this one is to stand; None: its own name.
            calibration: what its importance matrix was made on; None: what the file says.

        Raises InputError as `Original`, and for a file without a tensor for each linear layer.
        """
        super().__init__(folder, dtype, device)
        self.of, self.calibration = of, calibration
        self._file = json.loads((folder / COUNTED).read_text())
        self._inside = matrices_in(self._file, list(matrices(dense_outline(self.config))))

    def size(self) -> dict[str, Any]:
        """Bits per weight of the matrices inside the blocks and of all tensors, and the bytes of all tensors."""
        inside, all_ = list(self._inside.values()), list(self._file["tensors"].values())
        per_weight = _total(inside, "bits") / _total(inside, "weights")
        return {
            "paper_bits_per_weight": per_weight,
            "linear_bits_per_weight": per_weight,
            "model_bits_per_weight": _total(all_, "bits") / _total(all_, "weights"),
            "checkpoint_bytes": -(-_total(all_, "bits") // 8),
        }

    def external(self) -> dict[str, Any]:
        """What the file holds: bits and matrices inside the blocks by type, bits of other tensors, its own words.

        `calibration` is what was given, or the name of the importance matrix's text in the file; None: unknown.
        """
        inside = {id(tensor) for tensor in self._inside.values()}
        others = [tensor for tensor in self._file["tensors"].values() if id(tensor) not in inside]
        by_type = Counter(tensor["type"] for tensor in self._inside.values())
        importance = self._file["made"]["importance_matrix"]
        return {
            "method": self._file["made"]["mix"],
            "library": "GGUF",
            "ledger": _bits_by_type(self._inside.values()),
            "original": self.of,
            "calibration": self.calibration or (importance or {}).get("dataset"),
            "matrices": dict(by_type.most_common()),
            "outside": _bits_by_type(others),
            "importance_matrix": importance,
            "file": self._file["file"],
        }


def _total(tensors: Iterable[dict[str, Any]], key: str) -> int:
    return sum(tensor[key] for tensor in tensors)


def _bits_by_type(tensors: Iterable[dict[str, Any]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for tensor in tensors:
        found[tensor["type"]] += tensor["bits"]
    return dict(found.most_common())


class Quantised(Original):
    """A quantised model in its folder. It is loaded once and held as it is stored, all blocks of it."""

    def _check_config(self) -> None:
        """Any config will do."""

    def _check_ties(self) -> None:
        """Nothing: transformers, which loads it, does."""

    def model(self) -> PreTrainedModel:
        """The whole model. Raises InputError if a package or a tensor is missing, or transformers cannot load it."""
        return self._loaded

    def load_all(self) -> PreTrainedModel:
        """The whole model, as `model`."""
        return self._loaded

    def load_block(self, model: PreTrainedModel, index: int) -> None:
        """Nothing: all blocks are in memory."""

    @contextmanager
    def block(self, model: PreTrainedModel, index: int) -> Iterator[nn.Module]:
        """Block `index`, which stays in memory."""
        yield blocks(model)[index]

    def size(self) -> dict[str, Any]:
        """Bits per weight and bytes of the weights, ours by the ledger, others by the tensors of their files."""
        if quantizer(self.config) == checkpoint.NAME:
            size = in_file(size_of(self.model()), tensor_bytes(self.folder))
            return asdict(size) | {"checkpoint_bytes": weight_bytes(self.folder)}
        return self._counted() | {"checkpoint_bytes": sum(path.stat().st_size for path in weight_files(self.folder))}

    @cached_property
    def _loaded(self) -> PreTrainedModel:
        if quantizer(self.config) == checkpoint.NAME:
            return checkpoint.load(self.folder, self.dtype, self.device)
        kwargs = {} if self.device.type == "cpu" else {"device_map": {"": self.device}}
        try:
            if not AutoHfQuantizer.supports_quant_method(self.config.quantization_config):
                raise ValueError("it knows no such quantizer")  # and would take the model for a dense one
            loaded: Any = opener(self.config).from_pretrained(
                self.folder, dtype=self.dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False,
                **kwargs,
            )  # fmt: skip
        except (ImportError, ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{self.folder}: a model of quantizer '{quantizer(self.config)}', which transformers cannot load: "
                f"{reason}"
            ) from error
        model, info = loaded
        if info["missing_keys"]:  # transformers has filled them with random numbers
            raise InputError(f"{self.folder}: no tensor {sorted(info['missing_keys'])[0]} and others")
        return model.eval().requires_grad_(False)  # type: ignore[no-any-return]

    def _counted(self) -> dict[str, float]:
        """Bits of the tensors under each linear layer's name over its weights; of the whole file where one has none.

        Biases are no part of the matrices, all else under their names is.
        """
        config = copy(self.config)
        del config.quantization_config
        dense = dense_outline(config)
        weights = matrices(dense)
        stored = dict.fromkeys(weights, 0)
        for name, bits in self._stored_bits().items():
            layer = next((part for part in _parents(name) if part in stored), None)
            if layer is not None and name != f"{layer}.bias":
                stored[layer] += bits
        numbers = sum(tensor.numel() for tensor in unique_tensors(dense).values())
        of_file = sum(self._stored_bits().values()) / numbers
        of_linears = sum(stored.values()) / sum(weights.values()) if weights and all(stored.values()) else of_file
        return {
            "paper_bits_per_weight": of_linears,
            "linear_bits_per_weight": of_linears,
            "model_bits_per_weight": of_file,
        }

    def _stored_bits(self) -> dict[str, int]:
        """Bits of every tensor of the folder's files by name, from their headers."""
        found: dict[str, int] = {}
        for path in weight_files(self.folder):
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    first, end = tensor["data_offsets"]
                    found[name] = 8 * (end - first)
        return found


def _parents(name: str) -> Iterator[str]:
    """The names of the modules a tensor is in, innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def dense_outline(config: PreTrainedConfig) -> PreTrainedModel:
    """The dense model of a config, on the meta device."""
    model = without_numbers(config)
    take_apart(model)
    model.tie_weights()
    return model


def matrices(dense: PreTrainedModel) -> dict[str, int]:
    """The number of weights of each matrix inside the blocks of a dense model, by layer name."""
    return {
        f"{name}.{layer}": linear.out_features * linear.in_features
        for name, block in zip(block_names(dense), blocks(dense))
        for layer, linear in linears(block).items()
    }


def opened(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    to_score: bool,
    of: str | None = None,
    calibration: str | None = None,
) -> Original:
    """The model of a folder; one that is quantised only `to_score`. Raises InputError if it cannot be used.

    What is said `of` a GGUF file and its `calibration` is for its record, as `OfGguf` has it.
    """
    if (folder / STATED).is_file():
        if not to_score:
            raise InputError(f"{folder}: by its {STATED} it is quantised already; it can be scored, order=[evaluate]")
        return Dequantised(folder, dtype, device)
    if (folder / COUNTED).is_file():
        if not to_score:
            raise InputError(f"{folder}: by its {COUNTED} it is quantised already; it can be scored, order=[evaluate]")
        return OfGguf(folder, dtype, device, of, calibration)
    kind = Quantised if to_score and quantizer(read_config(folder)) is not None else Original
    return kind(folder, dtype, device)
