"""What `optimize` did to each block, and what will run there."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class BlockReport:
    """One residual block: its name in the model, its type now, and the backend and kernel, or why it stays stock."""

    name: str
    type: str
    fused: bool
    backend: str
    kernel: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The blocks of one model in `named_modules` order. `print(report)` draws a table."""

    blocks: tuple[BlockReport, ...]
    dry_run: bool = False

    def __iter__(self) -> Iterator[BlockReport]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def fused(self) -> int:
        """How many blocks are fused (would be, in a dry run)."""
        return sum(block.fused for block in self.blocks)

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        return {"dry_run": self.dry_run, "fused": self.fused, "blocks": [asdict(block) for block in self.blocks]}

    def __rich__(self) -> Table:
        title = f"{self.fused} of {len(self)} residual blocks fused{' (dry run)' if self.dry_run else ''}"
        table = Table("block", "type", "fused", "backend", "kernel, or why not", title=title, title_justify="left")
        for block in self.blocks:
            style = None if block.fused else "yellow"
            mark = "yes" if block.fused else "no"
            table.add_row(block.name, block.type, mark, block.backend, block.reason or block.kernel, style=style)
        return table

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()
