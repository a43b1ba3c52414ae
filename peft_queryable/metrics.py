"""What recorded routes and trained adapters tell: pure functions of tensors, and of a model's gates and gradients.

A route is a distribution over the M atoms: non-negative weights that sum to one. Entropies and divergences are in
nats; divide by log 2 for bits. Weights come without padding, as [`RoutingTrace.weights`] gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .tuner.layer import QueryableLoraLayer


def entropy(weights: Tensor) -> Tensor:
    """H(a) = -sum_m a_m log a_m, in nats: 0 for one atom alone, log M for all atoms alike.

    Args:
        weights: distributions over their last dimension, [..., M].

    Returns:
        [...].
    """
    return torch.special.entr(weights).sum(-1)


def usage(weights: Tensor) -> Tensor:
    """u_m = (1 / N) sum_n a_nm, the mean route: the share of all weight that each atom gets. Sums to 1.

    Args:
        weights: N routes, [..., N, M].

    Returns:
        [..., M].
    """
    return weights.mean(-2)


def dead_atoms(weights: Tensor) -> Tensor:
    """Which atoms no route gives any weight: true for m if a_nm = 0 for all n.

    Args:
        weights: N routes, [..., N, M].

    Returns:
        [..., M] bool.
    """
    return (weights == 0).all(-2)


def load_balance(usages: Tensor) -> Tensor:
    """H(u) / log M: 0 if one atom gets all the weight, 1 if all get the same. 1 for a single atom.

    Args:
        usages: mean routes, [..., M].

    Returns:
        [...].
    """
    num_atoms = usages.shape[-1]
    return entropy(usages) / math.log(num_atoms) if num_atoms > 1 else torch.ones_like(usages[..., 0])


def jensen_shannon(distributions: Tensor) -> Tensor:
    """H(mean_n p_n) - mean_n H(p_n), in nats: 0 if all N are equal, at most log min(N, M), if all are disjoint.

    Of N routes of one block it is what the input decides; of the usages of N blocks, what the block decides. It is the
    mutual information of the atoms with the index n, each n as frequent as the others.

    Args:
        distributions: N distributions, [..., N, M].

    Returns:
        [...].
    """
    return entropy(distributions.mean(-2)) - entropy(distributions).mean(-1)


def information(weights: Tensor, labels: Tensor) -> Tensor:
    """I(atom; label) = H(u) - sum_c p_c H(u_c), in nats: what a label tells of the atoms.

    p_c is the share of the routes with label c, and u_c their mean. Between 0, if the mean route is the same for all
    labels, and min(log M, H(p)). An estimate from N routes is too large by about (C - 1)(M - 1) / 2N.

    Args:
        weights: N routes, [N, M].
        labels: [N] int, such as the index of a task, a language, a position or a block.

    Returns:
        A scalar.
    """
    shares, usages = _by_label(weights, labels)
    return entropy(usage(weights)) - (shares * entropy(usages)).sum()


def group_usage(weights: Tensor, labels: Tensor) -> Tensor:
    """The mean route of each group: [C, M], in the order of the sorted labels (Fig. 6 of the paper).

    Args:
        weights: N routes, [N, M].
        labels: [N] int.
    """
    return _by_label(weights, labels)[1]


def _by_label(weights: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The share of each label [C], and the mean of its routes [C, M]."""
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = weights.new_zeros(len(counts), weights.shape[-1]).index_add(0, index, weights)
    counts = counts.to(weights)
    return counts / len(labels), sums / counts.unsqueeze(-1)


def drift(before: Tensor, after: Tensor) -> Tensor:
    """Mean over routes of (1/2) sum_m |a_m - b_m|: the share of weight that has moved to other atoms (Figs. 7 and 9).

    Between 0, for equal routes, and 1, for routes without a common atom. Both hold the routes of the same inputs, in
    the same order: of two adapters, or of one before and after training.

    Args:
        before: routes, [..., M].
        after: the same, [..., M].

    Returns:
        A scalar.

    Raises:
        ValueError: if the two are not of one shape.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"Drift compares route with route, got {list(before.shape)} before and {list(after.shape)} after. Record "
            "both on the same inputs."
        )
    return (before - after).abs().sum(-1).mean() / 2


def symmetric_kl(usages: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) = sum_m (p_m - q_m)(log p_m - log q_m) of each pair, in nats (Fig. 9 of the paper).

    0 for equal usages; infinite where one group uses an atom that the other never uses.

    Args:
        usages: of C groups, [C, M].

    Returns:
        [C, C], symmetric, with zeros on its diagonal.
    """
    p, q = usages.unsqueeze(1), usages.unsqueeze(0)
    return torch.where(p == q, 0, (p - q) * (p.log() - q.log())).sum(-1)


def atom_reuse(usages: Tensor) -> Tensor:
    """H over groups of u_cm / sum_c u_cm, in nats: whether groups share an atom (Fig. 8 of the paper).

    0 for an atom of one group alone, log C for one that all groups use alike; NaN for an atom that none uses.

    Args:
        usages: of C groups, [C, M].

    Returns:
        [M].
    """
    return entropy((usages / usages.sum(0)).T)


def gates(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """g = sigmoid(eta) of each adapted module, by its name: 0 leaves plain LoRA, 1 adds the mixed atoms in full.

    Empty where parameters are not whole, as under FSDP and DeepSpeed ZeRO-3.

    Raises:
        ValueError: if no module has that adapter.
    """
    layers = adapted_layers(model, adapter_name)
    weights = {name: layer.queryable_lora_gate[adapter_name].weight.detach() for name, layer in layers.items()}
    whole = {name: weight for name, weight in weights.items() if type(weight) is Tensor and weight.numel() == 1}
    if not whole:
        return {}
    device = next(iter(whole.values())).device
    values = torch.cat([weight.to(device).float() for weight in whole.values()]).sigmoid()
    return dict(zip(whole, values.tolist(), strict=True))


def gradient_norms(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The norm of the gradient of each layer's own adapter tensors (Fig. 3 of the paper), at least 0.

    Layer l's norm is (sum ||dL/dw||^2)^(1/2) over the factors A and B and the gates of its modules. The bank and the
    router belong to no layer. Units are the loss's, so compare layers and methods, not losses.

    Args:
        model: after a backward pass, before the gradients are set to zero.

    Returns:
        By name of the repeated layer, a scalar on the gradients' device. Empty where there are no whole gradients, as
        under DeepSpeed and FSDP.

    Raises:
        ValueError: if no module has that adapter.
    """
    by_layer: dict[str, list[Tensor]] = {}
    for name, layer in adapted_layers(model, adapter_name).items():
        parts = [getattr(layer, part) for part in layer.adapter_layer_names]
        for parameter in (p for part in parts if adapter_name in part for p in _parameters(part[adapter_name])):
            if type(parameter.grad) is Tensor:
                by_layer.setdefault(layer_name(name), []).append(parameter.grad)
    return {name: nn.utils.get_total_norm(gradients) for name, gradients in by_layer.items()}


def _parameters(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def concentration(norms: Tensor) -> Tensor:
    """max_l n_l / mean_l n_l, the paper's gradient concentration index (Fig. 4).

    1 if all L layers have the same norm, L if one has it all; NaN if all are 0.

    Args:
        norms: gradient norms of the layers, [..., L].

    Returns:
        [...].
    """
    return norms.amax(-1) / norms.mean(-1)


def adapted_layers(model: nn.Module, adapter_name: str) -> Mapping[str, QueryableLoraLayer]:
    """The modules that `adapter_name` adapts, by name.

    Raises:
        ValueError: if there is none.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QueryableLoraLayer)}
    found = {name: layer for name, layer in layers.items() if adapter_name in layer.queryable_lora_gate}
    if not found:
        there = sorted({adapter for layer in layers.values() for adapter in layer.queryable_lora_gate})
        raise ValueError(f"No module has a Queryable LoRA adapter {adapter_name!r}; this model's are {there}.")
    return found


def layer_name(name: str) -> str:
    """Name of the repeated layer that holds the module `name`: up to its first number, if it has one."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: number + 1])
