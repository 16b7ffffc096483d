"""`python -m cluscomp`, and the command `cluscomp`: which command is asked for?"""

import os
import sys

from cluscomp import __version__
from cluscomp.process import hoard_nothing, interrupt_once, loading

with loading():
    from cluscomp.command import records
    from cluscomp.command.compose import compose_for, told_in_a_sentence
    from cluscomp.command.export import exported
    from cluscomp.command.sweep import calibrate, run_one, show_plan, sweep
    from cluscomp.command.usage import COMMANDS, check_command, help_of

MULTIRUN = ("-m", "--multirun")


def main() -> None:
    """The `cluscomp` command. Exit codes: 0 done, 1 failed, 2 input cannot work, 130 interrupted."""
    interrupt_once()
    hoard_nothing()
    arguments = sys.argv[1:]
    plain = {
        "status": records.status, "collect": records.collected, "table": records.table, "plot": records.plot,
        "verify": records.verify, "lm_eval": records.lm_eval, "list": records.choices_told,
        "export": exported,
    }  # fmt: skip
    if asked := arguments[:1] == ["help"] and "--help" not in arguments:
        arguments = [*arguments[1:2], "--help"]
    with told_in_a_sentence():
        check_command(arguments)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "run"
    if arguments == ["--version"]:
        print(__version__)
        return
    if {"--help", "-h"} & set(arguments) and (asked or command != "lm_eval") and command != "run":
        print(help_of(command))
        return
    if command == "plan":
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # a plan downloads nothing
    if calibrating := command == "plan" and "--calibrate" in arguments:
        arguments.remove("--calibrate")
    if command == "run":  # Hydra takes settings behind its options alone
        arguments.sort(key=lambda item: item not in MULTIRUN)
    sys.argv[1:] = arguments
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here whole, to be told in a sentence
    with told_in_a_sentence():
        if command in plain:
            plain[command](arguments)
        elif command == "run" and {*MULTIRUN} & set(arguments):
            sweep(arguments)
        else:
            compose_for({"run": run_one, "plan": calibrate if calibrating else show_plan}[command])


if __name__ == "__main__":
    main()
