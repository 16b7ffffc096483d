"""What the GPU path does: kernels beside plain torch and flash-kmeans (where installed), a block of 7B shapes, scores.

    python benchmarks/gpu.py [--parts ceilings search layer kmeans block scores] [--model FOLDER] [--output FILE]

Times are milliseconds between two CUDA events, medians after one round to warm up (which compiles the kernels). Those
of single layers are of calls in a CUDA graph, one after the other, over several layers that together are larger than
the cache; "as called" is the time of a call among many from Python. Points are those of benchmarks/kmeans.py: a
synthetic matrix in sub-vectors. Every codebook searched is one that a few rounds have trained, and every search's codes
are compared with plain torch's on a sample of the points. Inertia is that of exact nearest centroids.

`block`: a model of one block of Llama-2-7B's shapes with random weights goes through the command, with the planner's
figures beside those measured; seconds of a stage hold its checkpoint, and on a first run the compiling of its kernels.
`scores`: the model in --model goes through all stages on the GPU and on the CPU. What was measured before and is not
now stays in the file.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from goals import installed, processor
from kmeans import synthetic
from omegaconf import OmegaConf
from torch import nn

from cluscomp.command.compose import CONF
from cluscomp.forms.codebook import CodebookWeight
from cluscomp.forms.linear import CompressedLinear
from cluscomp.kernels import codebook, lloyd_torch
from cluscomp.kernels.codes import pack
from cluscomp.kernels.lloyd import BEST, lloyd
from cluscomp.kernels.lloyd_torch import assign_reference

CLUSTERINGS = ((256, 4), (4096, 4), (65500, 4), (65500, 6), (65500, 9))
LAYERS = ((256, 4), (4096, 4), (65500, 4), (45000, 9))
COPIES = 4  # of a layer, taken in turn: together larger than the cache
BLOCKS = {
    "as the paper": ["experiment=gpu"],
    "clustering by inputs": ["experiment=gpu", "method=cluscomp", "order=[cluster]", "evaluate=none"],
}
SCORES = [
    *(
        "bits=3",
        "order=[cluster,block_finetune,recover]",
        "block_finetune=quick",
        "recover=quick",
        "recover.length=128",
    ),
    *("block_finetune.length=128", "cluster.length=128", "evaluate.context=128", "evaluate.limit=200"),
    *("evaluate.batch_size=8", "recover.tokens=32768"),
]


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def in_a_graph(calls: list[Callable[[], object]], repeats: int) -> float:
    """Milliseconds of one of the calls, which the GPU makes one after the other without waiting for Python."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return milliseconds(graph.replay, repeats) / len(calls)


def of_kernels(calls: list[Callable[[], object]]) -> float:
    """Milliseconds that the GPU works for one of the calls, by the profiler: for what no graph can hold."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            call()
        torch.cuda.synchronize()
    return sum(one.self_device_time_total for one in profile.key_averages()) / 1000 / len(calls)


def as_called(calls: list[Callable[[], object]], repeats: int) -> float:
    """Milliseconds of one of the calls as Python makes them, one after the other."""
    return milliseconds(lambda: [call() for _ in range(8) for call in calls], repeats) / len(calls) / 8


def wrong(codes_N: torch.Tensor, points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> int:
    """How many of 20,000 sampled points have a code whose float64 distance is above that of plain torch's."""
    sample = torch.randperm(len(points_ND), device=points_ND.device)[:20_000]
    x, c = points_ND[sample].double(), centroids_KD.double()
    plain = assign_reference(points_ND[sample], centroids_KD)[0]
    ours, theirs = ((x - c[codes.long()]).square().sum(1) for codes in (codes_N[sample], plain))
    return int((ours > theirs * (1 + 1e-5)).sum())


def inertia(points_ND: torch.Tensor, centroids_KD: torch.Tensor) -> float:
    _, distances_N = lloyd_torch.assign(points_ND, centroids_KD)
    return float(distances_N.double().sum() / (points_ND.double() - points_ND.double().mean()).square().sum())


def ceilings(repeats: int) -> dict[str, float]:
    """What this card reaches: the floor under all times here."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    big, many = torch.randn(2**29, device="cuda"), 1000
    few = torch.ones(8, device="cuda")
    half = big[: 2**28]
    return {
        "product of 8192 x 8192 bfloat16 (TFLOP/s)": 2 * 8192**3 / milliseconds(lambda: a @ b, 4 * repeats) / 1e9,
        "copy, read and written (GB/s)": 2 * big.nbytes / milliseconds(big.clone, 4 * repeats) / 1e6,
        "square, gate, sum, product (GB/s)": 10 * half.nbytes / milliseconds(lambda: elementwise(half), repeats) / 1e6,
        "calls of torch (1/s)": 1e3 * many / milliseconds(lambda: [few + 1 for _ in range(many)], repeats),
    }


def elementwise(x: torch.Tensor) -> torch.Tensor:
    """As cluscomp/plan/calibrate.py counts it: 10 times the bytes of x."""
    squares = x * x
    return (nn.functional.silu(squares) + x) * squares


def clustering(points_ND: torch.Tensor, K: int, options: argparse.Namespace) -> dict[str, float]:
    D, warm = points_ND.shape[1], lloyd(points_ND, K, **BEST | {"iterations": 4})
    c = warm.centroids_KD
    codes, order = warm.codes_N.sort(stable=True)
    sorted_ND = points_ND[order]
    few = points_ND[: max(1, 2**33 // K)]  # brute force is scaled to all points
    recipe: dict[str, Any] = BEST | {"iterations": options.rounds}
    results = {
        "torch, brute force": len(points_ND) / len(few) * milliseconds(lambda: assign_reference(few, c), 1),
        "assign": milliseconds(lambda: lloyd_torch.assign(points_ND, c), options.repeats),
        "assign, wrong of 20,000": wrong(lloyd_torch.assign(points_ND, c)[0], points_ND, c),
        "moments": milliseconds(
            lambda: lloyd_torch._moments(
                sorted_ND, None, torch.searchsorted(codes, torch.arange(K + 1, device=c.device, dtype=torch.int32))
            ),
            options.repeats,
        ),
        "sort and gather": milliseconds(lambda: points_ND[warm.codes_N.sort(stable=True)[1]], options.repeats),
        "kd": milliseconds(lambda: lloyd_torch.kd(points_ND, K, None, 0), options.repeats),
        f"lloyd, {options.rounds} rounds": milliseconds(lambda: lloyd(points_ND, K, **recipe), 1),
        "lloyd, relative inertia": inertia(points_ND, lloyd(points_ND, K, **recipe).centroids_KD),
    }
    if lloyd_torch.runs_triton(points_ND):
        from cluscomp.kernels import lloyd_triton

        _, sure = lloyd_triton.screen(points_ND, c)
        results["screen"] = milliseconds(lambda: lloyd_triton.screen(points_ND, c), options.repeats)
        results["screen, sure (%)"] = 100 * float(sure.float().mean())
        results["all distances"] = milliseconds(lambda: lloyd_triton.by_all(points_ND, c), options.repeats)
        if D <= 9:
            near = lloyd_triton.assign_near(sorted_ND, c, codes)[0]
            results["boxes"] = milliseconds(lambda: lloyd_triton.assign_near(sorted_ND, c, codes), options.repeats)
            results["boxes, wrong of 20,000"] = wrong(near, sorted_ND, c)
    if importlib.util.find_spec("flash_kmeans"):
        results |= flash_kmeans(points_ND, K, options.rounds)
    return results


def flash_kmeans(points_ND: torch.Tensor, K: int, rounds: int) -> dict[str, float]:
    """From random points, as theirs does by itself and as our reference recipe does."""
    from flash_kmeans import batch_kmeans_Euclid

    first = points_ND[torch.randperm(len(points_ND), device=points_ND.device)[:K]]
    reference: dict[str, Any] = {"iterations": rounds, "init": first, "over_relaxation": 1.0, "move_centroids": False}

    def theirs() -> tuple[Any, ...]:
        return batch_kmeans_Euclid(  # type: ignore[no-any-return]
            points_ND[None], n_clusters=K, max_iters=rounds, tol=-1.0, init_centroids=first[None].clone()
        )

    ours = f"lloyd, {rounds} plain rounds from random points"
    results = {
        ours: milliseconds(lambda: lloyd(points_ND, K, **reference), 1),
        f"{ours}, relative inertia": inertia(points_ND, lloyd(points_ND, K, **reference).centroids_KD),
    }
    try:
        results[f"flash-kmeans, {rounds} rounds from the same"] = milliseconds(theirs, 1)
        results["flash-kmeans, relative inertia"] = inertia(points_ND, theirs()[1][0].float())
    except Exception as error:  # another's kernels, which may not take these shapes
        print(f"flash-kmeans, K={K}, D={points_ND.shape[1]}: {str(error).splitlines()[:1]}")
    return results


def search(size: int, K: int, D: int, repeats: int) -> dict[str, float]:
    """The search for the vectors of one input, as choosing codes by error feedback asks for, 4096 times a matrix."""
    points_ND = synthetic(size, D).cuda()
    c = lloyd(points_ND, K, **BEST | {"iterations": 2}).centroids_KD
    few = points_ND[: size // D].contiguous()
    return {
        f"torch, {len(few)} points": milliseconds(lambda: assign_reference(few, c), repeats),
        f"assign, {len(few)} points": milliseconds(lambda: lloyd_torch.assign(few, c), repeats),
        "wrong": wrong(lloyd_torch.assign(few, c)[0], few, c),
    }


def layer(size: int, K: int, D: int, repeats: int) -> dict[str, float]:
    g = torch.Generator(device="cuda").manual_seed(0)
    bits, length = (K - 1).bit_length(), size // D * D
    codes = torch.randint(0, K, (COPIES, size, size // D), generator=g, device="cuda", dtype=torch.int32)
    packed, book = [pack(c.flatten(), bits) for c in codes], torch.randn(K, D, generator=g, device="cuda").bfloat16()
    dense = [codebook.rebuild(book, p, bits, size, length) for p in packed]
    assert torch.equal(dense[1], torch.nn.functional.embedding(codes[1], book).view(size, length))
    grads = [torch.randn(size, length, generator=g, device="cuda").bfloat16() for _ in range(COPIES)]
    one, eight = (torch.randn(n, size, generator=g, device="cuda").bfloat16() for n in (1, 8))
    each = range(COPIES)
    calls: dict[str, list[Callable[[], object]]] = {
        "gather (torch)": [lambda i=i: torch.nn.functional.embedding(codes[i], book) for i in each],
        "decode": [lambda i=i: codebook.rebuild(book, packed[i], bits, size, length) for i in each],
        "dense product, 1 token (torch)": [lambda i=i: one @ dense[i] for i in each],
        "product, 1 token": [lambda i=i: codebook.multiply(one, packed[i], bits, book, length) for i in each],
        "dense product, 8 tokens (torch)": [lambda i=i: eight @ dense[i] for i in each],
        "product, 8 tokens": [lambda i=i: codebook.multiply(eight, packed[i], bits, book, length) for i in each],
        "gradient, index_add_ (torch)": [
            lambda i=i: codebook.gradient_reference(grads[i], packed[i], bits, K, D) for i in each
        ],
        "gradient": [lambda i=i: codebook.gradient(grads[i], packed[i], bits, K, D) for i in each],
    }
    results = {name: in_a_graph(some, repeats) for name, some in calls.items()}
    results |= {f"{name}, as called": as_called(calls[name], repeats) for name in ("decode", "product, 1 token")}
    expected = (one.double() @ dense[0].double())[0]
    found = codebook.multiply(one, packed[0], bits, book, length)[0]
    results["product, 1 token, relative error"] = float((found - expected).norm() / expected.norm())
    exact = torch.zeros(K, D, dtype=torch.float64, device="cuda")
    exact.index_add_(0, codes[0].flatten(), grads[0].double().view(-1, D))
    found = codebook.gradient(grads[0], packed[0], bits, K, D)
    results["gradient, relative error"] = float((found - exact).norm() / exact.norm())
    return results | (training(codes[:1].view(1, -1), book, size, repeats) if length == size else {})


def training(codes_MN: torch.Tensor, book: torch.Tensor, size: int, repeats: int) -> dict[str, float]:
    """A layer in block_finetune, forward and backward, on 2048 tokens, beside a dense one whose weight learns."""
    stored = CodebookWeight.from_codes(
        codes_MN, book[None].float() / 64, out_features=size, in_features=size, axis="out"
    )
    stored.to_masters()
    ours = CompressedLinear(stored, None, torch.bfloat16).cuda()
    dense = nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(2048, size, device="cuda").bfloat16().requires_grad_()
    results = {}
    for name, one in (("dense layer (torch)", dense), ("layer", ours)):
        y = one(x)
        grad = torch.randn_like(y)
        with torch.no_grad():
            results[f"{name}, 2048 tokens, forward"] = in_a_graph([lambda one=one: one(x)] * 2, repeats)
        both = [lambda one=one, grad=grad: torch.autograd.grad(one(x), [x, *one.parameters()], grad)] * 2
        results[f"{name}, 2048 tokens, forward and backward"] = of_kernels(both)
        results[f"{name}, 2048 tokens, forward and backward, as called"] = as_called(both, repeats)
    return results


def record_of(overrides: list[str], cache: Path) -> tuple[dict[str, Any], float]:
    """The record of a fresh run of the command, and the most GPU memory that was taken by its process, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cluscomp", f"outputs={folder}", f"cache={cache}", *overrides]
        free, most = torch.cuda.mem_get_info()[0], 0
        process = subprocess.Popen(command, stdout=sys.stderr)
        while process.poll() is None:
            most = max(most, free - torch.cuda.mem_get_info()[0])
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
        (path,) = Path(folder).glob("run-*/record.json")
        return dict(json.loads(path.read_text())), float(most)


def block(settings: list[str], card: str, cache: Path) -> dict[str, Any]:
    """Stage by stage what was planned for the card and what was measured."""
    known = OmegaConf.load(CONF / "machine" / f"{card}.yaml")
    settings = [*settings, f"machine.tflops={known.tflops}", f"machine.bandwidth={known.bandwidth}"]
    torch.cuda.empty_cache()
    record, most = record_of(settings, cache)
    machine, told = record["machine"], record["machine"]["predicted"]
    found = {name: stage["found"] for name, stage in record["stages"].items()}
    results = {
        "settings": settings,
        "stages": {
            name: {
                "seconds": seconds,
                "seconds, planned": told["seconds"][name],
                "GPU memory, allocated (GiB)": machine["peak_vram"][name] / 2**30,
                "GPU memory, planned (GiB)": told["peak_vram"][name] / 2**30,
                "RAM (GiB)": machine["peak_ram"][name] / 2**30,
                "RAM, planned (GiB)": told["peak_ram"][name] / 2**30,
            }
            for name, seconds in record["run"]["seconds"].items()
        },
        "GPU memory of the process (GiB)": most / 2**30,
        "relative error of weights": found["cluster"]["relative_error"],
        "perplexity": {one["after"]: one["value"] for one in record["scores"] if one["metric"] == "perplexity"},
        "bytes": record["size"]["checkpoint_bytes"],
        "bytes, planned": told["checkpoint_bytes"],
    }
    if "block_finetune" in found:
        trained = found["block_finetune"]["blocks"][0]
        results["block_finetune"] = {key: trained[key] for key in ("before", "after", "attempts")}
    if "recover" in found:
        results["recover"] = {key: found["recover"][key] for key in ("held_out_before", "held_out_after", "steps")}
    return results


def scores(model: Path, more: list[str], cache: Path) -> dict[str, Any]:
    """Perplexity after each stage on the GPU and on the CPU, which work side by side."""
    given = [*SCORES, "model=hub", f"model.id={model}", *more]
    places = (("cuda", "float32"), ("cpu", "float32"), ("cuda", "bfloat16"), ("cpu", "bfloat16"))
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(record_of, [*given, f"device={d}", f"dtype={t}"], cache) for d, t in places]
        records = [run.result()[0] for run in runs]
    return {
        ", ".join(place): {
            "perplexity": {one["after"]: one["value"] for one in record["scores"] if one["metric"] == "perplexity"},
            "relative error of weights": record["stages"]["cluster"]["found"]["relative_error"],
        }
        for place, record in zip(places, records)
    }


def show(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in rows.items():
        shown = f"{value:12.5g}" if isinstance(value, float | int) else json.dumps(value)
        print(f"  {name:52s} {shown}", flush=True)


def main() -> None:
    parts = ("ceilings", "search", "layer", "kmeans", "block", "scores")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--size", type=int, default=4096, help="side of the synthetic matrix")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20, help="of K-means")
    parser.add_argument("--model", type=Path, help="a model folder, for scores")
    parser.add_argument("--card", default="h100", help="of conf/machine, which the block is planned for")
    parser.add_argument("--override", nargs="*", default=[], help="settings of the runs that are not as written here")
    parser.add_argument("--output", type=Path, default=Path("results/bench/gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: there is no CUDA device here; nothing was measured")
        return
    report: dict[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    began = datetime.now(UTC).isoformat(timespec="seconds")
    device = {"device": torch.cuda.get_device_name(), "processor": processor(), "began": began}
    device |= {name: found for name in ("torch", "triton", "flash-kmeans") if (found := installed(name)) is not None}

    def keep(part: str, rows: dict[str, Any]) -> None:
        for title, some in rows.items():
            show(title, some)
            report.setdefault(part, {})[title] = some | {"measured": device}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")

    print(device)
    if "ceilings" in options.parts:
        keep("ceilings", {"this card": ceilings(options.repeats)})
    if "search" in options.parts:
        for K, D in LAYERS:
            name = f"{options.size}x{options.size}, D={D}, K={K}: ms"
            keep("search", {name: search(options.size, K, D, options.repeats)})
    if "layer" in options.parts:
        for K, D in LAYERS:
            name = f"{options.size}x{options.size}, D={D}, K={K}: ms"
            keep("layer", {name: layer(options.size, K, D, 4 * options.repeats)})
    if "kmeans" in options.parts:
        for K, D in CLUSTERINGS:
            name = f"{options.size}x{options.size}, D={D}, K={K}: ms"
            keep("kmeans", {name: clustering(synthetic(options.size, D).cuda(), K, options)})
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        for name, settings in BLOCKS.items() if "block" in options.parts else ():
            found = block([*settings, *options.override], options.card, cache)
            keep("block", {f"one block of Llama-2-7B's shapes, {name}": found})
            for stage, row in found["stages"].items():
                print(f"  {stage:24s} " + "  ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)
        if "scores" in options.parts and options.model is not None:
            keep("scores", scores(options.model, options.override, cache))


if __name__ == "__main__":
    main()
