"""What an interrupted run leaves behind, so that the same command goes on from there."""

import json
from dataclasses import asdict
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


class Progress:
    """The results so far, in a file of the output folder that is there until the run ends.

    Args:
        folder: the output folder.
        arguments: the parsed groups of the command line, of which the last is the trainer's.
    """

    def __init__(self, folder: Path, arguments) -> None:
        *own, training_args = arguments
        settings = [*map(asdict, own), training_args.to_dict() | {"resume_from_checkpoint": None}]
        self.asked = training_args.resume_from_checkpoint
        self.settings = json.loads(json.dumps(settings, default=str))
        self.path = folder / "unfinished.json"
        left = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.is_same_command = left.get("settings") == self.settings
        self.results = left["results"] if self.is_same_command else {}
        folder.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, folder: Path) -> str | None:
        """The checkpoint from which the training in `folder` goes on; None if it begins."""
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is not None and self.asked is None and not self.is_same_command:
            raise SystemExit(
                f"{last} is of another run. Pass --resume_from_checkpoint true to go on from it, or another "
                "--output_dir."
            )
        self.write()
        return last if self.asked in (None, "true") else self.asked

    def add(self, name: str, numbers: dict) -> None:
        self.results[name] = self.results.get(name, {}) | numbers
        self.write()

    def write(self) -> None:
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"settings": self.settings, "results": self.results}))
        unfinished.replace(self.path)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.path.unlink()
        if kind is KeyboardInterrupt:
            raise SystemExit("\nInterrupted. The same command goes on from here.") from None
