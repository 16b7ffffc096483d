"""A compressed model in parts on the processes of a run: its codes, by PyTorch's FSDP2; all that learns is whole."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from cluscomp import ranks
from cluscomp.forms.linear import compressed, in_parts
from cluscomp.models.opened import Opened
from cluscomp.models.original import block_names, blocks
from cluscomp.process import give_memory_back


@contextmanager
def sharded(model: PreTrainedModel, opened: Opened | None) -> Iterator[None]:
    """Hold the blocks of a model, which lie in a file, in memory: of their codes each process a part.

    A block's codes are gathered when it runs, forward and backward, and dropped again. So all processes have to run the
    model equally often. Numbers that may learn, and small tensors, are whole on each. In the end the first process has
    all codes again, in RAM. Without a file (`opened` is None) all is in memory already.
    """
    if opened is None:
        yield
        return
    names = block_names(model)
    for index, block in enumerate(blocks(model)):
        opened.load_block(model, index)
        if ranks.world() > 1:
            _shard(block, init_device_mesh(model.device.type, (ranks.world(),)))
            give_memory_back()
    yield
    if ranks.world() == 1 or ranks.rank() > 0:
        return
    places = {}
    for name, block in zip(names, blocks(model)):
        for layer, one in compressed(block).items():
            for inside, module in one.stored.named_modules():
                for key in getattr(module, "parametrizations", ()):
                    full = ".".join(part for part in (name, layer, "stored", inside, key) if part)
                    places[full] = module, key
    for full, codes in opened.stored([*places]):
        module, key = places[full]
        parametrize.remove_parametrizations(module, key, leave_parametrized=False)
        del module._parameters[key]
        module.register_buffer(key, codes)


def _shard(block: nn.Module, mesh: DeviceMesh) -> None:
    """Let FSDP2, which knows parameters alone and cuts their first dimension, have codes as rows of whole numbers."""
    whole = set(block.parameters())
    for module, key, codes in in_parts(block):
        del module._buffers[key]
        module.register_parameter(key, nn.Parameter(codes.flatten(), requires_grad=False))
        parametrize.register_parametrization(module, key, _Shaped(codes.shape), unsafe=True)
    fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


@contextmanager
def gathered(model: PreTrainedModel, layer: str) -> Iterator[None]:
    """All codes of the block with a layer on every process, for the length of the `with` block."""
    name = next(name for name in block_names(model) if layer.startswith(f"{name}."))
    block = model.get_submodule(name)
    if not isinstance(block, FSDPModule):
        yield
        return
    block.unshard()
    yield
    block.reshard()


class _Shaped(nn.Module):
    """Codes as they are used, made of a row of them; of a part of the row their shape alone, on the meta device."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, row: Tensor) -> Tensor:
        if isinstance(row, DTensor):
            return torch.empty(self.shape, dtype=row.dtype, device="meta")
        codes = row.view(self.shape)
        return codes.clone() if row.device.type == "cpu" else codes  # numpy, which kernels use, would keep it in memory
