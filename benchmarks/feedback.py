"""The search for codes with error feedback: compiled rounds beside the same rounds in plain torch, in one run.

    python benchmarks/feedback.py [--threads 1] [--output FILE]

Seconds of CPU for a whole matrix, synthetic, with D = 4 and K = 4096; both give the same codes and errors, bit for bit.
What both have in common (the inverse's factor, the products with the inputs to come) is left out.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from cluscomp.kernels.feedback import Feedback
from cluscomp.kernels.lloyd import lloyd
from cluscomp.solve.along_outputs import BATCH

D, K = 4, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/bench/feedback.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for inputs, outputs in ((576, 1536), (4096, 4096)):
        generator = torch.Generator().manual_seed(0)
        weight_IO = torch.randn(inputs, outputs, generator=generator)
        factor_BB = torch.eye(BATCH) + 0.1 * torch.randn(BATCH, BATCH, generator=generator)
        centroids_KD = lloyd(weight_IO.view(-1, D), K, iterations=2).centroids_KD
        compiled, plain = Feedback(centroids_KD, outputs), Feedback(centroids_KD, outputs)
        plain._index = None
        seconds, found = {}, {}
        for name, search in (("torch", plain), ("compiled", compiled)):
            start = time.process_time()
            found[name] = [search.choose(part.clone(), factor_BB) for part in weight_IO.split(BATCH)]
            seconds[name] = time.process_time() - start
        same = all(torch.equal(a, b) for pair in zip(*found.values()) for a, b in zip(*pair))
        results[f"{inputs}x{outputs}"] = seconds | {"ratio": seconds["torch"] / seconds["compiled"], "same": same}
        print(f"{inputs}x{outputs}", {name: round(value, 3) for name, value in results[f"{inputs}x{outputs}"].items()})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"torch": torch.__version__, "threads": options.threads, "results": results}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
