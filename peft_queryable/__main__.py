"""`python -m peft_queryable PROGRAM ARGUMENTS`: run a program that knows nothing of the method, with it registered."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from importlib.util import find_spec

DESCRIPTION = """\
Run a Python program with Queryable LoRA registered with PEFT, so that it loads and trains its adapters.

  python -m peft_queryable lm_eval run --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks TASK
  python -m peft_queryable train.py --epochs 1
  accelerate launch -m peft_queryable train.py --epochs 1
"""


def main() -> None:
    """Run the program that `sys.argv` names, as Python itself would: its arguments, `sys.path` and exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_queryable",
        usage="%(prog)s PROGRAM [ARGUMENTS]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("program", metavar="PROGRAM", help="a script, if there is such a file; if not, a module")
    program = parser.parse_args(sys.argv[1:2]).program  # all further arguments are the program's own
    del sys.argv[0]
    if os.path.isfile(program):
        if sys.path[0] == os.getcwd():  # `python -m` puts it there, unless told not to (-P)
            sys.path[0] = os.path.dirname(os.path.realpath(program))
        runpy.run_path(program, run_name="__main__")
    elif is_module(program):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        parser.error(f"there is neither a file nor an installed module named {program!r}")


def is_module(name: str) -> bool:
    """Whether the package or module at the root of the dotted `name` can be imported."""
    root = name.partition(".")[0]
    return root.isidentifier() and find_spec(root) is not None


if __name__ == "__main__":
    main()
