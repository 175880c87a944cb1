"""Training of Medusa heads: labels, cached states, resuming, and what is learnt."""

import json
import math
import os
import resource
import signal
import sys
from pathlib import Path

import forks
import pytest
import torch
from engines import ROOMY, engine_for, reference_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from offload_rt.config import KVPlace, RuntimeConfig
from offload_rt.device.cpu import CpuDevice
from offload_rt.errors import CapacityError, CheckpointError, ConfigError
from offload_rt.kv.base import KVShape
from offload_rt.kv.passing import PassingKV
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.speculative.medusa.names import LmHead
from offload_rt.text import load_tokenizer
from offload_rt.training.answers import AnswerFile, batches
from offload_rt.training.cache import CacheShape, StateCache
from offload_rt.training.corpus import NO_LABEL, Dropped, Encoder, Sample, pack
from offload_rt.training.frozen import FrozenTrainer
from offload_rt.training.loss import Score, rate_factor, token_loss
from offload_rt.training.settings import CorpusConfig, JointConfig, Method, TrainConfig
from offload_rt.training.state import Recipe
from offload_rt.training.states import Reading, read_all, reading_engine
from offload_rt.training.talks import Talk, split
from offload_rt.training.vocabulary import OutputHead, choose, new_heads, shape_of
from offload_rt.writing import replacing

HERE = Path(__file__).parent
RUNTIME = RuntimeConfig(device="cpu", device_limit_bytes=ROOMY, prefill_chunk_tokens=5)
WIDTH, HEADS, TOKENS = 16, 3, 40


@st.composite
def samples(draw):
    """A text of distinct tokens with a few answers in it."""
    length = draw(st.integers(3, 30))
    cuts = sorted(draw(st.sets(st.integers(1, length), min_size=2, max_size=6)))
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    return Sample(tuple(range(100, 100 + length)), tuple(pairs))


@given(samples(), st.integers(1, 6))
def test_labels_are_the_tokens_that_followed(sample, heads):
    """Against a formula that looks at one answer as decoding would meet it, token by token."""
    labels, places = sample.labels(heads), sample.places
    assert labels.shape == (len(places), heads)
    expected = []
    for start, stop in sample.answers:
        answer = list(sample.ids[start:stop])
        for made in range(len(answer)):  # the state that made answer[made]
            expected.append((sample.ids[start + made - 1], answer[made + 1 :]))
    found = [(sample.ids[place], row) for place, row in zip(places, labels.tolist(), strict=True)]
    for (token, row), (read, following) in zip(found, expected, strict=True):
        assert token == read
        padded = following[:heads] + [NO_LABEL] * (heads - len(following))
        assert row == padded


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 80))
def test_packing_keeps_order_and_the_limit(lengths, limit):
    texts = [Sample((0,) * n, ()) for n in lengths]
    found = pack(texts, limit)
    assert [n for batch in found for n in batch] == list(range(len(texts)))
    for batch in found:
        total = sum(lengths[n] for n in batch)
        assert total <= limit or len(batch) == 1
    for one, two in zip(found, found[1:], strict=False):  # nothing would have fitted before
        assert sum(lengths[n] for n in one) + lengths[two[0]] > limit


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.floats(0.0, 0.9),
    st.integers(0, 5),
)
def test_what_is_held_out_was_never_trained_on(prompts, share, seed):
    talks = [
        Talk(line=n, turns=(("user", f"prompt {p}"), ("assistant", f"answer {n}")))
        for n, p in enumerate(prompts, start=1)
    ]
    train, held = split(talks, share, seed)
    assert sorted(t.line for t in [*train, *held]) == [t.line for t in talks]
    assert not {t.prompt for t in train} & {t.prompt for t in held}
    assert train
    distinct = len(set(prompts))
    wanted = min(distinct - 1, max(1, round(share * distinct))) if share else 0
    assert len({t.prompt for t in held}) == wanted


def corpus_of(vocab=300, count=7, seed=3):
    """Random texts with an answer, of 4 to 30 tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(4, 31, (1,), generator=generator))
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        found.append(Sample(tuple(ids), ((length // 2, length),)))
    return found


def cached(folder, model, texts, *, heads=HEADS, pass_tokens=40, **config):
    """Hidden states of texts, read by the engine."""
    checkpoint = open_checkpoint(model)
    dtype = str(checkpoint.config.dtype)
    folder.mkdir(exist_ok=True)
    shape = CacheShape(width=checkpoint.config.hidden_size, heads=heads, dtype=dtype)
    reading = Reading(texts, StateCache(folder, "train", shape))
    runtime = RuntimeConfig(
        **({"device": "cpu", "device_limit_bytes": ROOMY, "prefill_chunk_tokens": 5} | config)
    )
    with reading_engine(checkpoint, runtime, [reading], pass_tokens) as engine:
        assert engine.config.kv is KVPlace.NONE
        crossed = len(reading.batches(pass_tokens)) * engine.bytes_per_pass
        read_all(engine, [reading], pass_tokens)
        assert reading.batches(pass_tokens) == []
        if not engine.placement.resident:  # once per batch, and what waits for the next
            copied = engine.device.copy.statistics().bytes_copied
            assert crossed <= copied <= crossed + engine.placement.slots * engine.bytes_per_pass / 3
        assert engine.device.peak_bytes() <= engine.placement.device_bytes
    return reading.cache


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gemma2", {"head_dim": 16, "sliding_window": 6}),  # squashes its logits
        ("granite", {}),  # scales them
        ("gpt_neox", {"num_key_value_heads": 4}),
    ],
)
def test_cached_states_are_what_transformers_feeds_its_head(
    make_tiny, tmp_path, model_type, config
):
    model, texts = make_tiny(model_type, **config), corpus_of()
    cache = cached(tmp_path / "c", model, texts)
    hidden, labels = cache.read([range(cache.rows)])
    reference, fed = reference_model(model), []
    reference.get_output_embeddings().register_forward_pre_hook(lambda _, x: fed.append(x[0][0]))
    with torch.no_grad():
        for text in texts:
            reference(torch.tensor([text.ids]))
    expected = torch.cat([x[text.places] for x, text in zip(fed, texts, strict=True)])
    torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=2e-4)
    assert torch.equal(labels, torch.cat([text.labels(HEADS) for text in texts]))


def test_every_text_begins_at_position_0(tiny_model, monkeypatch):
    """Rotary positions are relative, so states alone would not show it."""
    texts = [[5, 6, 7], [8, 9]]
    with engine_for(tiny_model, prompts=texts, tokens=0, kv=KVPlace.NONE) as engine:
        seen = []
        hidden = engine.network.hidden
        monkeypatch.setattr(engine.network, "hidden", lambda b: seen.append(b) or hidden(b))
        found = engine.hidden(texts, [[2], [0, 1]])
        assert seen[0].positions.tolist() == [0, 1, 2, 0, 1]
        assert seen[0].logit_rows.tolist() == [2, 3, 4] and found.shape == (3, 64)
        assert torch.equal(engine.hidden(texts, [[2], [0, 1]]), found)  # nothing was kept


def test_streamed_states_are_resident_states(make_tiny, tmp_path):
    model, texts = make_tiny("llama", num_hidden_layers=4, dtype="bfloat16"), corpus_of(count=9)
    resident = cached(tmp_path / "a", model, texts)
    whole = resident.read([range(resident.rows)])
    for name, options in {
        "b": {"resident_layers": 0, "slots": 2},
        "d": {"resident_layers": 2},
    }.items():
        cache = cached(tmp_path / name, model, texts, **options)
        found = cache.read([range(cache.rows)])
        assert all(map(torch.equal, found, whole))


def test_a_cut_off_cache_goes_on_where_it_was_whole(make_tiny, tmp_path):
    model, texts = make_tiny("llama", dtype="bfloat16"), corpus_of(count=9)
    whole = cached(tmp_path / "a", model, texts)
    shape, folder = whole.shape, tmp_path / "b"
    folder.mkdir()
    partial = StateCache(folder, "train", shape)
    done = pack(texts, 40)[0]
    rows = sum(len(texts[n].places) for n in done)
    partial.add(*whole.read([range(rows)]), len(done))
    with (folder / "train.states").open("ab") as file:
        file.write(b"half a batch that never got into the record")
    again = cached(folder, model, texts)
    assert again.rows == whole.rows
    assert all(map(torch.equal, again.read([range(again.rows)]), whole.read([range(whole.rows)])))
    os.truncate(folder / "train.labels", 8)
    with pytest.raises(CheckpointError, match="fewer than the"):
        StateCache(folder, "train", shape)


def test_one_layers_kv_serves_all(make_tiny):
    device = CpuDevice()
    shapes = [KVShape(heads=2, key_dim=8, value_dim=8)] * 3
    cache = PassingKV(device, shapes, torch.float32, 6)
    assert device.ledger()["KV of one layer"] == 6 * 32 * 4
    rows = torch.ones(2, 4, 8)
    cache.append(0, rows, rows)
    with pytest.raises(CapacityError, match="8 tokens of one text, there is room for 6"):
        cache.append(0, rows, rows)
    cache.append(1, rows, rows)
    with pytest.raises(CapacityError, match="keeps none"):
        cache.commit([0])
    device.close()


def problem(folder, *, rows=640, seed=0, noise=0.0):
    """A cache whose labels follow from its states, and a model's output head."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (rows,), generator=generator)
    table = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(7))
    hidden = table[tokens] + noise * torch.randn(rows, WIDTH, generator=generator)
    labels = torch.stack([(tokens * (k + 2) + 1) % TOKENS for k in range(HEADS)], dim=1)
    folder.mkdir(exist_ok=True)
    cache = StateCache(folder, "train", CacheShape(width=WIDTH, heads=HEADS, dtype="float32"))
    if not cache.rows:
        cache.add(hidden, labels, 1)
    return cache, OutputHead(table.clone(), None)


def trainer_for(folder, *, vocabulary=0, epochs=12, layers=1, device="cpu", **options):
    """A trainer on that problem; its state lies in the same folder."""
    cache, output = problem(folder)
    own = choose(torch.ones(TOKENS, dtype=torch.int64), vocabulary)
    shape = shape_of(HEADS, layers, WIDTH, None if vocabulary is None else own)
    where = torch.device(device)
    heads = new_heads(shape, output.to(where, torch.float32), own, seed=1).to(where)
    config = TrainConfig(epochs=epochs, batch_tokens=64, lr=0.02, layers=layers, **options)
    recipe = Recipe(config=config, seed=5, state=folder / "state")
    return FrozenTrainer(heads, own.to(where), cache, recipe)


@pytest.mark.parametrize(("vocabulary", "layers"), [(0, 1), (0, 2), (None, 2)])
def test_heads_learn_what_follows_from_the_states(tmp_path, vocabulary, layers):
    trainer = trainer_for(tmp_path / "c", vocabulary=vocabulary, layers=layers)
    before = trainer.score(trainer.cache).top(1)
    trainer.run()
    after, losses = trainer.score(trainer.cache).top(1), trainer.progress.history
    assert max(before) < 0.2 and min(after) > 0.75
    assert losses[-1]["loss"] < losses[0]["loss"] / 4
    assert losses[-1]["step"] == trainer.steps == 12 * 10


def test_a_small_vocabulary_guesses_its_tokens_and_no_others():
    counts = torch.tensor([7, 5, 9, 1, 9, 0])
    small = choose(counts, 3)
    assert small.tokens.tolist() == [0, 2, 4]
    labels = torch.tensor([4, 3, NO_LABEL, 0])
    assert small.targets(labels).tolist() == [2, NO_LABEL, NO_LABEL, 0]
    assert choose(counts, 5).tokens.tolist() == [0, 1, 2, 3, 4]  # what never comes is of no use
    assert choose(counts, 0).tokens is None and choose(counts, None).tokens is None
    score = Score(small, 1, ranks=2)
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
    score.add(0, logits, labels)
    assert score.top(1) == [1 / 3] and score.top(2) == [1 / 3]  # the token without a row: a miss
    counted = score.calibration("m", "float32")
    assert counted.places == (3,) and counted.hits == ((1, 0),)


def test_a_small_vocabulary_starts_as_the_models_rows():
    table = torch.randn(TOKENS, WIDTH)
    own = choose(torch.arange(TOKENS), 5)
    shape = shape_of(2, 1, WIDTH, own)
    heads = new_heads(shape, OutputHead(table, None), own, seed=0)
    assert shape.lm_head is LmHead.OWN and shape.truncated and shape.head_rows == 5
    hidden = torch.randn(3, WIDTH)
    bias = heads.blocks[1][0].linear.bias
    expected = (hidden + torch.nn.functional.silu(bias)) @ table[own.tokens].T
    torch.testing.assert_close(heads.head(1, hidden), expected)


def test_the_loss_is_the_weighted_sum_and_leaves_out_what_has_no_label(tmp_path):
    trainer = trainer_for(tmp_path / "c", epochs=1)
    hidden, labels = trainer.cache.read(trainer._rows_of(0))
    labels[::3, 1] = NO_LABEL
    total = 0.0
    for head in range(HEADS):
        logits = trainer.heads(hidden)[head].detach()
        known = labels[:, head] >= 0
        loss = cross_entropy(logits[known], labels[known, head])
        torch.testing.assert_close(token_loss(logits, labels[:, head]), loss)
        total += 0.8 ** (head + 1) * float(loss)
    nothing = torch.full((4,), NO_LABEL)
    assert float(token_loss(torch.zeros(4, 5), nothing)) == 0.0
    trainer.cache.read = lambda rows: (hidden, labels)
    trainer.run()
    assert math.isclose(trainer.progress.history[0]["loss"], total, rel_tol=1e-5)


def test_every_row_is_seen_once_an_epoch_in_an_order_of_its_own(tmp_path):
    trainer = trainer_for(tmp_path / "c", epochs=3)
    orders = []
    for epoch in range(3):
        steps = range(epoch * trainer.steps_per_epoch, (epoch + 1) * trainer.steps_per_epoch)
        blocks = [part for step in steps for part in trainer._rows_of(step)]
        assert sorted(n for part in blocks for n in part) == list(range(trainer.cache.rows))
        orders.append([part.start for part in blocks])
    assert len({tuple(order) for order in orders}) == 3


@given(st.integers(1, 500))
def test_the_learning_rate_rises_then_falls_to_nothing(steps):
    rates = [rate_factor(step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(0.0 < rate <= 1.0 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rate_factor(steps, steps) < 1e-9 or steps == 1


class Stop(BaseException):
    """Raised where Ctrl-C would be noticed."""


@pytest.mark.parametrize("stop_at", [1, 7, 23])
def test_stopped_and_resumed_gives_the_same_weights(tmp_path, stop_at):
    whole = trainer_for(tmp_path / "a", epochs=3)
    whole.run()
    first = trainer_for(tmp_path / "b", epochs=3)

    def poll():
        if first.progress.step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        first.run(poll=poll)
    second = trainer_for(tmp_path / "b", epochs=3)
    assert second.progress.step == stop_at
    second.run()
    for one, two in zip(whole.heads.parameters(), second.heads.parameters(), strict=True):
        assert torch.equal(one, two)


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}]
from pathlib import Path
from test_training import trainer_for
trainer = trainer_for(Path(sys.argv[1]), epochs=3)
def poll():
    if trainer.progress.step == 17:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.run(poll=poll, save_s=0)
"""


def test_killed_and_resumed_gives_the_same_weights(tmp_path):
    whole = trainer_for(tmp_path / "a", epochs=3)
    whole.run()
    done = forks.run([sys.executable, "-c", KILLED.format(here=str(HERE)), str(tmp_path / "b")])
    assert done.returncode == -signal.SIGKILL
    again = trainer_for(tmp_path / "b", epochs=3)
    assert again.progress.step == 17
    again.run()
    for one, two in zip(whole.heads.parameters(), again.heads.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_damaged_state_is_refused(tmp_path):
    trainer_for(tmp_path / "a", epochs=1).run()
    path = tmp_path / "a" / "state"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="remove it to train from the start"):
        trainer_for(tmp_path / "a", epochs=1)
    with pytest.raises(CheckpointError, match="remove it to train from the start"):
        path.write_bytes(b"")
        trainer_for(tmp_path / "a", epochs=1)


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    """The limit on a file's size stands for a full disk."""
    trainer = trainer_for(tmp_path / "a", epochs=1)
    trainer.save()
    before = (tmp_path / "a" / "state").read_bytes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ConfigError, match="cannot write .*state"):
            trainer.run()
        with pytest.raises(ConfigError, match="cannot write .*train.states"):
            trainer.cache.add(torch.zeros(999, WIDTH), torch.zeros(999, HEADS).long(), 1)
        with pytest.raises(ConfigError, match="cannot write .*answers"):
            AnswerFile(tmp_path / "answers").add([range(9999)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a" / "state").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "state",
        "train.json",
        "train.labels",
        "train.states",
    ]
    assert AnswerFile(tmp_path / "answers")._answers == []  # what is half a line is cut off
    cache, _ = problem(tmp_path / "a")
    assert cache.rows == 640


def test_replacing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(Stop), replacing(path) as temporary:
        temporary.write_text("half")
        raise Stop
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_answers_that_are_there_are_kept_by_whole_batches(tmp_path):
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path)
    file.add([[1, 2], [3]])
    file.add([[4]])
    with path.open("a") as handle:
        handle.write("[5,")
    AnswerFile(path).add([[6]])
    assert AnswerFile(path)[3] == (6,)
    AnswerFile(path).cut(3)
    again = AnswerFile(path)
    assert [again[n] for n in range(len(again))] == [(1, 2), (3,), (4,)]
    again.cut(2)
    assert len(AnswerFile(path)) == 2
    path.write_text('[1]\n{"no": 1}\n')
    with pytest.raises(CheckpointError, match="line 2 is not an answer"):
        AnswerFile(path)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 4))
def test_every_prompt_is_asked_once_and_held_out_ones_greedily(train, held, sequences):
    prompts = [(n,) for n in range(train + held)]
    asked = batches(prompts[:train], prompts[train:], sequences, 0.7)
    places = [batch.first + n for batch in asked for n in range(len(batch.prompts))]
    assert places == list(range(train + held))
    for batch in asked:
        assert len(batch.prompts) <= sequences
        assert batch.temperature == (0.7 if batch.first < train else 0.0)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def encoder_for(tokenizer, context=200, raw=False):
    return Encoder(tokenizer, tokenizer.eos_token_id, context, raw, Dropped())


def test_several_turns_are_one_text_with_several_answers(tokenizer):
    turns = (("user", "fox"), ("assistant", "dog"), ("user", "the"), ("assistant", "lazy"))
    encoder = encoder_for(tokenizer)
    (sample,) = encoder.samples([Talk(line=1, turns=turns)])
    texts = [tokenizer.decode(list(sample.ids[a:b])) for a, b in sample.answers]
    assert texts == ["dog<|im_end|>", "lazy<|im_end|>"]
    before = tokenizer.decode(list(sample.ids[: sample.answers[1][0]]))
    assert before.endswith("<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n")


def test_what_does_not_fit_is_counted(tokenizer):
    def talk(prompt, answer):
        return Talk(line=1, turns=(("user", prompt), ("assistant", answer)))

    encoder = encoder_for(tokenizer, context=40)
    kept = encoder.samples([talk("x" * 90, "dog"), talk("x", ""), talk("x", "y" * 90)])
    assert len(kept) == 1 and len(kept[0].ids) == 40 and kept[0].answers[0][1] == 40
    assert (encoder.dropped.long, encoder.dropped.empty, encoder.dropped.cut) == (1, 1, 1)
    assert "1 left out, the prompt fills the context" in str(encoder.dropped)
    assert encoder.prompts([talk("x" * 90, "")]) == []


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (CorpusConfig, {"heads": 0}, "--heads is 0, accepted is 1 to 16"),
        (CorpusConfig, {"holdout": 0.95}, "--holdout is 0.95"),
        (CorpusConfig, {"temperature": 0.5}, "--temperature is for answers"),
        (CorpusConfig, {"answer_tokens": 9}, "--answer-tokens is for answers"),
        (CorpusConfig, {"self_distill": True, "answer_tokens": 2}, "--answer-tokens is 2"),
        (CorpusConfig, {"seed": -1}, "--seed is -1"),
        (TrainConfig, {"lr": math.nan}, "--lr is nan"),
        (TrainConfig, {"vocabulary": 3}, "--vocabulary is 3"),
        (TrainConfig, {"epochs": 0}, "--epochs is 0"),
        (TrainConfig, {"joint": JointConfig(lora_rank=4)}, "are for --method medusa-2"),
        (JointConfig, {"heads_weight": 0.0}, "--heads-weight is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(record, values, message):
    with pytest.raises(ConfigError, match=message):
        record(**values)
    assert TrainConfig(method=Method.MEDUSA_2, joint=JointConfig(lora_rank=4))


def test_history_is_json(tmp_path):
    trainer = trainer_for(tmp_path / "a", epochs=1)
    trainer.run()
    assert json.loads(json.dumps(trainer.progress.history)) == trainer.progress.history


settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")


def test_a_loss_that_is_no_number_ends_the_training():
    from offload_rt.training.frozen import Tally

    tally = Tally.empty(2, torch.device("cpu"))
    tally.steps = 4
    assert tally.note(9)["loss"] == 0.0
    tally.loss += float("nan")
    with pytest.raises(ConfigError, match="the loss is nan after step 9.*lower --lr"):
        tally.note(9)
