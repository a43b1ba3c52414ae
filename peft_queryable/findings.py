"""What is wrong with routes, in words and with a remedy."""

from __future__ import annotations

from .statistics import Readings

# With four weights of 1/4 that is a standard deviation of 0.01 in each.
CONSTANT = 1e-3  # nats that the input decides
MOST = 0.9  # of all weight, for one atom
ENOUGH = 4  # routes per block before they can be called constant
ENOUGH_PER_ATOM = 20  # the same per atom, before one can be called dead


def findings(readings: Readings) -> dict[str, str]:
    """What a user should know of these routes, by kind: `constant`, `dead`, `one_atom`. Empty if all is well."""
    found: dict[str, str] = {}
    num_atoms, count = readings.usage.shape[1], readings.count.min().item()
    if num_atoms == 1:
        return found
    if count >= ENOUGH and readings.by_input.max() < CONSTANT:
        found["constant"] = (
            f"Routes are constant: over {int(count)} routes per block the input decides "
            f"{readings.by_input.max():.1e} nats, so the adapter is a plain LoRA with a fixed matrix in its middle. "
            "If the examples differ, the blocks' priors outweigh their states. Start them smaller: train anew with "
            "`init_router_scale=0.3`, or less."
        )
    if count >= ENOUGH_PER_ATOM * num_atoms and readings.dead:
        found["dead"] = (
            f"Atoms {readings.dead} of {num_atoms} are dead: none of {int(count)} routes per block gives them weight, "
            "so they learn nothing. Raise `top_k`, or set it to None, or train with fewer `num_atoms`."
        )
    usage = readings.usage.mean(0)
    if count >= ENOUGH and usage.max() > MOST:
        found["one_atom"] = (
            f"Atom {int(usage.argmax())} takes {usage.max():.0%} of all weight, so routing chooses nothing. Raise "
            "`attention_temperature` (to 2.0, say) or lower the learning rate."
        )
    return found
