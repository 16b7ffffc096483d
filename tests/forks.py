"""Real processes of the command, forked from one that has imported and planned all there is: it saves seconds each."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

OTHERS = """
import json, os, sys
import hydra, lm_eval, pydantic, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
"""
OURS = """
import cluscomp.checkpoint, cluscomp.train.whole, cluscomp.score.perplexity, cluscomp.train.streams
import cluscomp.report.tables
from contextlib import suppress
with suppress(ImportError):
    import wandb.cli.cli
from cluscomp.__main__ import main
from cluscomp.command.compose import composed
from cluscomp.runs.preparation import planned

planned(composed(["bits=3", "model=tiny", "order=[cluster,block_finetune,recover]", "device=cpu"]))
"""
FORKS = """
for line in sys.stdin:
    command = json.loads(line)
    if "wait" in command:
        print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        for number, name in ((1, "log"), (2, "errors")):
            os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(command["folder"])
        os.environ.update(command["variables"])
        sys.argv = ["cluscomp", *command["arguments"]]
        try:
            exec(command["script"], {"__name__": "__main__"}) if command["script"] else main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        if command["script"]:
            import atexit

            atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)
"""


class Forks:
    """`cluscomp ARGUMENTS`, or a script, in processes of their own; without `ours` scripts alone."""

    def __init__(self, *, ours: bool = True) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", OTHERS + (OURS if ours else "") + FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def end(self) -> None:
        self._server.kill()
        self._server.wait()

    def _ask(self, **command) -> int:
        print(json.dumps(command), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def start(
        self,
        log: Path,
        *arguments: str,
        errors: Path | None = None,
        folder: Path | None = None,
        script: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> int:
        """The process' number. It writes to `log`, and its errors there, too, if not elsewhere."""
        log.touch()
        return self._ask(
            log=str(log),
            errors=str(errors or log),
            folder=str(folder or Path.cwd()),
            variables=dict(variables or {}),
            script=script,
            arguments=list(arguments),
        )

    def run(self, *arguments: str, **more) -> "subprocess.CompletedProcess[str]":
        """What is left of one that ended by itself; `more` as of `start`."""
        with tempfile.TemporaryDirectory() as folder:
            log, errors = Path(folder) / "log", Path(folder) / "errors"
            code = self.wait(self.start(log, *arguments, errors=errors, **more))
            return subprocess.CompletedProcess(arguments, code, log.read_text(), errors.read_text())

    def wait(self, pid: int) -> int:
        """The exit code; minus the number of the signal that ended it."""
        return self._ask(wait=pid)

    def kill(self, pid: int) -> None:
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        assert self.wait(pid) == -signal.SIGKILL

    def kill_at(self, outputs: Path, pattern: str, *arguments: str) -> None:
        """Start the command and kill it as soon as a file of this pattern is in its folder of outputs."""
        pid = self.start(outputs.with_suffix(".log"), *arguments)
        until(lambda: bool(list(outputs.glob(pattern))))
        self.kill(pid)


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
