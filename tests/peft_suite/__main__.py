"""Fetch the tests of the installed PEFT with pip, and run them with our method: `python -m peft_suite [ARGUMENTS]`.

Arguments are pytest's; without any file among them, all files run that have something to say about a method like LoRA.
`--control` runs the same cases with LoRA itself: what fails then has another cause than our method.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2] / "build" / "peft-suite"  # ignored by git: nothing of PEFT's is ours to keep
FILES = [
    "test_auto.py",
    "test_config.py",
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_helpers.py",
    "test_hub_features.py",
    "test_initialization.py",
    "test_integrations.py",
    "test_lora_intruders.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_mapping.py",
    "test_other.py",
    "test_riemannian_lora.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_trainable_tokens.py",
    "test_tuners_utils.py",
    "test_vision_models.py",
]


def fetch() -> Path:
    """The folder `tests` of the installed PEFT's source distribution."""
    name = f"peft-{version('peft')}"
    if not (ROOT / name).exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft", "-d", str(ROOT)]
        subprocess.run([*pip, name.replace("-", "==")], check=True)
        with tarfile.open(ROOT / f"{name}.tar.gz") as archive:
            archive.extractall(ROOT, filter="data")
        (ROOT / name / "tests" / "__init__.py").touch()  # they import each other as a package
    return ROOT / name / "tests"


def install() -> None:
    """Put what PEFT's tests import, and the library's tests do not, where only this command sees it."""
    folder = ROOT / "packages"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, "parameterized", "attrs"], check=True)
    sys.path.append(str(folder))


def main(arguments: list[str]) -> int:
    tests = fetch()
    install()
    cache = ROOT / "hub"
    os.environ |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    import pytest
    import torch
    from peft import LoraConfig

    from peft_queryable import QueryableLoraConfig

    from .expected import EXPECTED
    from .models import fill_cache
    from .plugin import Suite, stand_in_for_diffusers

    torch.set_num_threads(1)
    fill_cache(cache)
    stand_in_for_diffusers()
    is_control = "--control" in arguments
    arguments = [argument for argument in arguments if argument != "--control"]
    suite = Suite(LoraConfig if is_control else QueryableLoraConfig)
    ini = ROOT / "pytest.ini"
    ini.write_text("[pytest]\n")  # PEFT's own asks for coverage
    chosen = arguments if any(".py" in argument for argument in arguments) else [*FILES, *arguments]
    targets = [str(tests / argument) if ".py" in argument else argument for argument in chosen]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--disable-warnings",
        "--tb=no",
        "-rN",
        "--continue-on-collection-errors",
        "-c",
        str(ini),
    ]
    code = pytest.main([*options, f"--rootdir={tests.parent}", *targets], plugins=[suite])
    print_summary(suite)
    named = {pattern for lists in EXPECTED.values() for _, patterns in lists.values() for pattern in patterns}
    idle = sorted(named - suite.used) if chosen == FILES and not is_control else []
    for pattern in idle:
        print(f"expected.py names in vain: {pattern}")
    return 1 if suite.failures or idle or code not in (0, 1) else 0


def print_summary(suite) -> None:
    total: Counter[str] = Counter()
    for (kind, _), count in suite.outcomes.items():
        total[kind] += count
    total["not applicable"] += sum(suite.left_out.values())
    for nodeid, reason in suite.failures:
        print(f"FAILED {nodeid}\n    {reason}")
    print(f"\nPEFT's tests with {suite.config_class.__name__} in place of LoraConfig")
    for kind in ("passed", "expected refusal", "needs the Hub", "not applicable", "failed"):
        print(f"{total[kind]:6d}  {kind}")
        reasons = Counter({reason: n for (k, reason), n in suite.outcomes.items() if k == kind and kind != "failed"})
        reasons += suite.left_out if kind == "not applicable" else Counter()
        for reason, count in reasons.most_common():
            if reason:
                print(f"          {count:6d}  {reason}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
