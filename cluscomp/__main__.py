"""`python -m cluscomp`, and the command `cluscomp`: which command is asked for?"""

import os
import sys

from cluscomp import __version__
from cluscomp.process import interrupt_once, loading

with loading():
    from cluscomp.command import records
    from cluscomp.command.compose import compose_for, told_in_a_sentence
    from cluscomp.command.export import exported
    from cluscomp.command.sweep import calibrate, run_one, show_plan, sweep


def main() -> None:
    """The `cluscomp` command. Exit codes: 0 done, 1 failed, 2 input cannot work, 130 interrupted."""
    interrupt_once()
    arguments = sys.argv[1:]
    plain = {"status": records.status, "collect": records.collected, "table": records.table, "plot": records.plot}
    plain["export"] = exported
    command = arguments.pop(0) if arguments and arguments[0] in {"run", "plan", "verify", *plain} else "run"
    if arguments == ["--version"]:
        print(__version__)
        return
    if command == "plan":
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # a plan downloads nothing
    if calibrating := command == "plan" and "--calibrate" in arguments:
        arguments.remove("--calibrate")
    sys.argv[1:] = arguments
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here whole, to be told in a sentence
    with told_in_a_sentence():
        if command in plain:
            plain[command](arguments)
        elif command == "verify":
            records.verify(arguments)
        elif command == "run" and {"-m", "--multirun"} & set(arguments):
            sweep(arguments)
        else:
            compose_for({"run": run_one, "plan": calibrate if calibrating else show_plan}[command])


if __name__ == "__main__":
    main()
