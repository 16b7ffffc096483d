"""Shared ground: one thread, no network, shapes checked while most tests run, tiny models of seven families."""

import gc
import os
import random
import signal
import zlib
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # no products of bfloat16: dtype=auto is float32 on every processor
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import jaxtyping
import pytest
import torch
from forks import servers

gc.disable()  # until all is imported: what stays for good need not be looked through again and again
if not torch.cuda.is_available():  # before anything imports Triton: its kernels then run on the CPU, for the tests
    os.environ["TRITON_INTERPRET"] = "1"

# Ctrl-C works in every test and in what it starts, even when the suite was started in the background (`make test &`).
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, so that a red run is red again; `pytest --hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("search", print_blob=True)
hypothesis.settings.load_profile("same")

CHECKED = ["kernels.codes", "solve.kmeans", "forms.codebook", "models.walk", "score.perplexity"]
jaxtyping.install_import_hook([f"cluscomp.{name}" for name in CHECKED], "beartype.beartype")

# Tests that run whole commands and trainings: they call what others have checked, many thousand times.
UNCHECKED = ("command", "methods/test_methods.py", "plan", "report", "runs", "stages")

TOKENS = 12  # of a test window: longer than the sliding windows below
ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": ROPE,
    "mistral": ROPE | {"sliding_window": 5},
    "qwen3": ROPE,
    "gemma2": ROPE | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma3_text": ROPE
    | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "phi": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
}
COMMON = {"num_hidden_layers": 3, "max_position_embeddings": 64, "initializer_range": 0.2}


def redraw_vectors(folder, seed=0):
    """Give norms and biases random values: as initialised (ones, zeros) a lost one would go unnoticed."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})


def pytest_collection_modifyitems(items):
    """Files with slow tests first: with several processes, none is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """All modules are imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _checked(request):
    """Whether shapes are checked in this file's tests."""
    place = request.path.relative_to(Path(__file__).parent).as_posix()
    jaxtyping.config.update("jaxtyping_disable", place.startswith(UNCHECKED))
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Builder of model folders: families("phi") or families("gpt2", n_embd=32); made once for equal arguments."""
    from cluscomp.models.sources import TinyModel

    cache, made = tmp_path_factory.mktemp("models"), {}

    def build(name, **config):
        values = COMMON | FAMILIES.get(name, {}) | config
        key = name, repr(sorted(values.items()))
        if key not in made:
            made[key] = TinyModel(architecture=name, config=values, seed=zlib.crc32(repr(key).encode())).folder(cache)
            redraw_vectors(made[key])
        return made[key]

    return build


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, families):
    """A model folder of each family in turn. Read it only."""
    return families(request.param)


@pytest.fixture(scope="session")
def tiny_folder(families):
    """The folder of a small Llama with tied embeddings. Read it only."""
    return families("llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of numbered paragraphs."""
    from cluscomp.data.files import FileText

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {i} says that {i * i} is the square of {i}." for i in range(100)))
    return FileText(name="text", file=str(path), test_file=None)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A module's own folder, with a text that is the same on every machine."""
    folder = tmp_path_factory.mktemp("ground")
    make = random.Random(0)
    words = ["".join(make.choices("abcdefghijklmnopqrstuvwxyz", k=make.randint(2, 9))) for _ in range(50)]
    (folder / "text.txt").write_text("\n\n".join(" ".join(make.choices(words, k=20)) for _ in range(100)))
    return folder


@pytest.fixture(scope="session")
def both_servers():
    with servers() as found:
        yield found


@pytest.fixture(scope="session")
def forks(both_servers):
    """Processes of the command without its start-up, which have made a run already."""
    return both_servers[0]


@pytest.fixture(scope="session")
def without_ours(both_servers):
    """Processes that have torch and transformers, and nothing of ours."""
    return both_servers[1]


@pytest.fixture
def ids():
    """Two windows of token ids, as all tiny models take them."""
    import torch

    return torch.randint(1, 257, (2, TOKENS), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def shared():
    """The folder of the test material that lies beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("the test material (../shared/data) is not beside the repository")
    return folder


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory):
    """A real, tiny GGUF file: a Llama of one block, 32 wide, and six tokens. Read it only."""
    from gguf_files import llama

    return llama(tmp_path_factory.mktemp("gguf") / "small.gguf")
