"""Task families of reasoning-gym, without the packages that only its other families need.

pip install --no-deps reasoning-gym==0.1.25
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType

SYSTEM = "Give only the final answer."
SEED = 2606  # the learning rate and the families were chosen on 2605, so this held-out data is untouched


def load_families(families: Iterable[str]):
    """The dataset factory, with these families registered.

    `import reasoning_gym` imports a hundred families and a dozen packages, one of which compiles C.
    Empty packages in its place let each family be imported alone.
    """
    subpackages = sorted({f"reasoning_gym.{family.split('.')[0]}" for family in families})
    for package in ("reasoning_gym", *subpackages):
        if package in sys.modules:
            continue
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise SystemExit(
                "The default data is made by reasoning-gym: pip install --no-deps reasoning-gym==0.1.25, "
                "or name other data with --dataset_name, or --train_file and --test_file."
            )
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations)
    for family in families:
        importlib.import_module(f"reasoning_gym.{family}")
    return importlib.import_module("reasoning_gym.factory").create_dataset
