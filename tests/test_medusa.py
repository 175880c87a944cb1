"""Medusa heads draft: the laws of drafting, and that heads are fed the right hidden states."""

import json
import math
from functools import lru_cache

import pytest
import torch
from engines import HOST, PROMPT, engine_for, generate, reference_model
from hypothesis import given, settings
from hypothesis import strategies as st
from medusa_heads import random_heads, write_own, write_shared, write_vllm
from safetensors.torch import load_file, save_file
from test_speculation import IDS, TWO, chi_square, start
from tiny import DEEP

from offload_rt.config import AcceptRule, DraftConfig, DraftShape, KVPlace, SamplingConfig
from offload_rt.engine import Run
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.runner.tree import TokenTree
from offload_rt.sampling import Dice, make_generator, next_tokens, target_probs
from offload_rt.speculative import deciding
from offload_rt.speculative.base import Draft
from offload_rt.speculative.medusa.calibration import Calibration, write_calibration
from offload_rt.speculative.medusa.drafter import fill
from offload_rt.speculative.medusa.judge import Judge
from offload_rt.speculative.medusa.trees import DEFAULT_TREE, MedusaTree, named_trees
from offload_rt.speculative.verifier import draw, walk

HEADS, ANSWER = 3, 15
PROMPTS = [PROMPT * 2, PROMPT[:4], PROMPT[::-1]]


reference = lru_cache(1)(reference_model)


def draft_of(folder, **options):
    return DraftConfig(draft=f"medusa:{folder}", **options)


def fed_to_head(folder, ids):
    """[S, E] what transformers feeds the output head, and the head's weight and bias."""
    model, fed = reference(folder), []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: fed.append(args[0][0]))
    try:
        with torch.no_grad():
            model(torch.tensor([ids]))
    finally:
        handle.remove()
    return fed[0], head.weight.detach(), None if head.bias is None else head.bias.detach()


def knowing_heads(folder, model, prompts, answers):
    """Heads that know these answers by heart: their output heads interpolate the hidden states."""
    rows, wanted = [], [[] for _ in range(HEADS)]
    for prompt, answer in zip(prompts, answers, strict=True):
        hidden, *_ = fed_to_head(model, prompt + answer)
        rows.append(hidden[len(prompt) - 1 : -2].double())  # the state that made each token
        for head, tokens in enumerate(wanted):
            following = [*answer[1 + head :], *[0] * HEADS]
            tokens += following[: len(answer) - 1]
    rows, tensors = torch.cat(rows), {}
    for head, tokens in enumerate(wanted):
        targets = torch.nn.functional.one_hot(torch.tensor(tokens), 300).double()
        # Ridge: E = 64 numbers can tell so few places apart.
        gram = rows.T @ rows + 1e-6 * torch.eye(rows.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(gram, rows.T @ targets).T
        tensors[f"{head}.0.linear.weight"] = torch.zeros(64, 64)
        tensors[f"{head}.1.weight"] = weight.float().contiguous()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    return folder


@pytest.fixture(scope="module")
def llama(make_tiny):
    return make_tiny("llama", **TWO)


@pytest.fixture(scope="module")
def plain(llama):
    """Answers without drafting."""
    with engine_for(llama, prompts=PROMPTS, tokens=ANSWER) as engine:
        return generate(engine, PROMPTS, tokens=ANSWER)


@pytest.fixture(scope="module")
def heads(llama, plain, tmp_path_factory):
    """Heads of every kind."""
    root = tmp_path_factory.mktemp("heads")
    own = random_heads(own=True)
    return {
        "shared": write_shared(root / "shared"),
        "deep": write_shared(root / "deep", heads=5, layers=2, bias=False),
        "own": write_own(root / "own"),
        "common": write_vllm(root / "common", own, common=True),
        "truncated": write_vllm(
            root / "truncated",
            {n: t if "linear" in n else t[:40].clone() for n, t in own.items()},
            token_map=list(range(5, 205, 5)),
        ),
        "knowing": knowing_heads(root / "knowing", llama, PROMPTS[:2], plain[:2]),
    }


KINDS = ["shared", "deep", "own", "common", "truncated", "knowing"]
PLACES = [
    {},
    {"resident_layers": 1, "slots": 1},
    {"resident_layers": 0, "slots": 1, "kv": KVPlace.HOST, "kv_block_tokens": 8},
    {"kv": KVPlace.DISK, "kv_block_tokens": 8},
]


# Heads of every kind where all is resident; those that are always right, and those that know few
# tokens, in every place.
EVERYWHERE = [(kind, 0) for kind in KINDS]
EVERYWHERE += [(kind, number) for kind in ("knowing", "truncated") for number in (1, 2, 3)]


@pytest.mark.parametrize(("kind", "place"), EVERYWHERE)
def test_greedy_with_heads_equals_greedy_without(llama, plain, heads, kind, place):
    draft, place = draft_of(heads[kind], draft_tokens=20), PLACES[place]
    with engine_for(llama, prompts=PROMPTS, tokens=ANSWER, draft=draft, **place) as engine:
        for tokens in (ANSWER, 5, 1):
            answers = generate(engine, PROMPTS, tokens=tokens)
            assert answers == [answer[:tokens] for answer in plain]


@pytest.mark.parametrize("place", PLACES[:3], ids=["resident", "streamed", "kv-host"])
def test_heads_that_know_the_answer_are_always_right(llama, plain, heads, place):
    """They only are if each is fed the state of the last accepted token, in each sequence."""
    prompts = PROMPTS[:2]
    with engine_for(
        llama, prompts=prompts, tokens=ANSWER, draft=draft_of(heads["knowing"]), **place
    ) as engine:
        run = Run.start(engine, prompts, SamplingConfig(), decoding_config(ANSWER))
        run.prefill()
        while run.active:
            run.step()
        assert [s.emitted for s in run.sequences] == plain[:2]
        # One token of the prompt's pass, then three drafted and the model's own one in each.
        assert run.passes == 1 + math.ceil((ANSWER - 1) / (HEADS + 1))
        assert run.report().speculation.acceptance_per_depth == [1.0] * HEADS


def decoding_config(tokens):
    from offload_rt.config import GenerationConfig

    return GenerationConfig(max_tokens=tokens)


@pytest.mark.parametrize(
    ("family", "own"),
    [("llama", True), *((family, False) for family in ("llama", "gemma2", "phi", "granite"))],
)
def test_drafted_tokens_are_the_heads_likeliest(make_tiny, tmp_path, family, own):
    """Against transformers' hidden state and the formula: norms, tied heads, biases of a head."""
    model = make_tiny(family, **IDS)
    folder = write_shared(tmp_path, own=own)
    with engine_for(model, tokens=8, draft=draft_of(folder)) as engine:
        run = Run.start(engine, [PROMPT], SamplingConfig(), decoding_config(8))
        run.prefill()
        while run.active:
            ids = run.sequences[0].ids
            proposed = run.sequences[0].drafter.propose(ids, 10).tree
            check_proposal(proposed, model, ids[:-1], random_heads(own=own))
            run.step()


def check_proposal(proposed, model, ids, tensors):
    hidden, weight, bias = fed_to_head(model, ids)
    choices = sorted((c for c in named_trees()[DEFAULT_TREE] if len(c) <= HEADS), key=len)
    assert len(proposed) == len(choices) == 61
    for head in range(HEADS):
        inner = tensors[f"{head}.0.linear.weight"] @ hidden[-1] + tensors[f"{head}.0.linear.bias"]
        state = hidden[-1] + torch.nn.functional.silu(inner)
        own = tensors.get(f"{head}.1.weight")
        logits = own @ state if own is not None else weight @ state + (0 if bias is None else bias)
        best = logits.topk(10).indices.tolist()
        at_depth = [n for n in range(len(proposed)) if proposed.depths[n] == head + 1]
        assert {proposed.tokens[n] for n in at_depth} <= set(best)
        assert proposed.tokens[at_depth[0]] == best[0]
        if head == 0:
            assert [proposed.tokens[n] for n in at_depth] == best


def test_a_state_of_another_sequence_is_not_drafted_from(llama, heads):
    with engine_for(llama, tokens=8, draft=draft_of(heads["shared"])) as engine:
        run = Run.start(engine, [PROMPT], SamplingConfig(), decoding_config(8))
        run.prefill()
        (sequence,) = run.sequences
        assert len(sequence.drafter.propose(sequence.ids, 4).tree) > 0
        for ids in (sequence.ids[:-1], [*sequence.ids, 7], [7]):
            assert sequence.drafter.propose(ids, 4) == Draft()


def test_depth_and_nodes_are_kept_to(llama, heads):
    for nodes in (1, 7, 40):
        draft = draft_of(heads["shared"], draft_tokens=nodes)
        with engine_for(llama, tokens=8, draft=draft) as engine:
            run = Run.start(engine, [PROMPT], SamplingConfig(), decoding_config(8))
            run.prefill()
            (sequence,) = run.sequences
            whole = sequence.drafter.propose(sequence.ids, 9).tree
            assert len(whole) == nodes
            assert set(sequence.drafter.propose(sequence.ids, 1).tree.depths) == {1}
            assert sequence.drafter.propose(sequence.ids, 0).tree == TokenTree()


# --- passes over Medusa's trees ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_engines(make_tiny, heads):
    """A full-attention and a sliding-window model, streamed, with room for 63 nodes."""
    window = {"head_dim": 16, "sliding_window": 6}
    window["layer_types"] = ["sliding_attention", "full_attention"]
    options = {"tokens": 20, "resident_layers": 0, "slots": 1, "draft": draft_of(heads["shared"])}
    with (
        engine_for(make_tiny("llama", **TWO), **options) as one,
        engine_for(make_tiny("gemma2", **TWO, **window), **options) as other,
    ):
        yield [one, other]


@pytest.mark.parametrize("name", sorted(named_trees()))
def test_checking_a_named_tree_equals_checking_each_path(tiny_engines, name):
    shape = MedusaTree(named_trees()[name])
    tokens = [[3 + 20 * head + rank for rank in range(10)] for head in range(4)]
    tree = fill(shape, tokens, 9)
    for engine in tiny_engines:
        engine.truncate(0, 0)
        engine.forward([(0, PROMPT)], reuse=False)
        together = engine.check([(0, 77, tree)])[0]
        for path in shape.paths()[::6]:
            nodes = [n - 1 for n in path[1:] if n > 0]
            engine._caches[0].truncate(len(PROMPT))
            chain = TokenTree.chain([tree.tokens[n] for n in nodes])
            alone = engine.check([(0, 77, chain)])[0]
            rows = [0, *(n + 1 for n in nodes)]
            assert torch.allclose(together[rows], alone, atol=2e-4)
        engine._caches[0].truncate(len(PROMPT))


@pytest.mark.parametrize(
    ("kind", "place"),
    [*(("knowing", number) for number in range(4)), ("shared", 0), ("shared", 3)],
)
def test_after_a_drafted_answer_caches_equal_a_fresh_prefill(llama, heads, place, kind):
    prompts = PROMPTS[:2]
    draft, place = draft_of(heads[kind], draft_tokens=30), PLACES[place]
    with engine_for(llama, prompts=prompts, tokens=ANSWER + 1, draft=draft, **place) as engine:
        run = Run.start(engine, prompts, SamplingConfig(), decoding_config(ANSWER - 2))
        run.prefill()
        while run.active:
            run.step()
        lengths = [len(engine._cached_ids[i]) for i in range(2)]
        kept = [list(engine._cached_ids[i]) for i in range(2)]
        assert kept[0][: len(prompts[0])] == prompts[0] and min(lengths) > 15
        after = engine.forward([(0, [123]), (1, [45])], reuse=False)
        for index in range(2):
            engine.truncate(index, 0)
        fresh = engine.forward([(0, [*kept[0], 123]), (1, [*kept[1], 45])], reuse=False)
        assert torch.allclose(after, fresh, atol=2e-4)


# --- acceptance ----------------------------------------------------------------------------------


def upstream_greedy(shape, tokens, targets, *, padding_is_token_0):
    """Upstream's greedy rule over padded paths: accepted nodes of the best path."""
    best = []
    for path in shape.paths():
        accepted = []
        for before, node in zip(path, path[1:], strict=False):
            if node < 0 and not padding_is_token_0:
                break
            token = 0 if node < 0 else tokens[node - 1]
            if token != targets[before]:
                break
            accepted.append(node)
        if len(accepted) > len(best):
            best = accepted
    return best


@pytest.mark.parametrize("name", sorted(named_trees()))
@pytest.mark.parametrize("rule", list(AcceptRule))
def test_padding_is_never_accepted(name, rule):
    """The target wants token 0 after a leaf; upstream takes the padding behind it for one."""
    shape = MedusaTree(named_trees()[name])
    tokens = [[1 + 10 * head + rank for rank in range(10)] for head in range(4)]
    tree = fill(shape, tokens, 9)
    leaf = next(path for path in shape.paths() if -1 in path)
    nodes = [n for n in leaf if n > 0]
    logits = torch.zeros(len(tree) + 1, 50)
    logits[:, 0] = 9.0
    for before, node in zip(leaf, nodes, strict=False):
        logits[before, tree.tokens[node - 1]] = 18.0
    targets = [int(row.argmax()) for row in logits]
    wrong = upstream_greedy(shape, tree.tokens, targets, padding_is_token_0=True)
    assert -1 in wrong and len(wrong) > len(nodes)  # the control: the mistake would show here
    sampling = SamplingConfig(temperature=0.0 if rule is AcceptRule.GREEDY else 0.3, seed=1)
    drawn = draw(Draft(tree), logits, sampling, rule, Dice(make_generator(0, "cpu")), HOST).tolist()
    verdict = walk(Draft(tree), drawn, sampling, rule)
    assert [n + 1 for n in verdict.path] == nodes
    assert verdict.token == 0
    assert upstream_greedy(shape, tree.tokens, targets, padding_is_token_0=False) == nodes


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(named_trees())),
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.3, 2.0),
)
def test_typical_takes_the_longest_then_likeliest_of_the_padded_paths(name, seed, temperature):
    """Medusa's rule as the paper and upstream's `evaluate_posterior` put it, path by path."""
    shape = MedusaTree(named_trees()[name])
    generator = torch.Generator().manual_seed(seed)
    # 10 of 24: the likeliest token is often none of them, or thresholds would seldom decide.
    tokens = [torch.randperm(24, generator=generator)[:10].tolist() for _ in range(4)]
    tree = fill(shape, tokens, 9)
    logits = torch.randn(64, 24, generator=generator) * 3
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    entropy = -(probs * (probs + 1e-5).log()).sum(dim=-1)
    best = (0, 0.0)
    for path in shape.paths():
        score, length = 0.0, 0
        for before, node in zip(path, path[1:], strict=False):
            if node < 0:
                break
            p = float(probs[before, tree.tokens[node - 1]])
            if not p > min(0.09, 0.3 * math.exp(-float(entropy[before]))):
                break
            score, length = score + math.log(p), length + 1
        best = max(best, (length, score if length else 0.0))
    sampling = SamplingConfig(temperature=temperature, seed=0)
    drawn = draw(Draft(tree), logits, sampling, AcceptRule.TYPICAL, Dice(generator), HOST).tolist()
    verdict = walk(Draft(tree), drawn, sampling, AcceptRule.TYPICAL)
    rows = [0, *(n + 1 for n in verdict.path)]
    pairs = zip(rows, verdict.path, strict=False)
    found = sum(math.log(float(probs[row, tree.tokens[n]])) for row, n in pairs)
    assert len(verdict.path) == best[0]
    assert found == pytest.approx(best[1], abs=1e-3)
    assert verdict.token == int(logits[rows[-1]].argmax())


TOGETHER, RUNS = 45, 8
TOP_3 = SamplingConfig(temperature=1.0, top_k=3, seed=0)


def sampled_counts(llama, heads, names, runs=RUNS):
    """How often each three tokens came, with heads that guess the likeliest answer."""
    counts, accepted = torch.zeros(3, 3, 3), 0
    prompts = [PROMPT[:4]] * TOGETHER
    draft = draft_of(heads["knowing"], draft_tokens=6)
    room = {"prompts": prompts, "tokens": 8, "prefill_chunk_tokens": 512}  # in few calls
    with engine_for(llama, draft=draft, **room) as engine:
        for number in range(runs):
            seeded = SamplingConfig(temperature=1.0, top_k=3, seed=number * TOGETHER)
            run = Run.start(engine, prompts, seeded, decoding_config(4))
            run.prefill()
            while run.active:
                run.step()
            accepted += run.counts.accepted
            for a, b, c, _ in (s.emitted for s in run.sequences):
                at = tuple(names[p].index(t) for p, t in (((), a), ((a,), b), ((a, b), c)))
                counts[at] += 1
    assert accepted > TOGETHER  # or nothing would be shown
    return counts


@pytest.fixture(scope="module")
def expected(llama):
    """The target's own joint distribution of three tokens, and their ids."""
    probs, names = torch.zeros(3, 3, 3), {}
    with engine_for(llama, tokens=8) as engine:

        def after(tokens):
            found = target_probs(engine.forward([(0, PROMPT[:4] + tokens)], reuse=True), TOP_3)[0]
            names[tuple(tokens)] = ids = found.topk(3).indices.tolist()
            return found[ids], ids

        first, ids = after([])
        for i, a in enumerate(ids):
            second, following = after([a])
            for j, b in enumerate(following):
                probs[i, j] = first[i] * second[j] * after([a, b])[0]
    return probs, names


def test_sampling_with_heads_keeps_the_targets_distribution(llama, heads, expected):
    probs, names = expected
    counts = sampled_counts(llama, heads, names)
    assert chi_square(counts, probs * RUNS * TOGETHER) > 1e-4


def test_drawing_a_token_for_each_path_fails_the_same_test(llama, heads, expected, monkeypatch):
    """Upstream's nucleus mode: a node in several paths is drawn for several times."""

    def draw_per_path(draft, logits, sampling, rule, dice, device):
        def drawn(rows):
            numbers = torch.rand(len(rows), dtype=torch.float64, generator=dice.generator)
            return next_tokens(rows, sampling, numbers)

        found = drawn(logits)
        for node, parent in enumerate(draft.tree.parents):
            for _ in range(4):
                again = drawn(logits[parent + 1 : parent + 2])
                if int(again) == draft.tree.tokens[node]:
                    found[parent + 1] = again
        return found

    monkeypatch.setattr(deciding, "draw", draw_per_path)
    probs, names = expected
    counts = sampled_counts(llama, heads, names, 4)  # it shows in fewer
    assert chi_square(counts, probs * 4 * TOGETHER) < 1e-6


def test_sampled_answers_are_repeatable(llama, heads):
    sampling = SamplingConfig(temperature=0.9, top_p=0.95, seed=11)
    for rule in (AcceptRule.LOSSLESS, AcceptRule.TYPICAL):
        draft = draft_of(heads["knowing"], accept=rule)
        with engine_for(llama, tokens=ANSWER, draft=draft) as engine:
            answers = [start(engine, ANSWER, sampling).sequences[0].emitted for _ in range(2)]
        assert answers[0] == answers[1]


def test_a_seeded_answer_is_that_without_heads(llama, heads):
    sampling = SamplingConfig(temperature=0.9, top_p=0.95, seed=11)
    runs = []
    for draft in (DraftConfig(), draft_of(heads["knowing"])):
        with engine_for(llama, tokens=ANSWER, draft=draft) as engine:
            runs.append(start(engine, ANSWER, sampling))
    assert runs[0].sequences[0].emitted == runs[1].sequences[0].emitted
    assert runs[1].counts.accepted > 0


# --- calibration ---------------------------------------------------------------------------------


def test_kept_states_are_those_that_made_the_answer(llama, plain, heads):
    """What calibration listens to, against transformers' states."""
    prompts = PROMPTS[:2]
    draft = draft_of(heads["knowing"])
    with engine_for(llama, prompts=prompts, tokens=ANSWER, draft=draft) as engine:
        kept = [[], []]
        engine.medusa.on_kept = lambda index, rows: kept[index].extend(rows)
        assert generate(engine, prompts, tokens=ANSWER) == plain[:2]
        for prompt, answer, states in zip(prompts, plain, kept, strict=False):
            hidden, *_ = fed_to_head(llama, prompt + answer)
            states = torch.stack(states)[:ANSWER]
            assert torch.allclose(states, hidden[len(prompt) - 1 :][: len(states)], atol=1e-4)
            judge = Judge(engine.medusa.ranked, HEADS, 4)
            judge.add(list(states), answer)
            counted = judge.result("m", "float32")
            assert counted.places == tuple(ANSWER - 1 - head for head in range(HEADS))
            assert [row[0] for row in counted.accuracy] == [1.0] * HEADS


def test_a_calibration_next_to_the_heads_shapes_the_tree(llama, plain, heads, tmp_path):
    folder = write_own(tmp_path)
    hits = ((1, 0, 0, 0, 0, 9), (0, 5), (0, 0, 4))
    write_calibration(
        Calibration(model="m", dtype="float32", places=(10, 10, 10), hits=hits), folder
    )
    draft = draft_of(folder, draft_tokens=3)
    with engine_for(llama, prompts=PROMPTS, tokens=ANSWER, draft=draft) as engine:
        assert engine.medusa.tree.choices == ((5,), (5, 1), (5, 1, 2))
        hidden = torch.ones(2, 64)
        all_three = engine.medusa.ranked(hidden, 7)
        assert all_three.shape == (2, 3, 7)
        assert torch.equal(engine.medusa.ranked(hidden, 7, 2), all_three[:, :2])
        assert generate(engine, PROMPTS, tokens=ANSWER) == plain


def test_heads_that_are_never_right_draft_nothing(llama, plain, tmp_path):
    folder = write_shared(tmp_path)
    nothing = Calibration(model="m", dtype="f", places=(9, 9, 9), hits=((0,), (0,), (0,)))
    write_calibration(nothing, folder)
    with engine_for(llama, prompts=PROMPTS, tokens=ANSWER, draft=draft_of(folder)) as engine:
        assert generate(engine, PROMPTS, tokens=ANSWER) == plain


# --- fitting -------------------------------------------------------------------------------------


def test_memory_with_heads_stays_within_the_plan(make_tiny, tmp_path):
    config = {"hidden_size": 256, "intermediate_size": 1024, "dtype": "bfloat16", **IDS}
    model = make_tiny("llama", **config, **DEEP, vocab_size=4000)
    folder = write_own(tmp_path, heads=5, size=256, rows=4000)
    draft = draft_of(folder)
    with engine_for(model, tokens=20, draft=draft, resident_layers=1, slots=2) as engine:
        generate(engine, tokens=20)
        memory, demand = engine.memory(), engine.placement.demand
        # Stored as fp32, computed in bf16: 5 x (256 x 256 + 256 + 4000 x 256) x 2 bytes.
        assert demand.drafter_bytes >= memory.ledger["Medusa heads"] >= 10897920
        assert memory.device_peak_bytes <= memory.device_planned_bytes


def test_a_full_model_with_heads_inside_is_model_and_heads(llama, plain, tmp_path):
    """v1.0: the heads' tensors are among the model's."""
    tensors = load_file(llama / "model.safetensors")
    tensors |= {f"medusa_head.{n}": t for n, t in random_heads(own=True).items()}
    config = json.loads((llama / "config.json").read_text())
    config |= {"medusa_num_heads": 5, "medusa_num_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with engine_for(tmp_path, prompts=PROMPTS, tokens=ANSWER, draft=draft_of(tmp_path)) as engine:
        assert engine.medusa.heads == 3
        assert generate(engine, PROMPTS, tokens=ANSWER) == plain


def padded(tensors, rows):
    return {
        n: torch.cat([t, 50 * t[:rows]]) if "linear" not in n else t for n, t in tensors.items()
    }


def test_ids_only_the_heads_know_are_never_drafted(llama, plain, tmp_path):
    save_file(padded(random_heads(own=True), 20), tmp_path / "medusa_lm_head.safetensors")
    with engine_for(llama, prompts=PROMPTS, tokens=ANSWER, draft=draft_of(tmp_path)) as engine:
        run = Run.start(engine, PROMPTS, SamplingConfig(), decoding_config(4))
        run.prefill()
        tree = run.sequences[0].drafter.propose(run.sequences[0].ids, 9).tree
        assert len(tree) == 61 and max(tree.tokens) < 300
        assert generate(engine, PROMPTS, tokens=ANSWER) == plain


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda f: write_shared(f, size=32), ConfigError, "state of 32 numbers, .* has 64"),
        (lambda f: write_own(f, rows=900), ConfigError, "know 900 tokens, .* 300"),
        (
            lambda f: write_vllm(f, random_heads(own=True), token_map=[1, 2]),
            ConfigError,
            "300 rows of which its token_map uses 2: .*--to vllm",
        ),
        (
            lambda f: write_vllm(f, random_heads(own=True, rows=2), token_map=[1, 300]),
            CheckpointError,
            "token_map names tokens from 1 to 300, the model knows 0 to 299",
        ),
        (
            lambda f: write_vllm(f, random_heads(own=True, rows=2), token_map=[1, -3]),
            CheckpointError,
            "token_map names tokens from -3 to 1",
        ),
    ],
)
def test_heads_of_another_model_are_refused_with_the_numbers(
    llama, tmp_path, write, error, message
):
    folder = write(tmp_path)
    with pytest.raises(error, match=message), engine_for(llama, draft=draft_of(folder)):
        pass


def test_more_nodes_than_there_is_a_tree_for_are_refused(llama, tmp_path):
    folder = write_shared(tmp_path, heads=2)
    message = "--draft-tokens is 39, the tree of these heads has 38 nodes: lower it, or"
    with (
        pytest.raises(ConfigError, match=message),
        engine_for(llama, draft=draft_of(folder, draft_tokens=39)),
    ):
        pass
    for more in ({"draft_tokens": 38}, {}):  # the default is as many as there are
        with engine_for(llama, draft=draft_of(folder, **more)) as engine:
            assert len(engine.medusa.tree) == 38
    hits = (tuple([1] * 30), tuple([1] * 30))
    write_calibration(Calibration(model="m", dtype="f", places=(30, 30), hits=hits), folder)
    with engine_for(llama, draft=draft_of(folder, draft_tokens=300)) as engine:
        assert (len(engine.medusa.tree), engine.medusa.tree.ranks) == (300, 30)


def test_heads_with_numbers_that_are_not_finite_are_refused(llama, tmp_path):
    tensors = random_heads()
    tensors["2.0.linear.bias"][7] = float("nan")
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    with (
        pytest.raises(CheckpointError, match=r"2\.0\.linear\.bias holds numbers that are not"),
        engine_for(llama, draft=draft_of(tmp_path)),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "medusa"}, "is not known"),
        ({"draft": "medusa:"}, "is not known"),
        ({"draft": "medusa:x", "shape": DraftShape.TREE}, "is for drafting with a MODEL"),
        ({"draft": "medusa:x", "draft_tokens": 0}, "--draft-tokens is 0"),
    ],
)
def test_options_that_mean_nothing_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        DraftConfig(**options)
