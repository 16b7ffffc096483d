"""Which of lm-eval's folders have to be read to know some tasks, groups or tags: reading all its files takes a minute.

Files are scanned line by line. What they say is read by lm-eval itself.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

KEY = re.compile(r"[\"']?(task|group|tag|include)[\"']?\s*:(.*)")
ENTRY = re.compile(r"\s*(?:-\s+)?(?:[\"']?(?:task|group)[\"']?\s*:\s*)?[\"']?([\w./+-]+)[\"']?\s*(?:#.*)?$")
IN_LINE = re.compile(r"[^\s,\[\]\"'#]+")
SUFFIXES = (".yaml", ".yml", "")  # templates often have none
LONGEST = 2**20  # bytes of a file without suffix that may be a template


@dataclass(frozen=True)
class Named:
    """The names in the task files below a folder.

    `places`: of each task, group and tag the folders right below it with a file that defines it. `members`: of each
    group what it lists. `listed`: of each name in such a list the folders of the lists.
    """

    places: dict[str, set[Path]] = field(default_factory=lambda: defaultdict(set))
    members: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    listed: dict[str, set[Path]] = field(default_factory=lambda: defaultdict(set))

    @property
    def names(self) -> set[str]:
        """All names that are defined or listed."""
        return self.places.keys() | self.listed.keys()

    def needed(self, names: Iterable[str]) -> set[Path]:
        """All folders that define a name, or a member of a group among them, and so on.

        A name that is only listed is in the folder of the list.
        """
        wanted, todo = set(names), list(names)
        while todo:
            more = self.members.get(todo.pop(), set()) - wanted
            wanted |= more
            todo += more
        return {place for name in wanted for place in self.places.get(name) or self.listed.get(name, set())}


def named(root: Path) -> Named:
    """The names in the task files below `root`; files right in it count as a folder."""
    found, root = Named(), root.resolve()
    read = {path: dict(_keys(path)) for path in sorted(root.rglob("*")) if _may_tell(path)}
    for path, keys in read.items():
        inside = path.relative_to(root).parts
        place = root / inside[0] if len(inside) > 1 else root
        of_groups = keys.get("task", []) if "group" in keys else []
        for name in [*keys.get("group", []), *_tags(path, read), *([] if of_groups else keys.get("task", []))]:
            found.places[name].add(place)
        for name in of_groups:
            found.listed[name].add(place)
        for group in keys.get("group", []):
            found.members[group].update(of_groups)
    return found


@functools.cache
def named_by_lm_eval(root: Path) -> Named:
    """As `named`, once a process: lm-eval's own files stay as they are."""
    return named(root)


def _may_tell(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.is_file() and (path.suffix != "" or path.stat().st_size <= LONGEST)


def _tags(path: Path, read: dict[Path, dict[str, list[str]]], inside: frozenset[Path] = frozenset()) -> set[str]:
    """The tags of a file and of those it includes, which may lie in another folder."""
    keys = {} if path in inside else read.get(path, {})
    others = ((path.parent / other).resolve() for other in keys.get("include", []))
    return {*keys.get("tag", []), *(tag for one in others for tag in _tags(one, read, inside | {path}))}


def _keys(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The names under each key of a task file that stands at the start of a line: one, a list, or entries below it."""
    key, names = "", []
    for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
        if line[:1].isspace() or line[:1] in {"-", "#", ""}:
            if key and (entry := ENTRY.match(line)):
                names.append(entry[1])
            continue
        if key:
            yield key, names
        found = KEY.match(line)
        key, names = (found[1], IN_LINE.findall(found[2].partition(" #")[0])) if found else ("", [])
    if key:
        yield key, names
