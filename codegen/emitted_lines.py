"""What the printers of kernels share: indented lines, and short names for those of the loop IR."""

from __future__ import annotations


class Lines:
    """The text of a kernel while it is written.

    `INDENT` is one step of indentation; a subclass gives its language's.
    """

    INDENT = "  "

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.depth = 1

    def line(self, text: str) -> None:
        self.lines.append(self.INDENT * self.depth + text)

    def rename(self, name: str, prefix: str) -> str:
        """The short name, always the same, that stands for `name`: `prefix` and a number."""
        if name not in self.names:
            number = self.counts.get(prefix, 0)
            self.counts[prefix] = number + 1
            self.names[name] = f"{prefix}{number}"
        return self.names[name]

    def var(self, name: str) -> str:
        return self.rename(name, "i")

    def local(self, name: str) -> str:
        return self.rename(name, "v")
