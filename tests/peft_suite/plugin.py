"""The pytest plugin: puts our configuration in the place of LoRA's, picks what that concerns, and sorts outcomes."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import inspect
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import pytest
from peft import LoraConfig
from peft.config import PeftConfigMixin

from peft_queryable import QueryableLoraConfig

from .expected import EXPECTED, OFFLINE

SHARED = ("testing_common", "testing_utils")  # PEFT's helpers, which ask whether a configuration is LoRA's
UNSUPPORTED = re.compile(
    r"QueryableLoraConfig does not support `(\w+)|`(init_lora_weights)` must be|`(eva_config)\.rho` must"
)


def stand_in_for_diffusers() -> None:
    """PEFT's tests import diffusers at their top for a few cases, none of them ours."""
    if importlib.util.find_spec("diffusers") is None:
        module: Any = types.ModuleType("diffusers")
        module.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        module.__version__ = "0"
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = module


def replaced(value: Any, by: type[LoraConfig]) -> Any:
    """`value` with the configuration `by` wherever it has LoRA's, as a class or as an instance.

    Raises:
        ValueError: if `by` refuses what LoRA's says.
    """
    if value is LoraConfig:
        return by
    if type(value) is LoraConfig:
        return by(**{f.name: getattr(value, f.name) for f in changed(value)})
    if type(value) in (list, tuple):
        return type(value)(replaced(item, by) for item in value)
    if type(value) is dict:
        return {key: replaced(item, by) for key, item in value.items()}
    return value


def changed(config: LoraConfig) -> list[dataclasses.Field]:
    """The fields of `config` that are not at LoRA's default."""
    default = LoraConfig()
    skipped = {"peft_type", "runtime_config", "peft_version"}
    fields = [f for f in dataclasses.fields(config) if f.init and f.name not in skipped]
    return [f for f in fields if getattr(config, f.name) != getattr(default, f.name)]


def configs(value: Any) -> Iterator[type]:
    """The classes of PEFT's configurations in `value`."""
    if isinstance(value, type) and issubclass(value, PeftConfigMixin):
        yield value
    elif isinstance(value, PeftConfigMixin):
        yield type(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from configs(item)
    elif isinstance(value, dict):
        yield from configs(list(value.values()))


class Suite:
    """The plugin, one for each run.

    Args:
        config_class: what stands in the place of `LoraConfig`: ours, or itself for a control.

    Attributes:
        left_out: how many cases were never run, by reason.
        outcomes: how many cases ended so, by kind and reason.
        failures: what failed without being expected to.
        used: the entries of the lists of `expected.py` that met a case.
    """

    def __init__(self, config_class: type[LoraConfig] = QueryableLoraConfig) -> None:
        self.config_class = config_class
        self.left_out: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failures: list[tuple[str, str]] = []
        self.used: set[str] = set()

    # Which cases there are

    def pytest_configure(self, config: pytest.Config) -> None:
        for name in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
            config.addinivalue_line("markers", f"{name}: of PEFT's")

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for module in [metafunc.module, *(sys.modules.get(f"tests.{name}") for name in SHARED)]:
            if hasattr(module, "LoraConfig"):
                module.LoraConfig = self.config_class
            if hasattr(module, "hub_online_once"):  # it would switch the offline mode off
                module.hub_online_once = lambda model_id: nullcontext()
        parametrize = metafunc.parametrize

        def ours_only(argnames: Any, argvalues: Any, *args: Any, **kwargs: Any) -> None:
            ids, rows = kwargs.get("ids"), list(argvalues)
            kept = [(row, i) for i, row in enumerate(map(self.our_row, rows)) if row is not None]
            if isinstance(ids, list | tuple):
                kwargs["ids"] = [ids[i] for _, i in kept]
            parametrize(argnames, [row for row, _ in kept], *args, **kwargs)

        metafunc.parametrize = ours_only  # type: ignore[method-assign]

    def our_row(self, row: Any) -> Any:
        """A row of `parametrize` as it is for our method; None if it is for others, or if ours refuses its fields."""
        values = row.values if hasattr(row, "marks") else row
        classes = set(configs(values))
        if not classes:
            return row
        if LoraConfig not in classes:
            return None
        try:
            values = replaced(values, self.config_class)
            if isinstance(values, tuple):
                self.check_fields(values)
        except ValueError as error:
            field = UNSUPPORTED.match(str(error))
            if field is None:
                raise
            self.left_out[f"the configuration refuses `{next(filter(None, field.groups()))}`"] += 1
            return None
        return pytest.param(*values, marks=row.marks, id=row.id) if hasattr(row, "marks") else values

    def check_fields(self, values: tuple) -> None:
        """Make the configurations that a row's keyword arguments will make, if it has any."""
        for value in values:
            if isinstance(value, dict) and value.keys() <= LoraConfig.__dataclass_fields__.keys():
                self.config_class(**value)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        kept = [item for item in items if self.concerns_us(item)]
        self.left_out["it is about other methods, or about none"] += len(items) - len(kept)
        items[:] = kept

    def concerns_us(self, item: pytest.Function) -> bool:
        """Whether a case has our configuration: in its parameters, in its code, or in that of a fixture it uses."""
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(self.config_class in set(configs(value)) for value in parameters):
            return True
        fixtures = [d.func for name in item.fixturenames for d in item._fixtureinfo.name2fixturedefs.get(name, ())]
        return any("LoraConfig" in names_in(inspect.unwrap(f).__code__) for f in (item.function, *fixtures))

    # How they end

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            text = str(report.longrepr).strip()
            if re.search(OFFLINE, text):
                self.outcomes["needs the Hub", f"the whole of {report.nodeid}"] += 1
                return
            self.outcomes["failed", ""] += 1
            self.failures.append((report.nodeid, text.splitlines()[-1]))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = (yield).get_result()
        if call.when == "teardown" or (call.when == "setup" and report.passed):
            return
        kind, reason = self.sort(item.nodeid, call) if report.failed else (report.outcome, "")
        if report.skipped:
            kind, reason = "not applicable", "PEFT's tests skip it themselves"
        self.outcomes[kind, reason] += 1
        if kind == "failed":
            self.failures.append((item.nodeid, reason))
        elif report.failed:
            report.outcome, report.longrepr = "skipped", (item.location[0], item.location[1] or 0, reason)

    def sort(self, nodeid: str, call: pytest.CallInfo) -> tuple[str, str]:
        """The kind of a failed case, and its reason."""
        assert call.excinfo is not None
        text = "\n".join(messages(call.excinfo.value))
        for kind, lists in EXPECTED.items():
            for reason, (message, patterns) in lists.items():
                named = {pattern for pattern in patterns if is_named(nodeid, pattern)}
                if named and (found := re.search(message, text)):
                    self.used |= named
                    return kind, reason.format(*found.groups())
        return "failed", text.strip().splitlines()[0][:300] if text.strip() else type(call.excinfo.value).__name__


def is_named(nodeid: str, entry: str) -> bool:
    """Whether an entry of the lists is the case's function, or a pattern for its whole name."""
    return fnmatchcase(nodeid, entry) if "*" in entry else nodeid.rpartition("::")[2].partition("[")[0] == entry


def messages(error: BaseException | None) -> Iterator[str]:
    """The messages of an exception and of those it came from."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__


def names_in(code: types.CodeType) -> set[str]:
    return {*code.co_names}.union(*(names_in(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))
