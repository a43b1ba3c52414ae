"""Metrics of routes, gates and gradients: against loops over the definitions, and in closed cases."""

import math

import pytest
import torch
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, mlp, randomise, text, two_adapters
from torch import Tensor

from peft_queryable import metrics
from peft_queryable.findings import findings
from peft_queryable.statistics import Readings, RouteStatistics

N, M = 60, 5


def close(found, expected) -> None:
    found, expected = (torch.as_tensor(values, dtype=torch.float64) for values in (found, expected))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def routes(n: int = N, zeros: int = 2) -> Tensor:
    """Random routes over M atoms, [n, M] float64, each with `zeros` atoms unused."""
    logits = 2 * torch.randn(n, M, dtype=torch.float64)
    logits.scatter_(1, logits.topk(zeros, largest=False).indices, -math.inf)
    return logits.softmax(-1)


def entropy_loop(distribution) -> float:
    return -sum(p * math.log(p) for p in map(float, distribution) if p > 0)


def mean_loop(rows) -> list[float]:
    return [sum(float(row[m]) for row in rows) / len(rows) for m in range(M)]


def test_entropy():
    weights = routes()
    close(metrics.entropy(weights), [entropy_loop(row) for row in weights])
    close(metrics.entropy(torch.eye(M)), torch.zeros(M))
    close(metrics.entropy(torch.full((M,), 1 / M, dtype=torch.float64)), math.log(M))


def test_usage_and_balance():
    weights = routes()
    close(metrics.usage(weights), mean_loop(weights))
    close(metrics.load_balance(metrics.usage(weights)), entropy_loop(mean_loop(weights)) / math.log(M))
    close(metrics.load_balance(torch.tensor([1.0, 0, 0])), 0.0)
    close(metrics.load_balance(torch.full((4,), 0.25)), 1.0)
    close(metrics.load_balance(torch.ones(3, 1)), torch.ones(3))  # one atom cannot be out of balance


def test_dead_atoms():
    weights = routes()
    weights[:, 3] = 0
    assert metrics.dead_atoms(weights).tolist() == [False, False, False, True, False]
    weights[17, 3] = 1e-30
    assert not metrics.dead_atoms(weights).any()


def test_jensen_shannon():
    weights = routes()
    expected = entropy_loop(mean_loop(weights)) - sum(map(entropy_loop, weights)) / N
    close(metrics.jensen_shannon(weights), expected)
    close(metrics.jensen_shannon(weights[:1].expand(7, M)), 0.0)
    close(metrics.jensen_shannon(torch.eye(M, dtype=torch.float64)), math.log(M))


def test_information_is_that_of_the_joint_distribution():
    """I = sum_cm p(c, m) log p(c, m) / (p(c) p(m)), from a table made in loops."""
    weights, labels = routes(), torch.randint(3, (N,))
    joint = {(c, m): 0.0 for c in range(3) for m in range(M)}
    for row, label in zip(weights, labels.tolist(), strict=True):
        for m in range(M):
            joint[label, m] += float(row[m]) / N
    by_label = {c: sum(joint[c, m] for m in range(M)) for c in range(3)}
    by_atom = {m: sum(joint[c, m] for c in range(3)) for m in range(M)}
    expected = sum(p * math.log(p / (by_label[c] * by_atom[m])) for (c, m), p in joint.items() if p > 0)
    close(metrics.information(weights, labels), expected)
    close(metrics.information(weights, torch.zeros(N, dtype=torch.long)), 0.0)
    eye = torch.eye(M, dtype=torch.float64).repeat(4, 1)
    close(metrics.information(eye, torch.arange(M).repeat(4)), math.log(M))


def test_information_in_labels_without_meaning_is_its_stated_bias():
    weights, labels = torch.eye(M, dtype=torch.float64)[torch.randint(M, (4000,))], torch.arange(4000) % 3
    draws = [float(metrics.information(weights[torch.randperm(4000)], labels)) for _ in range(200)]
    assert sum(draws) / 200 == pytest.approx((3 - 1) * (M - 1) / (2 * 4000), rel=0.25)  # n = 200: spread 4%


def test_group_usage():
    weights, labels = routes(), torch.randint(3, (N,)) * 10
    found = metrics.group_usage(weights, labels)
    for row, label in zip(found, (0, 10, 20), strict=True):
        close(row, mean_loop([w for w, c in zip(weights, labels.tolist(), strict=True) if c == label]))


def test_drift():
    before, after = routes(), routes()
    total = sum(abs(float(before[n, m]) - float(after[n, m])) for n in range(N) for m in range(M))
    close(metrics.drift(before, after), total / 2 / N)
    close(metrics.drift(before, before), 0.0)
    close(metrics.drift(torch.eye(M), torch.eye(M).roll(1, 0)), 1.0)
    with pytest.raises(ValueError, match=r"got \[60, 5\] before and \[59, 5\] after"):
        metrics.drift(before, after[1:])


def test_symmetric_kl():
    usages = routes(4, zeros=0)
    for c in range(4):
        for d in range(4):
            p, q = usages[c].tolist(), usages[d].tolist()
            one = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            other = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
            close(metrics.symmetric_kl(usages)[c, d], one + other)
    apart = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.25, 0.25], [0.75, 0.25, 0.0]])
    found = metrics.symmetric_kl(apart)
    assert found.isinf().tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert found.diag().tolist() == [0, 0, 0]


def test_atom_reuse():
    usages = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.2, 0.3, 0.0]], dtype=torch.float64)
    found = metrics.atom_reuse(usages)
    close(found[:3], [math.log(2), entropy_loop([5 / 7, 2 / 7]), 0.0])
    assert found[3].isnan()


def test_gates():
    model = two_adapters()
    found = metrics.gates(model, "two")
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "queryable_lora_gate")}
    expected = {n: m.queryable_lora_gate["two"].weight.item() for n, m in layers.items() if "two" in m.lora_A}
    assert found == pytest.approx({name: 1 / (1 + math.exp(-eta)) for name, eta in expected.items()})
    assert len(found) == 2
    with pytest.raises(ValueError, match=r"has a Queryable LoRA adapter 'three'; this model's are \['one', 'two'\]"):
        metrics.gates(model, "three")


def test_gradient_norms():
    """Each layer's own tensors count, all of them, and neither the bank nor another adapter's."""
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS)
    randomise(model)
    assert metrics.gradient_norms(model) == {}  # no backward pass yet
    model(**(inputs := text()), labels=inputs["input_ids"]).loss.backward()
    expected = dict.fromkeys(range(4), 0.0)
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.grad is not None:
            expected[int(name.split(".layers.")[1].split(".")[0])] += float(parameter.grad.double().square().sum())
    found = metrics.gradient_norms(model)
    assert [name.rsplit(".", 1)[1] for name in found] == list("0123")
    for norm, square in zip(found.values(), expected.values(), strict=True):
        assert float(norm) == pytest.approx(math.sqrt(square), rel=1e-6)


def test_concentration():
    close(metrics.concentration(torch.tensor([1.0, 3.0, 2.0])), 1.5)
    close(metrics.concentration(torch.ones(7)), 1.0)
    close(metrics.concentration(torch.tensor([0.0, 0.0, 4.0])), 3.0)


# Running statistics


def test_running_statistics_are_those_of_all_routes():
    """In parts, with padding, in float32 or 64: as from all real routes at once."""
    blocks = {3: routes(24).view(4, 6, M), 1: routes(24).view(4, 6, M)}
    real = torch.rand(4, 6) < 0.7
    running = RouteStatistics()
    for rows in (slice(0, 1), slice(1, 4)):
        running.add({block: weights[rows] for block, weights in blocks.items()}, real[rows])
    flat = torch.stack([blocks[block][real] for block in (1, 3)])  # [blocks, N, M]
    assert running.blocks == [1, 3] and running.count == int(real.sum())
    close(running.usage(), metrics.usage(flat))
    told = running.summary()
    close(told["entropy"], metrics.entropy(flat).mean())
    close(told["by_input"], metrics.jensen_shannon(flat).mean())
    close(told["by_block"], metrics.jensen_shannon(metrics.usage(flat)))
    close(sum(told[part] for part in ("entropy", "by_input", "by_block")), metrics.entropy(flat.mean((0, 1))))
    close(told["load_balance"], metrics.load_balance(flat.mean((0, 1))))
    assert told["top_atom"] == pytest.approx(float(flat.mean((0, 1)).max()))
    assert told["dead"] == 0
    assert sum(sums.numel() for sums in running.sums.values()) == 2 * (2 * M + 2)  # whatever was added


@pytest.mark.parametrize(
    ("by_block", "expected"),
    [
        (torch.eye(4)[:2, None].expand(2, 8, 4), (0, 0, math.log(2), 2)),
        (torch.eye(4)[torch.arange(8) % 4].expand(2, 8, 4), (0, math.log(4), 0, 0)),
        (torch.full((2, 8, 4), 0.25), (math.log(4), 0, 0, 0)),
    ],
    ids=["the block decides", "the input decides", "left open"],
)
def test_what_decides(by_block, expected):
    running = RouteStatistics()
    running.add(dict(enumerate(by_block)))
    told = running.summary()
    assert [told[name] for name in ("entropy", "by_input", "by_block", "dead")] == pytest.approx(expected, abs=1e-12)


# Findings


def found_in(weights: Tensor) -> dict[str, str]:
    running = RouteStatistics()
    running.add({0: weights, 1: weights})
    return findings(Readings(running.table()))


def test_findings_of_good_routes():
    assert found_in(routes(400)) == {}


def test_constant_routes_are_found():
    fixed = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).expand(400, M)
    message = found_in(fixed)["constant"]
    assert "Routes are constant: over 400 routes per block" in message
    assert "`init_router_scale=0.3`" in message  # a field, which recipes and trainers take too
    noisy = (fixed + 0.001 * torch.rand(400, M)).softmax(-1)
    assert "constant" in found_in(noisy)
    moving = (fixed.log().clamp(min=-9) + torch.randn(400, M)).softmax(-1)
    assert "constant" not in found_in(moving)
    assert "constant" not in found_in(fixed[:3])  # too few to say


def test_dead_atoms_are_found():
    weights = torch.cat([routes(400), torch.zeros(400, 2)], 1)
    assert "Atoms [5, 6] of 7 are dead: none of 400 routes" in found_in(weights)["dead"]
    assert "dead" not in found_in(weights[:100])  # too few to say


def test_one_atom_is_found():
    weights = 0.95 * torch.eye(M)[2] + 0.05 * routes(400)
    assert "Atom 2 takes 9" in found_in(weights)["one_atom"]
    assert "one_atom" not in found_in(0.5 * torch.eye(M)[2] + 0.5 * routes(400))


def test_a_single_atom_is_no_finding():
    assert found_in(torch.ones(400, 1)) == {}


def test_a_model_without_an_adapter():
    with pytest.raises(ValueError, match="this model's are \\[\\]"):
        metrics.gradient_norms(mlp())
