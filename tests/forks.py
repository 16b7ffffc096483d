"""Real processes, forked from one that has imported torch and transformers, or from one that has made a whole run, too:
it saves seconds each.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

OTHERS = """
import gc, json, os, sys
gc.disable()  # until all is imported; what is frozen then no process looks through again, which would copy its pages
import hydra, lm_eval, pydantic, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
"""
OURS = """
import pathlib, tempfile
import cluscomp.train.whole
import transformers.utils.logging
from contextlib import redirect_stdout, suppress
with suppress(ImportError):
    import wandb.cli.cli
from cluscomp.__main__ import main
from cluscomp.command.compose import composed
from cluscomp.runs.run import run

transformers.utils.logging.disable_progress_bar()  # it has a thread of its own
# Without stage recover: accelerate would remember for good that this process has no others beside it.
with tempfile.TemporaryDirectory() as place, redirect_stdout(sys.stderr):
    text = pathlib.Path(place) / "text.txt"
    text.write_text("\\n\\n".join(f"Paragraph {i} says that {i * i} is a square." for i in range(100)))
    run(composed([
        "model=tiny", "model.config.num_hidden_layers=1", "data=text", f"data.file={text}", f"cache={place}/cache",
        f"outputs={place}/outputs", "order=[cluster,block_finetune]", "device=cpu", "method.vector_dim=4",
        "method.codebook_size=16", "cluster.samples=4", "cluster.length=32", "block_finetune=quick",
        "block_finetune.length=32", "block_finetune.samples=4", "evaluate.context=32", "evaluate.limit=2",
    ]))
"""
SERVE = """
def serve(requests, answers):
    gc.collect()
    gc.freeze()
    gc.enable()
    for line in requests:
        command = json.loads(line)
        if "wait" in command:
            print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), file=answers, flush=True)
        elif pid := os.fork():
            print(pid, file=answers, flush=True)
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

requests, answers = map(int, sys.argv[1:])
if not os.fork():
    serve(open(requests), open(answers, "w"))
    os._exit(0)
os.close(requests)
os.close(answers)
"""


@contextmanager
def servers() -> "Iterator[tuple[Forks, Forks]]":
    """One that has made a run, and one that has imported nothing of ours."""
    (requests, asking), (answering, answers) = os.pipe(), os.pipe()
    both = [sys.executable, "-c", OTHERS + SERVE + OURS + "serve(sys.stdin, sys.stdout)", str(requests), str(answers)]
    server = subprocess.Popen(
        both, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(requests, answers)
    )
    os.close(requests)
    os.close(answers)
    with os.fdopen(asking, "w") as second, os.fdopen(answering) as answer:  # closed, they end the second server
        yield Forks(server.stdin, server.stdout), Forks(second, answer)
    server.kill()
    server.wait()


class Forks:
    """`cluscomp ARGUMENTS`, or a script, in processes of their own."""

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self._requests, self._answers = requests, answers

    def _ask(self, **command) -> int:
        print(json.dumps(command), file=self._requests, flush=True)
        return int(self._answers.readline())

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
