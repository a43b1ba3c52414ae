"""Folders that are there as a whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from peft import PeftConfig


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `folder` when the block ends, and vanishes if it raises.

    Raises:
        ValueError: if `folder` exists and holds something.
    """
    folder = Path(folder)
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        written.chmod(0o755)  # mkdtemp keeps others out
        yield written
        if folder.exists():
            folder.rmdir()
        written.rename(folder)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Raise a ValueError unless `folder` is empty or does not exist."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if (folder / "adapter_config.json").exists():
        kind = PeftConfig.from_pretrained(str(folder)).peft_type
        raise ValueError(
            f"{folder} holds an adapter of the type {getattr(kind, 'value', kind)}, which an export would destroy. "
            "Give the export a folder of its own."
        )
    raise ValueError(f"{folder} exists and is not empty. Give the export a folder of its own, or delete that one.")
