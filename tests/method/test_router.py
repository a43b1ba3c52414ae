"""The router's equations, one by one; test_reference.py compares the whole with loops."""

import math

import pytest
import torch
from helpers.models import INSTRUCTION
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from peft_queryable.method.router import RMS_EPS, Router, RouterSettings, rms_norm, top_k_softmax

BATCH, ROUTES, RANK, ATOMS, DIM, CONTEXT = 3, 5, 4, 6, 8, 7


def router(**kwargs) -> Router:
    """A router whose atoms are not zero and whose projections are large enough to matter."""
    config = {"rank": RANK, "num_atoms": ATOMS, "top_k": 3, "num_blocks": 4, "dim": DIM, "instruction_dim": CONTEXT}
    return Router(RouterSettings(**(config | kwargs)))


def inputs(dtype: torch.dtype = torch.float32, routes: int = ROUTES) -> tuple:
    """Entry state [B, K, r], two earlier means [B, K, r] and an instruction [B, d_c]."""
    state, *means = torch.randn(3, BATCH, routes, RANK, dtype=dtype)
    return state, means, torch.randn(BATCH, CONTEXT, dtype=dtype)


def route(module: Router, block: int, state: Tensor, means: list[Tensor], instruction: Tensor | None = None) -> Tensor:
    """Routing weights [B, K, M] of one block under an instruction."""
    return module(block, state, means, module.prepare(instruction))


@st.composite
def logits_and_k(draw):
    """Logits [..., M], ties included, and k."""
    atoms = draw(st.integers(1, 8))
    values = st.sampled_from([-2.0, 0.0, 0.5, 3.0]) | st.floats(-20, 20, width=32)
    rows = draw(st.lists(st.lists(values, min_size=atoms, max_size=atoms), min_size=1, max_size=4))
    return torch.tensor(rows), draw(st.none() | st.integers(1, atoms))


def test_rms_norm():
    """It is torch's RMSNorm without a scale."""
    x = torch.randn(2, 3, DIM)
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (DIM,), eps=RMS_EPS))


def test_rms_norm_of_zero():
    """A zero vector stays zero and has a finite gradient."""
    x = torch.zeros(2, DIM, requires_grad=True)
    rms_norm(x).sum().backward()
    assert torch.equal(rms_norm(x), torch.zeros(2, DIM))
    assert x.grad.isfinite().all()


@given(logits_and_k())
def test_top_k_softmax_is_a_distribution(case):
    """Weights are non-negative, sum to one, and at most k are not exactly zero."""
    logits, k = case
    weights = top_k_softmax(logits, k)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(logits)))
    assert ((weights != 0).sum(-1) <= (k or logits.shape[-1])).all()


@given(logits_and_k())
def test_top_k_softmax_against_loops(case):
    """Softmax over the k first of the atoms sorted by logit, then by index."""
    logits, k = case
    expected = torch.zeros_like(logits)
    for row, out in zip(logits.tolist(), expected, strict=True):
        chosen = sorted(range(len(row)), key=lambda m: (-row[m], m))[:k]
        total = sum(math.exp(row[m] - max(row)) for m in chosen)
        for m in chosen:
            out[m] = math.exp(row[m] - max(row)) / total
    torch.testing.assert_close(top_k_softmax(logits, k), expected)


@given(logits_and_k(), st.integers(-50, 50))
def test_top_k_softmax_ignores_a_common_shift(case, shift):
    """Lemma D.5: moving all logits alike moves no weight."""
    logits, k = case
    logits = logits.round()  # so that the sum is exact, and ties stay ties
    torch.testing.assert_close(top_k_softmax(logits + shift, k), top_k_softmax(logits, k))


@pytest.mark.parametrize(("atoms", "k"), [(ATOMS, 1), (ATOMS, 2), (ATOMS, ATOMS), (500, 4)])
def test_ties_are_broken_by_index(atoms, k):
    """Of equal logits the first k are chosen, with equal weights, of however many."""
    weights = top_k_softmax(torch.zeros(2, atoms), k)
    torch.testing.assert_close(weights, (torch.arange(atoms) < k).float().expand(2, -1) / k)


@pytest.mark.parametrize("k", [1, 3, ATOMS, None])
def test_top_k_softmax_gradient(k):
    """The gradient is that of finite differences, and exactly zero, not missing, where an atom is not chosen."""
    logits = torch.randn(2, ATOMS, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: top_k_softmax(x, k), logits)
    weights = top_k_softmax(logits, k)
    (weights * torch.randn_like(weights)).sum().backward()
    assert torch.equal(logits.grad == 0, (weights == 0) | torch.tensor(k == 1))


@pytest.mark.parametrize("top_k", [1, 3, None])
def test_weights(top_k):
    """Weights are [B, K, M], rows sum to one, and at most k of a row are not zero."""
    state, means, instruction = inputs()
    weights = route(router(top_k=top_k), 2, state, means, instruction)
    assert weights.shape == (BATCH, ROUTES, ATOMS)
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, ROUTES))
    assert ((weights > 0).sum(-1) <= (top_k or ATOMS)).all()


def test_routes_are_independent():
    """Route t of row b depends on the states of t and b, and on no others."""
    module = router().double()
    state, means, instruction = inputs(torch.float64)
    weights = route(module, 2, state, means, instruction)
    for row in range(BATCH):
        for t in range(ROUTES):
            one = [m[row, t].view(1, 1, RANK) for m in (state, *means)]
            alone = route(module, 2, one[0], one[1:], instruction[row : row + 1])
            torch.testing.assert_close(alone[0, 0], weights[row, t])


def test_batch_permutation():
    """Permuting the rows of the batch permutes the routes."""
    module = router().double()
    state, means, instruction = inputs(torch.float64)
    order = torch.tensor([2, 0, 1])
    permuted = route(module, 2, state[order], [m[order] for m in means], instruction[order])
    torch.testing.assert_close(permuted, route(module, 2, state, means, instruction)[order])


def test_one_instruction_serves_all_rows():
    """An instruction [1, d_c] is the same as one repeated for each row."""
    module = router()
    state, means, instruction = inputs()
    one = route(module, 1, state, means[:1], instruction[:1])
    torch.testing.assert_close(one, route(module, 1, state, means[:1], instruction[:1].expand(BATCH, -1)))


def test_no_instruction_is_zero():
    """Without an instruction the route is that of e(c) = 0, and of no instruction parameters at all (Prop. D.7a)."""
    module = router()
    state, means, instruction = inputs()
    weights = route(module, 2, state, means)
    torch.testing.assert_close(route(module, 2, state, means, torch.zeros_like(instruction)), weights)
    bare = router(instruction_dim=None)
    bare.load_state_dict({name: tensor for name, tensor in module.state_dict().items() if "instruction" not in name})
    torch.testing.assert_close(route(bare, 2, state, means), weights)
    weak = router(instruction_strength=0.0, instruction_query_weight=0.0)
    weak.load_state_dict(module.state_dict(), strict=False)  # Q_ctx and R_ctx, which could not learn, it has not
    assert weak.instruction_query is None and weak.instruction_prior is None
    torch.testing.assert_close(route(weak, 2, state, means, instruction), weights)


def test_instruction_moves_the_route():
    """An instruction changes the weights, through the prior as well as through the query."""
    state, means, instruction = inputs()
    for kwargs in ({"instruction_strength": 0.0}, {"instruction_query_weight": 0.0}):
        module = router(**kwargs)
        assert not torch.allclose(
            route(module, 2, state, means, instruction), route(module, 2, state, means), atol=1e-4
        )


def test_depth_moves_the_route():
    """Earlier means change the weights of a later block, unless 'depth' is no term of the query."""
    state, means, _ = inputs()
    module = router()
    assert not torch.allclose(route(module, 2, state, means), route(module, 2, state, means[:1]), atol=1e-4)
    module = router(query_terms=("state",))
    assert not module.uses_depth
    assert torch.equal(route(module, 2, state, means), route(module, 2, state, []))


def test_equal_means_are_one_mean():
    """The depth summary is a weighted mean: of equal means it is that mean, however many they are."""
    module = router().double()
    state, means, _ = inputs(torch.float64)
    torch.testing.assert_close(route(module, 2, state, means[:1] * 3), route(module, 2, state, means[:1]))


@pytest.mark.parametrize("num_means", [0, 1, 2])
@pytest.mark.parametrize("with_instruction", [False, True])
def test_every_parameter_that_routes_gets_a_gradient(num_means, with_instruction):
    """No gradient is None, whatever the block and with no instruction: DDP waits for every one."""
    module = router()
    state, means, instruction = inputs()
    weights = route(module, num_means, state, means[:num_means], instruction if with_instruction else None)
    (weights * torch.randn_like(weights)).sum().backward()
    used = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    del used["atoms.weight"]
    assert all(parameter.grad is not None for parameter in used.values())
    untouched = {"instruction_query.weight", "instruction_prior.weight"} if not with_instruction else set()
    depth = {"depth_value.weight", "depth_query.weight", "depth_key.weight"}
    untouched |= depth if num_means == 0 else depth - {"depth_value.weight"} if num_means == 1 else set()
    assert {name for name, parameter in used.items() if not parameter.grad.any()} == untouched


@pytest.mark.parametrize(
    ("query_terms", "instruction_dim", "expected"),
    [
        (("state", "depth", "instruction"), CONTEXT, ("state", "depth", *sorted(INSTRUCTION))),
        (("state", "depth", "instruction"), None, ("state", "depth")),
        (("state",), CONTEXT, ("state", "default_instruction", "instruction_prior")),
        (("depth",), None, ("depth",)),
        ((), None, ()),
    ],
    ids=str,
)
def test_parameter_tree(query_terms, instruction_dim, expected):
    """A term that is left out has no parameters; the others have those of METHOD, with its shapes."""
    shapes = {
        "state": {"state_query.weight": (DIM, RANK)},
        "depth": {
            "depth_value.weight": (DIM, RANK),
            "depth_query.weight": (DIM, DIM),
            "depth_key.weight": (DIM, RANK),
        },
        "default_instruction": {"default_instruction.weight": (1, CONTEXT)},
        "instruction_query": {"instruction_query.weight": (DIM, CONTEXT)},
        "instruction_prior": {"instruction_prior.weight": (DIM, CONTEXT)},
    }
    tree = {"atoms.weight": (ATOMS, RANK, RANK), "keys.weight": (ATOMS, DIM), "block_prior.weight": (4, DIM)}
    for term in expected:
        tree |= shapes[term]
    module = router(query_terms=query_terms, instruction_dim=instruction_dim)
    assert {name: tuple(parameter.shape) for name, parameter in module.named_parameters()} == tree


DEPTH = ["depth_value", "depth_query", "depth_key"]


@pytest.mark.parametrize(("longest_stack", "kept"), [(1, []), (2, DEPTH[:1]), (3, DEPTH), (None, DEPTH)])
def test_depth_that_cannot_learn_is_left_out(longest_stack, kept):
    """A first block has no depth summary, and a second no choice to make: routes stay what they were."""
    whole, module = router(), router(longest_stack=longest_stack)
    assert [name for name in DEPTH if getattr(module, name) is not None] == kept
    assert module.uses_depth == bool(kept)
    module.load_state_dict({key: whole.state_dict()[key] for key in module.state_dict()})
    state, means, instruction = inputs()
    for block in range(longest_stack or 3):
        expected = route(whole, block, state, means[:block], instruction)
        torch.testing.assert_close(route(module, block, state, means[:block], instruction), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_maths_is_float32_with_narrow_parameters(dtype):
    """A router in 16 bits routes as a float32 one with the same rounded weights, bit by bit."""
    narrow, wide = router().to(dtype), router()
    wide.load_state_dict(narrow.state_dict())
    state, means, instruction = inputs(dtype)
    weights = route(narrow, 2, state, means, instruction)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, route(wide, 2, state.float(), [m.float() for m in means], instruction.float()))


def test_maths_is_float32_under_autocast():
    """Autocast changes no bit of the weights or of the operator made of them."""
    module = router()
    state, means, instruction = inputs(routes=1)
    weights = route(module, 2, state, means, instruction)
    with torch.autocast("cpu", torch.bfloat16):
        cast = route(module, 2, state, means, instruction)
        operator = module.atoms.transposed_operators(cast)
    assert cast.dtype == operator.dtype == torch.float32
    assert torch.equal(cast, weights)
    assert torch.equal(operator, module.atoms.transposed_operators(weights))


def test_maths_is_float64_with_float64_parameters():
    """Wider parameters than float32 are not narrowed."""
    state, means, instruction = inputs()
    assert route(router().double(), 2, state, means, instruction).dtype == torch.float64


@pytest.mark.parametrize("name", ["attention", "depth", "language"])
def test_temperature_divides_its_logits(name):
    """Each temperature T divides its logits by sqrt(d_k) T: halving T doubles the scale, and moves the route."""
    state, means, instruction = inputs()
    warm, cold = (router(**{f"{name}_temperature": temperature}) for temperature in (1.0, 0.5))
    cold.load_state_dict(warm.state_dict())
    assert getattr(warm, f"{name}_scale") == pytest.approx(DIM**-0.5)
    assert getattr(cold, f"{name}_scale") == pytest.approx(2 * DIM**-0.5)
    assert not torch.allclose(
        route(warm, 2, state, means, instruction), route(cold, 2, state, means, instruction), atol=1e-5
    )


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_initial_keys_and_priors(scale):
    """Entries have the standard deviation `router_scale`, and are the same numbers at every scale but for it."""
    settings = {"num_atoms": 64, "num_blocks": 64, "dim": 32}
    torch.manual_seed(0)
    scaled = router(**settings, router_scale=scale)
    torch.manual_seed(0)
    plain = router(**settings)
    for name in ("keys", "block_prior"):
        weight = getattr(scaled, name).weight
        assert weight.std().item() == pytest.approx(scale, rel=0.05)
        torch.testing.assert_close(weight, scale * getattr(plain, name).weight)
    assert torch.equal(scaled.atoms.weight, plain.atoms.weight)
