"""Drafting changes no bit of a streamed bf16 model's logits, whoever drafts.

Few ids and many nodes, so that what is drafted at random is accepted now and then.
"""

import json
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from eagle3_models import TAPS, write_head
from engines import PROMPT, engine_for
from medusa_heads import write_shared
from mtp_models import write_mtp

from offload_rt.config import (
    DraftConfig,
    DraftShape,
    Exact,
    GenerationConfig,
    HomeKind,
    KVPlace,
    RetrievalConfig,
    SamplingConfig,
    Wire,
)
from offload_rt.engine import Run, decoding
from offload_rt.model import packer
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.rounded_files import write_rounded
from offload_rt.model.wire import wired

VOCAB, ANSWER = 16, 16
PROMPTS = [[t % VOCAB for t in PROMPT * 3 + PROMPT[:8]], [t % VOCAB for t in PROMPT[::-1]]]
assert len(PROMPTS[0]) < 64 < len(PROMPTS[0]) + ANSWER - 1
# Odd widths, more inputs than a block of oneDNN's, and heads whose groups fill no tile.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 1419,
    "num_hidden_layers": 1 + max(TAPS),
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
EVEN = {  # what kernels multiply as it is stored
    "hidden_size": 256,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
}
HYBRID = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
}
STREAMED = {"exact": Exact.ON, "resident_layers": 1, "slots": 1}
ON_DISK = STREAMED | {"kv": KVPlace.DISK, "kv_block_tokens": 20}
IN_12_BITS = STREAMED | {"home": HomeKind.HOST, "wire": Wire.LOSSLESS}
SAMPLINGS = SamplingConfig(), SamplingConfig(temperature=1.0, seed=3)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What is found of products here is kept from the user's, and once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, also in 12 bits, with heads of both kinds; a hybrid; a small one; one in 4 bits."""
    root = tmp_path_factory.mktemp("exact")
    target = write_mtp(root / "target", "llama", **SIZES)
    checkpoint = open_checkpoint(target)
    for name in ("int4", "packed"):
        (root / name).mkdir()
    even = open_checkpoint(write_mtp(root / "even", "llama", **(SIZES | EVEN)))
    write_rounded(wired(even, Wire.INT4), root / "int4", lambda nbytes: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "SMALLEST_WEIGHTS", 512)
        packer.pack(checkpoint, root / "packed", lambda nbytes: None)
    return {
        "target": target,
        "int4": root / "int4",
        "packed": root / "packed",
        "hybrid": write_mtp(root / "hybrid", "qwen3_5_text", **(SIZES | HYBRID)),
        "small": write_mtp(root / "small", "llama", **(SIZES | {"num_hidden_layers": 1})),
        "heads": write_shared(root / "heads", size=SIZES["hidden_size"], heads=3),
        "head": write_head(root / "head", target, seed=13),
    }


TREE = {"shape": DraftShape.TREE, "draft_tokens": 16}
CHAIN = {"shape": DraftShape.CHAIN, "draft_tokens": 4}
OVER_RETRIEVAL = {
    "draft_tokens": 6,
    "inner_tokens": 4,
    "retrieval": RetrievalConfig(budget_tokens=32, chunk_tokens=4, rebuild_tokens=7),
}
TREES = {
    "ngram": {"draft": "ngram", "draft_tokens": 16},
    "model": {"draft": "model:{target}", **TREE},
    "self": {"draft": "self", **TREE},
    "medusa": {"draft": "medusa:{heads}", "draft_tokens": 16},
    "mtp": {"draft": "mtp", **TREE},
    "eagle3": {"draft": "eagle3:{head}", **TREE},
}
DRAFTERS = TREES | {
    "mtp chain": {"draft": "mtp", **CHAIN},
    "eagle3 chain": {"draft": "eagle3:{head}", **CHAIN},
    "triforce": {"draft": "triforce", **OVER_RETRIEVAL},
    "triforce over a model": {"draft": "triforce:{small}", **OVER_RETRIEVAL},
}


def drafted_by(name, folders):
    options = DRAFTERS[name]
    return DraftConfig(**options | {"draft": options["draft"].format(**folders)})


def rows_of_answers(engine, monkeypatch, sampling=SAMPLINGS[0], sizes=None):
    """Tokens of the answers, and the logits that each came from: [S, V] of every answer.

    Args:
        engine: answers two prompts at once.
        monkeypatch: has what decides watched.
        sampling: how tokens are drawn.
        sizes: gives most nodes of each draft.
    """
    kept = {}

    def watched(checked, device, rule):
        before = [one.logits.clone() for one in checked]  # deciding uses them up
        verdicts = decide(checked, device, rule)
        for one, logits, verdict in zip(checked, before, verdicts, strict=True):
            rows = [0, *(node + 1 for node in verdict.path)]
            kept.setdefault(id(one.dice), []).append(logits[rows])
        return verdicts

    decide = decoding.decide
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decide", watched)
        run = Run.start(engine, PROMPTS, sampling, GenerationConfig(max_tokens=ANSWER))
        run.prefill()
        while run.active:
            for sequence in run.active if sizes else ():
                sequence.request = replace(sequence.request, draft_tokens=sizes())
            run.step()
    rows = [torch.cat(kept[id(sequence.dice)]) for sequence in run.sequences]
    return [sequence.emitted for sequence in run.sequences], rows, run.counts


@contextmanager
def opened(folder, **config):
    with engine_for(folder, prompts=PROMPTS, tokens=ANSWER, **config) as engine:
        yield engine


@pytest.fixture(scope="module")
def undrafted(folders):
    """Of each model and sampling, what is answered without drafts; nothing of it is streamed."""
    made = {}

    def answered(name, sampling=SAMPLINGS[0]):
        if name not in made:
            with (
                opened(folders[name], exact=Exact.ON) as engine,
                pytest.MonkeyPatch.context() as patch,
            ):
                made[name] = [rows_of_answers(engine, patch, one) for one in SAMPLINGS]
        return made[name][SAMPLINGS.index(sampling)]

    return answered


def same_rows(made, expected):
    return made[0] == expected[0] and all(map(torch.equal, made[1], expected[1]))


CASES = [("target", name, STREAMED) for name in DRAFTERS]
CASES += [("target", name, ON_DISK) for name in ("mtp", "triforce")]
CASES += [("target", "model", {"exact": Exact.ON})]
CASES += [("hybrid", name, STREAMED) for name in ("mtp", "mtp chain")]
OTHER_BYTES = [("int4", STREAMED), ("packed", STREAMED), ("packed", IN_12_BITS)]
CASES += [(model, "ngram", config) for model, config in OTHER_BYTES]


@pytest.mark.parametrize(
    ("model", "name", "config"),
    CASES,
    ids=[f"{model}-{name}-{list(config)[-1]}" for model, name, config in CASES],
)
def test_drafting_changes_no_bit_of_a_greedy_answer(
    model, name, config, folders, undrafted, monkeypatch
):
    draft, block = drafted_by(name, folders), config.get("kv_block_tokens", 1)
    for length in map(len, PROMPTS):  # a block ends within each answer
        assert length // block < (length + ANSWER - 1) // block
    with opened(folders[model], draft=draft, **config) as engine:
        assert engine.exact.on
        made = rows_of_answers(engine, monkeypatch)
        assert same_rows(made, undrafted(model))
        assert made[2].accepted > 0
        if (model, config) == ("target", STREAMED) and name in TREES:
            sizes_of_trees_change_nothing(engine, undrafted(model, SAMPLINGS[1]), monkeypatch)


def sizes_of_trees_change_nothing(engine, expected, monkeypatch):
    """Of 1 to 16 nodes, another number in each step, as measured times may choose them."""
    assert not engine.draft.answers_rest_on_it
    numbers = random.Random(7)
    made = rows_of_answers(engine, monkeypatch, SAMPLINGS[1], lambda: numbers.randint(1, 16))
    assert same_rows(made, expected)
    assert made[2].accepted > 0


@pytest.mark.parametrize(("model", "config"), OTHER_BYTES)
def test_a_seeded_answer_does_not_depend_on_the_sizes_of_trees(
    model, config, folders, undrafted, monkeypatch
):
    """Weights in other bytes; the plain ones above, with each drafter of trees."""
    with opened(folders[model], draft=drafted_by("model", folders), **config) as engine:
        sizes_of_trees_change_nothing(engine, undrafted(model, SAMPLINGS[1]), monkeypatch)


def test_a_packed_model_answers_as_the_one_it_was_packed_from(undrafted):
    for sampling in SAMPLINGS:
        assert same_rows(undrafted("packed", sampling), undrafted("target", sampling))


def test_a_seeded_answer_is_the_same_whoever_auto_lets_draft(make_tiny, offload_run):
    folder = make_tiny("llama", tokenizer=True, **SIZES | {"vocab_size": 300})
    base = ("generate", folder, "-p", "the quick brown fox " * 6, "-n", ANSWER, "--exact", "on")
    sampled = (*base, "--temperature", 1, "--seed", 7, "--resident-layers", 1, "--json")
    ways = "none", "auto", f"auto:{folder}"
    made = [json.loads(offload_run(*sampled, "--draft", way).out) for way in ways]
    assert [one["token_ids"] for one in made] == [made[0]["token_ids"]] * len(ways)
    assert made[-1]["speculation"]["drafted"] > 0


def test_without_row_invariance_bits_depend_on_drafts(folders, monkeypatch):
    made = []
    for more in ({}, {"draft": drafted_by("mtp", folders)}):
        with opened(folders["target"], **STREAMED | {"exact": Exact.OFF}, **more) as engine:
            made.append(rows_of_answers(engine, monkeypatch))
    assert not same_rows(*made)
