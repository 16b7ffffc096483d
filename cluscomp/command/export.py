"""The command `export`."""

from cluscomp.command.compose import quiet_libraries
from cluscomp.command.records import place
from cluscomp.command.usage import misused

OPTIONS = {"format": "", "output": "", "dtype": "auto"}


def exported(arguments: list[str]) -> None:
    """Write a checkpoint in another library's format, and print what is lost."""
    checkpoint, *rest = arguments or [""]
    given = OPTIONS | dict(item.partition("=")[::2] for item in rest)
    if not checkpoint or given.keys() != OPTIONS.keys() or not given["format"] or not given["output"]:
        raise misused("export", "CHECKPOINT is its folder")
    from cluscomp.formats.export import export

    quiet_libraries()
    for sentence in export(place(checkpoint), **given):
        print(f"lost: {sentence}")
    print(given["output"])
