"""What a run was made with: the commit of the code, and the versions of what it stands on."""

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

from cluscomp import __version__


def versions() -> dict[str, str]:
    """Versions of what has a say in the numbers."""
    packages = ("torch", "transformers", "safetensors", "datasets", "numpy")
    return {"cluscomp": __version__, "python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def commit() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether it differs from it; None where there is no git checkout."""
    if shutil.which("git") is None:
        return None, None

    def ask(*words: str) -> str:
        place = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=place, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain"))
    except subprocess.CalledProcessError:
        return None, None
