"""As much of Dockerfile and .dockerignore as this project's images use; whatever else stands in them is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "USER", "WORKDIR",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its number of line, its name in capitals, its --options, and the text that is left."""

    line: int
    name: str
    text: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """The words of a command in its JSON form; a shell's, where it is in shell form."""
        text = self.text.removeprefix("CMD").strip() if self.name == "HEALTHCHECK" else self.text
        if not text.startswith("["):
            return ["/bin/sh", "-c", text]
        words = json.loads(text)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"line {self.line}: {self.name}: not a list of words")
        return words


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile.

    Raises:
        ValueError: for an instruction or a form that is not known here.
    """
    found = []
    for number, line in _logical_lines(text):
        name, _, rest = line.partition(" ")
        name, rest, options = name.upper(), rest.strip(), {}
        if name not in INSTRUCTIONS:
            raise ValueError(f"line {number}: {name} is not known; known: {', '.join(sorted(INSTRUCTIONS))}")
        while name != "RUN" and (option := re.match(r"--([a-z-]+)=(\S+)\s+", rest)):
            options[option[1]] = option[2]
            rest = rest[option.end() :]
        if rest.startswith("--") or "<<" in rest:
            raise ValueError(f"line {number}: {name}: options of RUN, and here-documents, are not known")
        found.append(Instruction(number, name, rest, options))
    if not found or "FROM" not in {i.name for i in found} or {i.name for i in found[:1]} - {"FROM", "ARG"}:
        raise ValueError("no FROM before the other instructions")
    return found


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines joined where they end in a backslash; comments are left out, also those between joined lines."""
    joined, began = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        began = began or number
        joined += line.strip().removesuffix("\\")
        if not line.rstrip().endswith("\\"):
            yield began, joined.strip()
            joined, began = "", 0
    if joined:
        raise ValueError(f"line {began}: ends in a backslash")


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Put the values of $NAME and ${NAME} in; nothing for a name that has none."""
    if re.search(r"\$\{\w+[^}\w]", text):
        raise ValueError(f"{text}: only $NAME and ${{NAME}} are known")
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: variables.get(m[1] or m[2], ""), text)


def assignments(text: str) -> list[tuple[str, str]]:
    """The NAME=value of ENV, LABEL and ARG."""
    found = re.findall(r"""([\w.]+)=("[^"]*"|'[^']*'|\S*)""", text)
    return [(name, value[1:-1] if value[:1] in ('"', "'") else value) for name, value in found]


def base_image(instructions: list[Instruction]) -> str:
    """The image of the only FROM, with the defaults of the ARGs before it."""
    (start,) = (number for number, i in enumerate(instructions) if i.name == "FROM")
    defaults = dict(pair for i in instructions[:start] for pair in assignments(i.text))
    return expand(instructions[start].text, defaults)


class Ignore:
    """The rules of a .dockerignore: the last that matches a path, or a folder above it, decides."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self.rules = [
            (not line.startswith("!"), re.compile(_pattern(line.removeprefix("!").strip("/"))))
            for line in lines
            if line and not line.startswith("#")
        ]

    def excludes(self, path: str) -> bool:
        """Whether a path, relative to the context, stays out of it."""
        parts = path.split("/")
        above = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
        excluded = False
        for excludes, pattern in self.rules:
            if any(pattern.fullmatch(one) for one in above):
                excluded = excludes
        return excluded


def _pattern(glob: str) -> str:
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(words.get(part) or re.escape(part) for part in re.split(r"(\*\*/|\*\*|\*|\?)", glob))


def sources(instruction: Instruction, context: Path, ignore: Ignore) -> list[tuple[Path, str]]:
    """The files that a COPY copies: each with its path below the destination, "" where that is the file itself.

    Raises:
        ValueError: for a source that is not there or that .dockerignore keeps out, and for wildcards.
    """
    *names, target = instruction.text.split()
    if instruction.options or not names or re.search(r"[*?\[]", " ".join(names)):
        raise ValueError(f"line {instruction.line}: COPY: only plain names of files and folders are known")
    into_folder = target.endswith("/") or target == "."
    if len(names) > 1 and not into_folder:
        raise ValueError(f"line {instruction.line}: COPY: several sources need a folder, {target}/")
    found = []
    for name in names:
        source = context / name
        if source.is_dir():
            below = [path for path in sorted(source.rglob("*")) if path.is_file()]
            files = [(path, str(path.relative_to(source))) for path in below]
        else:
            files = [(source, source.name if into_folder else "")] if source.is_file() else []
        kept = [(path, to) for path, to in files if not ignore.excludes(str(path.relative_to(context)))]
        if not kept:
            why = "is kept out by .dockerignore" if files else "is not there"
            raise ValueError(f"line {instruction.line}: COPY: {name} {why}")
        found += kept
    return found
