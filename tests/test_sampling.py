"""Sampling: equal to transformers' warpers, right in distribution, never waits for the device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload_rt.config import SamplingConfig
from offload_rt.sampling import (
    NO_TOKEN,
    Dice,
    likeliest,
    make_generator,
    next_tokens,
    pick,
    resolve_seed,
    sample,
    target_probs,
)

SAMPLED = SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02)
ONE_FILTER_EACH = [
    SamplingConfig(temperature=0.7, **one) for one in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1})
]


def warped_by_transformers(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Probabilities of `model.generate(do_sample=True)` for these settings."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(config.temperature))])
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        warpers.append(MinPLogitsWarper(config.min_p))
    return warpers(None, logits.float()).softmax(dim=-1)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(1, 300),
    spread=st.floats(0.1, 20.0),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 320),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
)
def test_target_probs_equal_transformers_warpers(
    seed, vocabulary, spread, temperature, top_k, top_p, min_p
):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator) * spread
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    ours, theirs = target_probs(logits, config), warped_by_transformers(logits, config)

    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.sum(-1), torch.ones(3))
    # A token within rounding of a border may fall on either side of it: accept a row that equals
    # transformers' just below or just above the border.
    for row in range(3):
        near = [theirs[row]]
        for shift in (-1e-5, 1e-5):
            moved = SamplingConfig(
                temperature=temperature,
                top_k=top_k,
                top_p=min(1.0, top_p + shift) if top_p < 1.0 else 1.0,
                min_p=min_p * (1 + shift),
            )
            near.append(warped_by_transformers(logits[row : row + 1], moved)[0])
        assert any(torch.allclose(ours[row], other, atol=1e-5) for other in near)


def test_top_p_takes_the_smallest_set_and_the_lower_id_first():
    config = SamplingConfig(temperature=1.0, top_p=0.5)
    assert target_probs(torch.zeros(1, 8), config).tolist() == [[0.25] * 4 + [0.0] * 4]


def test_top_k_keeps_ties_as_transformers_does():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]])
    config = SamplingConfig(temperature=1.0, top_k=2)
    probs = target_probs(logits, config)
    assert (probs > 0).tolist() == [[True, False, True, True, True]]
    torch.testing.assert_close(probs, warped_by_transformers(logits, config))


@pytest.mark.parametrize("temperature", [1e-37, 1e-3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_settings_keep_a_token(temperature, dtype):
    logits = torch.tensor([[50.0, -torch.inf, 49.0, 60000.0]], dtype=dtype)
    config = SamplingConfig(temperature=temperature, top_k=1, top_p=1e-9, min_p=0.999)
    assert target_probs(logits, config).tolist() == [[0.0, 0.0, 0.0, 1.0]]


@given(
    vocabulary=st.integers(1, 700),
    levels=st.integers(1, 50),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
@settings(max_examples=60, deadline=None)
def test_the_likeliest_is_the_first_largest(vocabulary, levels, seed, dtype):
    """Also where logits are a slice of wider rows, as those of a padded vocabulary are."""
    dice = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (3, vocabulary + 5), generator=dice).to(dtype)[:, :vocabulary]
    rows = logits.tolist()
    assert likeliest(logits).tolist() == [row.index(max(row)) for row in rows]


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[0.0, 7.0, 7.0, 1.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.bfloat16)
    config = SamplingConfig()
    numbers = torch.rand(2, dtype=torch.float64)
    assert next_tokens(logits, config, numbers).tolist() == [1, 0]
    assert target_probs(logits, config).tolist() == [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


@given(seed=st.integers(0, 2**31), vocabulary=st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_sampling_a_one_hot_row_gives_its_token(seed, vocabulary):
    generator = make_generator(seed, "cpu")
    logits = torch.randn(64, vocabulary, generator=generator)
    greedy = target_probs(logits, SamplingConfig())
    assert torch.equal(sample(greedy, generator), logits.argmax(-1))


PROBS = torch.tensor([0.3, 0.0, 0.25, 0.2, 0.0, 0.15, 0.06, 0.03, 0.01, 0.0])
DRAWS = 200_000
# 99.99 % quantile of chi-square with 6 degrees of freedom (seven tokens are possible).
CHI_SQUARE_LIMIT = 27.86


def drawn_counts(probs: torch.Tensor, seed: int) -> torch.Tensor:
    tokens = sample(probs.expand(DRAWS, -1), make_generator(seed, "cpu"))
    return torch.bincount(tokens, minlength=probs.numel()).double()


def test_drawn_tokens_follow_the_distribution():
    counts = drawn_counts(PROBS, seed=1)
    possible = PROBS > 0
    assert counts[~possible].sum() == 0
    assert chi_square(counts[possible], PROBS[possible]) < CHI_SQUARE_LIMIT


def test_negative_control_a_wrong_distribution_is_noticed():
    possible = PROBS > 0
    wrong = PROBS + torch.where(possible, 0.002, 0.0)
    counts = drawn_counts(wrong / wrong.sum(), seed=1)
    assert chi_square(counts[possible], PROBS[possible]) > CHI_SQUARE_LIMIT


def test_rare_tokens_get_their_share():
    """50,000 tokens of 1e-8 behind a likely one: fp32 sums would never reach them."""
    rare, draws = 50_000, 100
    probs = torch.full((rare + 1,), 1e-8)
    probs[0] = 1.0 - rare * 1e-8
    total = probs.double().sum()
    # Evenly spaced draws from the end of the distribution that belongs to the rare tokens.
    share = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    uniform = 1.0 - share * (1.0 - probs[0].double() / total)
    tokens = pick(probs.expand(draws, -1), uniform)
    torch.testing.assert_close(tokens, (rare * (1.0 - share)).long(), atol=2, rtol=0)


def test_edges_of_the_uniform_draw_stay_on_possible_tokens():
    probs = torch.tensor([[0.0, 0.4, 0.0, 0.6, 0.0]])
    for number, token in ((0.0, 1), (1.0 - 2**-53, 3)):
        for scale in (0.3, 1.0, 1.0 + 2**-23, 1.7, 2.0, 3.0):
            drawn = pick(probs * scale, torch.tensor([number], dtype=torch.float64))
            assert drawn.tolist() == [token]


def test_a_seed_gives_the_same_tokens_and_another_seed_others():
    logits = torch.randn(256, 100, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(temperature=1.0)
    first, again, other = (
        next_tokens(logits, config, Dice(make_generator(seed, "cpu")).ahead(256))
        for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(counts=st.lists(st.integers(1, 300), max_size=20), ahead=st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_the_number_of_a_place_does_not_depend_on_who_looked_at_it(counts, ahead):
    dice, all_at_once = (Dice(make_generator(5, "cpu")) for _ in range(2))
    numbers = all_at_once.ahead(sum(counts))
    for count in counts:
        dice.ahead(ahead)
        assert torch.equal(dice.ahead(count), numbers[:count])
        dice.advance(count)
        numbers = numbers[count:]


def test_resolve_seed_keeps_a_given_one_and_draws_others():
    assert resolve_seed(0) == 0
    drawn = {resolve_seed(None) for _ in range(50)}
    assert len(drawn) == 50
    assert all(0 <= seed < 2**63 for seed in drawn)
    make_generator(max(drawn), "cpu")


@given(
    rows=st.integers(1, 4),
    vocabulary=st.one_of(st.integers(1, 700), st.sampled_from([256, 384, 3000])),
    data=st.data(),
    bad=st.sampled_from([torch.nan, torch.inf]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    config=st.sampled_from(
        [SamplingConfig(), SAMPLED, SamplingConfig(temperature=1.3), *ONE_FILTER_EACH]
    ),
)
@settings(max_examples=120, deadline=None)
def test_one_bad_number_anywhere_takes_the_token_of_its_row(
    rows, vocabulary, data, bad, dtype, config
):
    """Masked ids, which are -inf, and the other rows are not touched."""
    dice = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, generator=dice).to(dtype)
    masked = data.draw(st.lists(st.integers(1, vocabulary), max_size=3))
    logits[:, [i for i in masked if i < vocabulary]] = -torch.inf
    uniform = torch.rand(rows, dtype=torch.float64, generator=dice)
    good = next_tokens(logits, config, uniform)
    assert (good >= 0).all() and (good < vocabulary).all()
    row, place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, vocabulary - 1))
    logits[row, place] = bad
    good[row] = NO_TOKEN
    assert torch.equal(next_tokens(logits, config, uniform), good)


@pytest.mark.parametrize("config", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("vocabulary", [5, 300])
def test_nothing_but_minus_infinity_gives_no_token(config, vocabulary):
    logits = torch.full((2, vocabulary), -torch.inf)
    logits[1, 3] = 0.0
    tokens = next_tokens(logits, config, torch.rand(2, dtype=torch.float64))
    assert tokens.tolist() == [NO_TOKEN, 3]


@pytest.mark.parametrize("config", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_nothing_waits_for_the_device(config):
    """On fake tensors any read of a value raises, which the first lines make sure of."""
    with FakeTensorMode():
        logits = torch.empty(3, 100)
        with pytest.raises(DataDependentOutputException):
            logits.sum().item()
        tokens = next_tokens(logits, config, Dice(torch.Generator()).ahead(3))
        probs = target_probs(logits, config)
    assert (tokens.shape, tokens.dtype) == ((3,), torch.int64)
    assert (probs.shape, probs.dtype) == ((3, 100), torch.float32)


@pytest.mark.parametrize("config", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_probabilities_stay_on_their_device(config):
    with FakeTensorMode():
        logits = torch.empty(3, 100, device="cuda:0", dtype=torch.bfloat16)
        assert target_probs(logits, config).device == torch.device("cuda:0")
