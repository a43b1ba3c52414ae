"""The arguments of the recipe, and the sizes of its trainings."""

import os
from dataclasses import dataclass, field, replace

from recipes.language.arms import SHOWN, STACKED
from recipes.language.skills import CONDITIONS

FIRST_CHOOSING_SEED = 100  # seeds from here on chose the library's defaults, and no table shows them
QUICK = {"conditions": ["first"], "arms": ["lora", "static", "scale-1"], "ranks": [2], "rates": [0.01], "seeds": 2}
QUICK_SETTING = {"base_steps": 20, "steps": 4, "stage_steps": 2, "validation": 16, "test": 16}


@dataclass(frozen=True)
class Setting:
    """How long bases and adapters train, and on how many examples they are measured."""

    base_steps: int = 2500
    base_batch: int = 64
    steps: int = 200  # of a fine-tuning
    stage_steps: int = 50  # of each task, where one comes after another
    batch: int = 32
    validation: int = 256
    test: int = 512


@dataclass
class JobArguments:
    """What the commands on the tiny model have in common."""

    output_dir: str = field(default="outputs/language", metadata={"help": "Folder for results and bases."})
    seeds: int = field(default=10, metadata={"help": "Runs of each arm and rate, with seeds 0, 1, ..."})
    at_once: int = field(default=5, metadata={"help": "Runs that train as one stacked model."})
    processes: int = field(
        default=os.cpu_count() or 1,
        metadata={"help": "Stacked models that train side by side, each on one thread."},
    )
    steps: int | None = field(
        default=None,
        metadata={
            "help": f"Steps of a fine-tuning, {Setting.steps} by default, but not of one task after another; "
            "others need another --output_dir."
        },
    )
    quick: bool = field(default=False, metadata={"help": "A few steps of a few arms: to see that it runs."})


def setting_of(args: JobArguments) -> Setting:
    setting = replace(Setting(), **QUICK_SETTING if args.quick else {})
    return setting if args.steps is None else replace(setting, steps=args.steps)


@dataclass
class Arguments(JobArguments):
    conditions: list[str] = field(
        default_factory=lambda: list(CONDITIONS),
        metadata={"help": "How the task is told, in the order of the runs.", "choices": list(CONDITIONS)},
    )
    arms: list[str] = field(
        default_factory=lambda: list(SHOWN), metadata={"help": "What to compare.", "choices": list(STACKED)}
    )
    ranks: list[int] = field(default_factory=lambda: [8, 2], metadata={"help": "Ranks r."})
    rates: list[float] = field(
        default_factory=lambda: [0.0025, 0.005, 0.01, 0.02],
        metadata={"help": "Learning rates of every arm; the best one on validation data is shown."},
    )
    choosing: bool = field(
        default=False, metadata={"help": f"Take seeds {FIRST_CHOOSING_SEED}, ... instead, to choose defaults by."}
    )
