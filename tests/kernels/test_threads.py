"""The compiled kernels where the machine starts fewer threads than were asked for."""

import subprocess
import sys

import pytest

from cluscomp.kernels.loading import native

LIMITED = """
import resource
import torch
from cluscomp.kernels.lloyd import assign
points, centroids = torch.randn(200_000, 4), torch.randn(64, 4)
expected = assign(points, centroids, threads=1)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)  # room for the stacks of some fifty threads
found = assign(points, centroids, threads=256)
assert all(torch.equal(one, other) for one, other in zip(expected, found))
print("the same")
"""


@pytest.mark.skipif(native is None, reason="the compiled kernels are not built")
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_where_no_more_threads_can_be_started_those_that_were_do_it_all():
    found = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert found.stdout == "the same\n", found.stderr
