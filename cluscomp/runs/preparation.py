"""What a run finds out before it works: its device and dtype, and what it will need."""

import logging
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from cluscomp.checkpoint import NAME
from cluscomp.errors import InputError
from cluscomp.models.original import quantizer
from cluscomp.plan.calibrate import slowdown
from cluscomp.plan.plan import Plan, plan
from cluscomp.process import local_rank
from cluscomp.runs.experiment import Experiment

log = logging.getLogger("cluscomp")

SLOW = 3.0  # times as long as in another type: worth a warning, or that type


def device_of(name: str) -> torch.device:
    """The device all models compute on. Raises InputError for one that is not here."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: this machine has no usable GPU; device=cpu or device=auto works")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda")


def dtype_of(experiment: Experiment) -> torch.dtype:
    """The dtype all models compute in; it is part of all keys and protocols.

    "auto" is bfloat16 on a GPU, and on a processor that takes `SLOW` times as long in float32, which is measured: one
    with units for bfloat16's products (AMX) does. Elsewhere it is float32: AVX512_BF16 is twice as fast in bfloat16,
    but perplexity moves by 0.1 % and more.
    """
    if experiment.dtype != "auto":
        return getattr(torch, experiment.dtype)  # type: ignore[no-any-return]
    if device_of(experiment.device).type == "cuda" or _slowdown(torch.bfloat16) < 1 / SLOW:
        return torch.bfloat16
    return torch.float32


def known_config(experiment: Experiment, cache: Path) -> PreTrainedConfig | None:
    """The model's config; None, with a line in the log, where nothing is known of it before it is fetched."""
    try:
        config: PreTrainedConfig = experiment.model.read_config(cache)
        return config
    except InputError as error:
        log.info("no plan yet: %s", error)
        return None


def foreseen(experiment: Experiment, config: PreTrainedConfig) -> Plan | None:
    """The plan of a run on this machine, in the log; None, with a line, for a model of which too little is known.

    Raises InputError if a stage does not fit, unless `force`, and for what cannot be planned.
    """
    device = device_of(experiment.device)
    products = _slower_products(experiment, device.type)
    if experiment.scores_only and quantizer(config) not in (None, NAME):
        log.info("no plan: what layers of '%s' take is not known", quantizer(config))
        return None
    found = plan(experiment, config, dtype_of(experiment), device.type, products)
    log.info("%s", found.table())
    if not experiment.force:
        found.refuse()
    return found


def planned(experiment: Experiment) -> Plan:
    """The plan of a run for its machine; reads nothing but the model's config. Raises InputError without one."""
    products = 1.0
    if experiment.machine.here:
        device, dtype = device_of(experiment.device).type, dtype_of(experiment)
        products = _slower_products(experiment, device)
    else:
        device = "cuda" if experiment.device == "auto" else experiment.device
        dtype = torch.bfloat16 if experiment.dtype == "auto" else getattr(torch, experiment.dtype)
    config = experiment.model.read_config(Path(experiment.cache).expanduser())
    return plan(experiment, config, dtype, device, products)


def _slower_products(experiment: Experiment, device: str) -> float:
    """How many times as long as in float32 this processor takes for products in the run's type.

    Warns of a large factor: processors without instructions for 16-bit numbers compute in them all the same, but take
    hours for minutes.
    """
    if device != "cpu" or dtype_of(experiment) == torch.float32:
        return 1.0
    factor = _slowdown(dtype_of(experiment))
    if factor > SLOW:
        log.warning(
            "dtype=%s: this processor takes about %.0f times as long as in float32; "
            "dtype=float32 is faster here (its scores stand under a protocol of their own)",
            experiment.dtype,
            factor,
        )
    return factor


_slowdown = cache(slowdown)
