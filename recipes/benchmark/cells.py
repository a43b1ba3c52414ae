"""What stands in the cells of tables: names, and ratios with their quartiles beside their targets."""

import statistics

from recipes.benchmark.methods import INSTRUCTED, SCOPES

NAMES = {
    "base": "base model",
    "lora": "LoRA",
    "dora": "DoRA",
    "lily": "Lily",
    "vblora": "VB-LoRA",
    "xlora": "X-LoRA",
    **{scope: f"ours, `{scope}`" for scope in SCOPES},
    **{method: f"ours, `{method.partition('+')[0]}`, instruction" for method in INSTRUCTED},
}
WORK_NAMES = {
    "prefill": "prefill",
    "decode_1": "decoding, batch 1",
    "decode_8": "decoding, batch 8",
    "train": "training step",
    "train_checkpointed": "training step, checkpointed",
}
FAILED = "cannot"  # the JSON has the error


def quartiles(seconds: dict[str, list[float]], method: str, baseline: str) -> list[float]:
    """Lower quartile, median and upper quartile, over the rounds, of the ratio of `method` to `baseline`."""
    ratios = [a / b for a, b in zip(seconds[method], seconds[baseline], strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def judged(ratio: float, target: float | None, low: float | None = None) -> str:
    """What a ratio is to its target, in words; `low`, its lower quartile, tells a miss from noise."""
    if target is None:
        return ""
    if ratio <= target:
        return f", meets {target:.3f}"
    return f", {'**misses**' if low is None or low > target else 'within noise of'} {target:.3f}"


def time_cell(times: dict, method: str, baseline: str, target: float | None) -> str:
    if {method, baseline} & times["failed"].keys():
        return FAILED
    if method not in times["seconds"]:
        return ""
    low, median, high = quartiles(times["seconds"], method, baseline)
    return f"{median:.3f} ({low:.3f} to {high:.3f}){judged(median, target, low)}"


def absolute(work: str, times: dict) -> str:
    """What LoRA takes by itself, for comparing machines."""
    if "lora" in times["failed"]:
        return FAILED
    seconds = statistics.median(times["seconds"]["lora"])
    batch = work.removeprefix("decode_")
    return f"{int(batch) / seconds:.1f} tokens/s" if batch != work else f"{seconds * 1000:.0f} ms"


def ratio_cell(numbers: dict[str, float], method: str, target: float | None) -> str:
    if method not in numbers:
        return ""
    ratio = numbers[method] / numbers["lora"]
    return f"{ratio:.3f}{judged(ratio, target)}"
