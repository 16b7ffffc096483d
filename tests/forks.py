"""Real processes of the command, forked from one that has imported everything, which saves some seconds each."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

FORKS = """
import json, os, sys
import torch, transformers
import cluscomp.checkpoint, cluscomp.train.whole, cluscomp.score.perplexity, cluscomp.train.streams
import cluscomp.report.tables
from cluscomp.__main__ import main

for line in sys.stdin:
    command = json.loads(line)
    if "wait" in command:
        print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["cluscomp", *command["arguments"]]
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        os._exit(code)
"""


class Forks:
    """`cluscomp ARGUMENTS` in processes of their own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, **command) -> int:
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, log: Path, *arguments: str) -> int:
        log.touch()
        return self._ask(log=str(log), arguments=list(arguments))

    def wait(self, pid: int) -> int:
        """The exit code; minus the number of the signal that ended it."""
        return self._ask(wait=pid)

    def kill(self, pid: int) -> None:
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        assert self.wait(pid) == -signal.SIGKILL


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
