"""`offload_rt.load`: the same answers and the same refusals as the command line, from Python."""

import json
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints

import forks
import numpy as np
import pytest
import torch
from eagle3_models import write_head
from engines import reference_model
from medusa_heads import write_shared
from mtp_models import IDS, write_mtp
from tiny import DEEP, write_tokenizer
from transformers import AutoTokenizer

import offload_rt
from offload_rt.cli.pages import load_verb
from offload_rt.model import exact
from offload_rt.session.keywords import AnswerOptions, LoadOptions
from offload_rt.session.observer import Gauge
from offload_rt.session.options import ANSWER_KEYWORDS, KEYWORDS
from offload_rt.session.session import Logged

HI = [{"role": "user", "content": "the quick fox"}]
PROMPTS = ["the quick fox", "brown dog", "the lazy dog jumps over the fox " * 4, "a"]
SMALL = {"device": "cpu", "device_memory": "512MiB"}


@pytest.fixture(scope="module")
def model(tiny_model):
    with offload_rt.load(tiny_model, draft="ngram", **SMALL) as loaded:
        yield loaded


def test_two_emulated_links_from_python(deep_model):
    links = {"device": "cpu,cpu", "link_bandwidth": [1, 2], "home": "host", "resident_layers": 1}
    limits = {"device_memory": ["300MiB", 256 * 2**20]}
    with offload_rt.load(deep_model, draft="none", **links, **limits) as two:
        answer = two.generate(PROMPTS[0], max_tokens=8)
        plan, memory = two.plan, two.report.memory
    assert plan.device == "cpu,cpu" and plan.device_limit_bytes == 556 * 2**20
    assert [one.limit_bytes for one in memory.devices] == [300 * 2**20, 256 * 2**20]
    assert sum(one.planned_bytes for one in memory.devices) == memory.device_planned_bytes
    assert sum(one.streamed_layers for one in memory.devices) == len(plan.streamed) == 3
    assert all(one.link_bytes for one in memory.devices)
    assert memory.device_peak_bytes <= memory.device_planned_bytes
    with offload_rt.load(deep_model, draft="none", **SMALL) as one:
        assert one.generate(PROMPTS[0], max_tokens=8).text == answer.text


def test_importing_is_light():
    source = (
        "import sys, time; start = time.perf_counter(); import offload_rt\n"
        "took = time.perf_counter() - start; offload_rt.OffloadError; dir(offload_rt)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'click', 'rich'} & sys.modules.keys()\n"
        "print(sorted(heavy), took < 0.5)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] True\n"


def test_all_that_is_public_is_there():
    for name in offload_rt.__all__:
        assert getattr(offload_rt, name).__doc__, name
    assert set(offload_rt.__all__) <= set(dir(offload_rt))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        offload_rt.lode  # noqa: B018


def test_python_runs_the_package_as_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "offload_rt", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("offload-run ")


def test_keywords_are_the_options_of_generate():
    options = load_verb("generate").params
    flags = {o.opts[-1][2:].replace("-", "_") for o in options if o.param_type_name == "option"}
    ours = {"prompt", "prompt_file", "json", "verbose", "quiet", "download", "help_all", "trace"}
    ours |= {"nodes"}  # of processes that torchrun starts
    assert flags - ours == KEYWORDS == get_type_hints(LoadOptions).keys()
    assert get_type_hints(AnswerOptions).keys() == ANSWER_KEYWORDS


def test_an_answer_is_the_command_lines(model, tiny_model, offload_run):
    answer = model.generate("the quick fox", max_tokens=12)
    done = offload_run("generate", tiny_model, "-p", "the quick fox", "-n", 12, "--json")
    told = json.loads(done.out)
    assert answer.text == told["text"] and answer.finish_reason == told["finish_reason"]
    assert (list(answer.token_ids), answer.prompt_tokens) == (
        told["token_ids"],
        told["prompt_tokens"],
    )
    assert answer.logprobs is None and answer.seed is None
    assert answer.report is model.report and answer.report.speculation.drafter == "ngram"
    assert model.generate(HI, max_tokens=12).text == answer.text
    raw = offload_run("generate", tiny_model, "-p", "the quick fox", "-n", 12, "--raw").out
    assert model.generate("the quick fox", max_tokens=12, raw=True).text + "\n" == raw != done.out


def test_pieces_are_the_answer(model):
    stream = model.stream(HI, max_tokens=12, stop=["zz"])
    with pytest.raises(offload_rt.SessionError, match="not over"):
        _ = stream.answer
    text = "".join(piece.text for piece in stream)
    assert text == stream.answer.text == model.generate(HI, max_tokens=12).text
    again = model.generate(HI, max_tokens=12, stop=text[3:5])
    assert (again.text, again.finish_reason) == (text[: text.index(text[3:5])], "stop")


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "seed": 5}])
def test_a_list_is_answered_in_order_and_as_one_by_one(sampled, tiny_model):
    with offload_rt.load(tiny_model, draft="none", dtype="float32", **SMALL) as model:
        alone = []
        for place, prompt in enumerate(PROMPTS):
            seed = {"seed": sampled["seed"] + place} if sampled else {}
            alone.append(model.generate(prompt, max_tokens=10, **(sampled | seed)))
        together = model.generate(PROMPTS, max_tokens=10, **sampled)
        assert [a.token_ids for a in together] == [a.token_ids for a in alone]
        assert [a.seed for a in together] == [a.seed for a in alone]
        assert model.plan.sequences == len(PROMPTS)
        assert together[0].report.speculation.passes <= 10  # of all of them together
        assert model.generate([], max_tokens=3) == []
        (one,) = model.generate([HI], max_tokens=10)
        assert one.text == model.generate(HI, max_tokens=10).text


def test_as_many_run_at_once_as_fit(make_tiny):
    """With less memory some run after the others, though KV on disk would leave room for all."""
    shape = {"max_position_embeddings": 32768, "num_key_value_heads": 4} | DEEP
    folder = make_tiny("llama", tokenizer=True, **shape)
    prompts = [f"{word} fox " * 9 for word in ("quick", "brown", "lazy", "red")]
    options = {"draft": "none", "dtype": "float32", "resident_layers": 0, "slots": 1}
    with offload_rt.load(folder, context=30000, **(SMALL | options)) as roomy:
        one = roomy.plan.device_bytes
        expected = [answer.text for answer in roomy.generate(prompts, max_tokens=4)]
        assert roomy.plan.sequences == 4
        options["device_memory"] = (one + roomy.plan.device_bytes) // 2
    with offload_rt.load(folder, context=30000, device="cpu", **options) as model:
        assert [answer.text for answer in model.generate(prompts, max_tokens=4)] == expected
        assert 1 < model.plan.sequences < 4 and model.plan.kv == "device"
        assert model.plan.device_bytes <= options["device_memory"]


def test_the_same_seed_gives_the_same_answer(model):
    """Whatever was answered before, and though this model's number of draft tokens is left open."""
    sampled = {"temperature": 0.9, "seed": 3, "max_tokens": 24}
    first = model.generate(HI, **sampled)
    model.generate(PROMPTS[2], max_tokens=20)
    assert model.generate(HI, **sampled).token_ids == first.token_ids
    assert first.seed == 3 and first.report.exact.on
    drawn = model.generate(HI, temperature=0.9, max_tokens=24)
    assert model.generate(HI, **(sampled | {"seed": drawn.seed})).seed == drawn.seed != 3


def test_a_fixed_number_of_draft_tokens_is_drafted_with_a_seed(tiny_model):
    with offload_rt.load(tiny_model, draft="ngram", draft_tokens=4, **SMALL) as model:
        sampled = {"temperature": 0.3, "seed": 3, "max_tokens": 32}
        first = model.generate(HI, **sampled)
        assert first.report.speculation.drafter == "ngram"
        model.generate(PROMPTS[2], max_tokens=20)
        assert model.generate(HI, **sampled).token_ids == first.token_ids


@pytest.mark.parametrize("draft", ["ngram", "eagle3", "mtp", "medusa"])
def test_random_numbers_of_the_user_are_left_alone(draft, make_tiny, tmp_path, monkeypatch):
    """Also by what is compared when a model is loaded for the first time."""
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    if draft == "mtp":
        write_tokenizer(target := write_mtp(tmp_path / "model"))
    else:
        target = make_tiny("llama", tokenizer=True, **DEEP, **IDS)
    if draft == "eagle3":
        draft = f"eagle3:{write_head(tmp_path / 'head', target)}"
    if draft == "medusa":
        write_shared(tmp_path / "heads")
        draft = f"medusa:{tmp_path / 'heads'}"
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    streamed = {"draft": draft, "resident_layers": 1, "exact": "on", **SMALL}
    with offload_rt.load(target, **streamed) as model:
        answer = model.generate(PROMPTS[0], max_tokens=8, temperature=0.7, seed=1)
        assert answer.report.exact.on
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


@pytest.mark.parametrize("problem", ["", "a product differs"])
def test_a_seed_drafts_by_times_only_where_passes_are_row_invariant(
    problem, tiny_model, tmp_path, monkeypatch
):
    """Though that they are not is found out as the model is loaded, after it was planned."""
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(exact, "unlike_product", lambda *_: problem)
    sampled = {"temperature": 0.8, "seed": 3, "max_tokens": 4}
    with offload_rt.load(tiny_model, draft="ngram", **SMALL, **sampled) as model:
        assert (model.generate(HI).report.exact.why or "") == problem
        assert (model._engine.controller is None) is bool(problem)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 1, "top_k": 20}])
def test_logprobs_are_the_models_own(options, tiny_model):
    with offload_rt.load(tiny_model, draft="ngram", draft_tokens=4, dtype="float32", **SMALL) as m:
        answer = m.generate("the quick fox", max_tokens=16, raw=True, logprobs=True, **options)
    ids = AutoTokenizer.from_pretrained(tiny_model)("the quick fox")["input_ids"]
    whole = torch.tensor([[*ids, *answer.token_ids]])
    with torch.inference_mode():
        rows = reference_model(tiny_model)(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    wanted = rows[range(len(answer.token_ids)), list(answer.token_ids)]
    assert torch.tensor(answer.logprobs) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("family", "resident"),
    [("llama", 0), ("llama", 2), ("gemma2", 0), ("granite", 2), ("cohere", 0)],
)
def test_scores_are_those_of_transformers(family, resident, make_tiny):
    """Families that scale or squash their logits too, streamed and resident, many in a pass."""
    folder = make_tiny(family, tokenizer=True, num_hidden_layers=2)
    pairs = [("the quick", " brown fox"), ("the ", "dog"), ("", "lazy"), ("fox", " jumps" * 20)]
    options = SMALL | {"resident_layers": resident, "dtype": "float32"}
    with offload_rt.load(folder, draft="none", **options) as model:
        scores = model.score([*pairs, pairs[0]])
        assert model.plan.sequences == 4  # equal texts are read once
    tokenizer, reference = AutoTokenizer.from_pretrained(folder), reference_model(folder)
    for (context, continuation), score in zip(pairs, scores, strict=False):
        kept = context.rstrip()
        before = tokenizer(kept)["input_ids"] if kept else [tokenizer.eos_token_id]
        whole = tokenizer(kept + context[len(kept) :] + continuation)["input_ids"]
        after = whole[len(before) :] if kept else whole
        ids = torch.tensor([[*before, *after]])
        with torch.inference_mode():
            rows = reference(ids).logits[0, len(before) - 1 : -1].float().log_softmax(-1)
        expected = rows[range(len(after)), after].sum()
        assert score.logprob == pytest.approx(float(expected), abs=1e-3)
        assert score.is_greedy == bool((rows.argmax(-1) == torch.tensor(after)).all())
        assert score.tokens == len(after)
    assert scores[-1] == scores[0]


def test_greedy_continuations_are_called_so_and_ids_are_scored(model):
    answer = model.generate("the quick fox", raw=True, max_tokens=4, ignore_eos=True, logprobs=True)
    ids = AutoTokenizer.from_pretrained(model_folder(model))("the quick fox")["input_ids"]
    (score,) = model.score([(ids, answer.token_ids)])
    assert score.is_greedy and score.logprob == pytest.approx(sum(answer.logprobs), abs=1e-3)
    assert model.generate(HI, max_tokens=3).text  # and it answers again


def model_folder(model):
    return model._model.checkpoint.folder


def test_what_is_longer_than_planned_for_loads_again(make_tiny, caplog):
    caplog.set_level("INFO", logger="offload_rt")
    folder = make_tiny("llama", tokenizer=True, max_position_embeddings=8192)
    with offload_rt.load(folder, draft="none", **SMALL) as model:
        assert model.plan.context_tokens == 4096
        long = "the quick fox " * 1500
        assert model.generate(long, max_tokens=4).prompt_tokens > 4096
        assert model.plan.context_tokens > 4100
        assert "was loaded again for 1 sequence" in caplog.text
        assert model.generate(HI, max_tokens=4).text


def test_an_answer_that_is_cut_short_is_said(tiny_model, caplog):
    with offload_rt.load(tiny_model, draft="none", context=40, **SMALL) as model:
        answer = model.generate(HI, max_tokens=100, ignore_eos=True)
    assert answer.finish_reason == "length" and len(answer.token_ids) < 30
    assert "the answer is limited to" in caplog.text


def test_closing_twice_and_use_after_it(tiny_model):
    model = offload_rt.load(tiny_model, draft="none", **SMALL)
    model.generate("a", max_tokens=2)
    stream = model.stream("a", max_tokens=4)
    model.close()
    model.close()
    for use in (
        lambda: model.generate("a"),
        lambda: model.stream("a"),
        lambda: model.score([("a", "b")]),
        lambda: next(stream),
    ):
        with pytest.raises(offload_rt.SessionError, match="is closed: load it again"):
            use()
    assert "layers resident" in str(model.plan)


def test_two_at_once_are_refused(model):
    stream = model.stream(HI, max_tokens=20, ignore_eos=True)
    next(stream)
    for use in (lambda: model.generate("a"), model.close, lambda: next(model.stream("a"))):
        with pytest.raises(offload_rt.SessionError, match="the model is in use"):
            use()
    told = []

    def from_a_thread():
        try:
            model.score([("a", "b")])
        except offload_rt.SessionError as error:
            told.append(str(error))

    thread = threading.Thread(target=from_a_thread)
    thread.start()
    thread.join()
    assert len(told) == 1 and "another thread" in told[0]
    stream.close()
    assert model.generate("a", max_tokens=2).token_ids


def test_leaving_gives_up_a_stream_and_keeps_the_error(tiny_model):
    model = offload_rt.load(tiny_model, draft="none", **SMALL)

    def leave_in_mid_stream():
        with model:
            stream = model.stream(HI, max_tokens=20, ignore_eos=True)
            kept.append(stream)
            for _ in stream:
                raise RuntimeError("the user's own")

    kept = []
    with pytest.raises(RuntimeError, match="the user's own"):
        leave_in_mid_stream()
    with pytest.raises(offload_rt.SessionError, match="closed before its end"):
        _ = kept[0].answer
    with pytest.raises(offload_rt.SessionError, match="is closed"):
        model.generate("a")


def test_a_model_nobody_closed_is_closed_at_the_end(tiny_model):
    script = f"""
import offload_rt
model = offload_rt.load({str(tiny_model)!r}, draft="ngram", device="cpu", device_memory="512MiB")
model.generate("the quick fox", max_tokens=4)
stream = model.stream("the quick fox", max_tokens=20, ignore_eos=True)
next(stream)
"""
    done = forks.run([sys.executable, "-c", script])
    assert (done.returncode, done.stderr) == (0, "")


def test_stop_ends_an_answer_in_good_order(model):
    stream = model.stream(HI, max_tokens=400, ignore_eos=True)
    text = next(stream).text
    threading.Thread(target=model.stop).start()
    text += "".join(piece.text for piece in stream)
    assert stream.answer.finish_reason == "abort" and stream.answer.text == text
    assert model.generate(HI, max_tokens=4).finish_reason != "abort"


def test_scores_can_be_stopped_too(model, monkeypatch):
    pairs = [("the quick", " brown fox")]
    expected = model.score(pairs)
    with monkeypatch.context() as patched:
        patched.setattr(type(model._stops), "clear", lambda self: None)  # as if it came later
        model.stop()
        with pytest.raises(offload_rt.SessionError, match="were stopped"):
            model.score(pairs)
        model._stops.signalled = True
        with pytest.raises(KeyboardInterrupt):
            model.score(pairs)
    assert model.score(pairs) == expected


def test_ctrl_c_ends_a_pass_between_layers(model, monkeypatch):
    """It is raised once the pass is undone; the model goes on."""
    before, check = signal.getsignal(signal.SIGINT), type(model._stops).check
    layers = []

    def checked(stops):
        layers.append(len(layers))
        if len(layers) == 8:  # between the two layers of the fourth pass
            signal.raise_signal(signal.SIGINT)
        check(stops)

    with monkeypatch.context() as patched:
        patched.setattr(type(model._stops), "check", checked)
        with pytest.raises(KeyboardInterrupt) as caught:
            model.generate(HI, max_tokens=400, ignore_eos=True)
    assert len(layers) == 8
    assert signal.getsignal(signal.SIGINT) is before
    assert caught.traceback[-1].name == "_raise_interrupt"
    assert model.generate(HI, max_tokens=4).text


def test_a_failed_load_leaves_nothing_behind(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    with pytest.raises(offload_rt.PlanError, match="--device-memory"):
        offload_rt.load(folder, device="cpu", device_memory="1MiB")
    with offload_rt.load(folder, draft="none", **SMALL) as model:
        (folder / "model.safetensors").write_bytes(b"no more")
        with pytest.raises(offload_rt.CheckpointError, match="while running"):
            model.generate(PROMPTS, max_tokens=2)  # is loaded again for them
        with pytest.raises(offload_rt.CheckpointError):
            model.generate("a", max_tokens=2)


def test_an_engine_that_cannot_start_over_is_made_again(tiny_model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of order")

    with offload_rt.load(tiny_model, draft="none", **SMALL) as model:
        expected, engine = model.generate("a", max_tokens=4), model._engine
        for name in ("sweep", "forget"):
            monkeypatch.setattr(engine, name, broken)
        with pytest.raises(RuntimeError, match="out of order"):
            model.generate("the fox", max_tokens=4)
        assert model.generate("a", max_tokens=4).token_ids == expected.token_ids
        assert model._engine is not engine


def test_an_observer_is_told_what_goes_on(tiny_model):
    class Told(Logged):
        def __init__(self):
            self.labels, self.ends = [], []

        def note(self, sentence):
            self.labels.append(sentence)

        @contextmanager
        def progress(self, label):
            self.labels.append(label)
            yield (gauge := Gauge())
            self.ends.append((gauge.done(), gauge.total))

    told = Told()
    with offload_rt.load(tiny_model, observer=told, draft="none", context=30, **SMALL) as model:
        answer = model.generate(HI, max_tokens=50)
    name = model.plan.name
    assert told.labels[0] == f"loading {name}" and told.labels[-1] == "reading the prompt"
    assert "the answer is limited to" in told.labels[1]
    (loaded, of), read = told.ends
    assert 0 < loaded <= of
    assert read == (answer.prompt_tokens, answer.prompt_tokens)


def test_the_readme_says_it_so(monkeypatch, tiny_model, capsys, tmp_path):
    """The block of Python in README runs, with this model in place of the one it names."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    named = re.findall(r'offload_rt\.load\("([^"]+)"', block)
    assert len(named) == 1 and len(block.splitlines()) <= 12
    real = offload_rt.load

    def tiny(model, **options):
        assert model == named[0]
        return real(tiny_model, max_tokens=16, **(options | SMALL))  # of what names no number

    monkeypatch.setitem(vars(offload_rt), "load", tiny)
    (tmp_path / "readme.py").write_text(block)
    runpy.run_path(str(tmp_path / "readme.py"))
    assert "tokens/s predicted" in capsys.readouterr().out
