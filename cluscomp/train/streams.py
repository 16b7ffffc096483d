"""Streams: the hidden states of all windows where they enter a block, in memory or in mapped files."""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from jaxtyping import Float
from torch import Tensor

log = logging.getLogger(__name__)
Where = Literal["memory", "disk"]


class Streams:
    """The streams (W, T, H) of a stage by name and by the block they enter, and their files in the stage's folder.

    In "memory" they are on `device` and written to their files by `save`; on "disk" they are their files, mapped, of
    which the system keeps in memory what it has room for. The numbers are the same, bit by bit.
    """

    def __init__(
        self, folder: Path, where: Where, shape_WTH: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.folder, self.where, self.shape_WTH, self.dtype, self.device = folder, where, shape_WTH, dtype, device
        self._bytes = torch.Size(shape_WTH).numel() * dtype.itemsize

    def new(self, name: str, index: int) -> Float[Tensor, "W T H"]:
        """A stream (W, T, H) with undefined content, to be filled. Raises OSError if the disk is full."""
        if self.where == "memory":
            return torch.empty(self.shape_WTH, dtype=self.dtype, device=self.device)
        path = self._path(name, index)
        with path.open("wb") as file:
            _reserve(file, self._bytes)
        return self._mapped(path)

    def save(self, index: int, streams: dict[str, Float[Tensor, "W T H"]]) -> dict[str, str]:
        """Leave each stream, (W, T, H), in its file; returns their SHA-256 by name. Raises OSError if that fails."""
        hashes = {}
        for name, stream_WTH in streams.items():
            if self.where == "memory":
                with self._path(name, index).open("wb") as file:
                    hashes[name] = _hash(stream_WTH, file)
            else:
                hashes[name] = _hash(stream_WTH)
        return hashes

    def load(
        self, index: int, hashes: dict[str, str], folder: Path | None = None
    ) -> dict[str, Float[Tensor, "W T H"]] | None:
        """What `save` left here or in another folder, each (W, T, H).

        None, with a line in the log, if a file is missing, cut or altered.
        """
        streams = {}
        for name, expected in hashes.items():
            path = (folder or self.folder) / self._path(name, index).name
            if not path.is_file() or path.stat().st_size != self._bytes:
                log.warning("%s is missing or cut", path)
                return None
            mapped_WTH = self._mapped(path)
            if _hash(mapped_WTH) != expected:
                log.warning("%s is damaged (its hash is wrong)", path)
                return None
            streams[name] = mapped_WTH if self.where == "disk" else mapped_WTH.to(self.device, copy=True)
        return streams

    def drop(self, but: int) -> None:
        """Remove the files of all blocks but this one."""
        for path in self.folder.glob("*.stream"):
            if not path.name.endswith(f"-{but:03}.stream"):
                path.unlink()

    def _path(self, name: str, index: int) -> Path:
        return self.folder / f"{name}-{index:03}.stream"

    def _mapped(self, path: Path) -> Tensor:
        count = torch.Size(self.shape_WTH).numel()
        return torch.from_file(str(path), shared=True, size=count, dtype=self.dtype).view(self.shape_WTH)


def _reserve(file: BinaryIO, size: int) -> None:
    """Make a file this long and take the space now: a full disk met by a mapped page would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _content(stream_WTH: Tensor) -> Iterator[memoryview]:
    """The bytes of a stream, window by window."""
    for window_TH in stream_WTH:
        yield window_TH.contiguous().cpu().flatten().view(torch.uint8).numpy().data


def _hash(stream_WTH: Tensor, file: BinaryIO | None = None) -> str:
    """The SHA-256 of a stream's bytes, which go into the file, too, if there is one."""
    digest = hashlib.sha256()
    for content in _content(stream_WTH):
        digest.update(content)
        if file is not None:
            file.write(content)
    return digest.hexdigest()
