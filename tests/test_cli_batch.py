"""`offload-run batch`: each line its offline answer; killed anywhere, the same bytes in the end."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

import offload_rt
from offload_rt.adapters.reading import read_adapter
from offload_rt.config import RuntimeConfig
from offload_rt.device import opening
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.errors import ConfigError
from offload_rt.model.adapter import CONFIG, WEIGHTS
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.serve import batch as module
from offload_rt.serve.batch import KIND
from offload_rt.session import shared
from offload_rt.session.crowd import Crowd

SMALL = ("--device", "cpu", "--device-memory", "512MiB", "--dtype", "float32", "--draft", "ngram")
HI = [{"role": "user", "content": "the quick fox"}]


@pytest.fixture(scope="module")
def offline(tiny_model):
    small = {"device": "cpu", "device_memory": "512MiB", "dtype": "float32"}
    with offload_rt.load(tiny_model, draft="none", **small) as model:
        yield model


def line(name, url="/v1/chat/completions", **body):
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})


LINES = [
    "the lazy dog",
    json.dumps({"prompt": "brown\u2028fox", "max_tokens": 5}, ensure_ascii=False),
    "",
    json.dumps({"messages": HI, "temperature": 0.8, "seed": 11}),
    line("chat", messages=HI, max_completion_tokens=6, logprobs=True, top_logprobs=1),
    line("plain", "/v1/completions", prompt="jumps over", max_tokens=4, stop="o"),
    line("long", messages=[{"role": "user", "content": "fox " * 900}]),
    line("other", "/v1/embeddings", input="x"),
    line("many", messages=HI, n=3),
    line("format", messages=HI, response_format={"type": "json_object"}),
    '{"messages": [',
    line("last", messages=HI, temperature=1.0),
]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def words(model, source, output, *more):
    return ("batch", model, "--input", source, "--output", output, "-n", 8, *SMALL, *more)


def text_of(result):
    (choice,) = result["response"]["body"]["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def test_each_line_is_its_offline_answer(tiny_model, source, tmp_path, offload_run, offline):
    output = tmp_path / "out.jsonl"
    done = offload_run(*words(tiny_model, source, output, "--seed", 5))
    assert done.code == 0 and done.out == "", done.err
    results = [json.loads(text) for text in output.read_text().splitlines()]
    names = ["line 1", "line 2", "line 4", "chat", "plain", "long", "other", "many", "format"]
    assert [r["custom_id"] for r in results] == [*names, "line 11", "last"]
    assert text_of(results[0]) == offline.generate("the lazy dog", max_tokens=8).text
    assert text_of(results[1]) == offline.generate("brown\u2028fox", max_tokens=5).text
    drawn = offline.generate(HI, max_tokens=8, temperature=0.8, seed=11)
    assert text_of(results[2]) == drawn.text
    chat = results[3]["response"]["body"]
    assert text_of(results[3]) == offline.generate(HI, max_tokens=6).text
    assert len(chat["choices"][0]["logprobs"]["content"]) == chat["usage"]["completion_tokens"]
    plain = offline.generate("jumps over", raw=True, max_tokens=4, stop=["o"])
    assert text_of(results[4]) == plain.text
    own = offline.generate(HI, max_tokens=8, temperature=1.0, seed=5 + 12)
    assert text_of(results[-1]) == own.text
    wrong = {r["custom_id"]: r["error"]["message"] for r in results if r["response"] is None}
    assert wrong.keys() == {"long", "other", "many", "format", "line 11"}
    assert "tokens, there is room for 512" in wrong["long"] and "url" in wrong["other"]
    assert wrong["line 11"] == "it is no JSON" and "several times" in wrong["many"]
    assert "7 of 12" not in done.err and "6 of 11 lines answered" in done.err
    assert not list(tmp_path.glob("*.part")) and oct(output.stat().st_mode)[-3:] == "600"


def test_weights_are_rounded_by_request_as_those_of_one_answer(tiny_model, tmp_path, offload_run):
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("the lazy dog\n")
    done = offload_run(*words(tiny_model, source, output, "--wire", "int4"))
    assert done.code == 0, done.err
    (result,) = (json.loads(text) for text in output.read_text().splitlines())
    assert result["response"]["body"]["model"].endswith("rounded to int4")
    texts = []
    for wire in ("int4", "raw"):
        small = {"device": "cpu", "device_memory": "512MiB", "dtype": "float32"}
        with offload_rt.load(tiny_model, draft="none", wire=wire, **small) as model:
            texts.append(model.generate("the lazy dog", max_tokens=8).text)
    assert texts[0] == text_of(result) != texts[1]


@pytest.mark.parametrize("more", [(), ("--dtype", "bf16", "--exact", "on")], ids=["fp32", "bf16"])
def test_killed_anywhere_and_started_again_the_bytes_are_the_same(
    tiny_model, source, tmp_path, offload_run, monkeypatch, more
):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    seed = ("--seed", 5, *more)
    assert offload_run(*words(tiny_model, source, whole, *seed)).code == 0
    real, sweeps = Crowd.advance, []

    def dies(self):
        sweeps.append(1)
        if len(sweeps) % 13 == 0:
            raise SystemExit(9)
        return real(self)

    monkeypatch.setattr(Crowd, "advance", dies)
    part = tmp_path / "out.jsonl.part"
    deaths = 0
    while True:
        try:
            done = offload_run(*words(tiny_model, source, output, *seed, "--sequences", 2))
        except SystemExit:
            assert part.exists() and not output.exists()
            with part.open("a") as torn:
                torn.write('{"line": 4, "resu')
            deaths += 1
            assert deaths < 30
        else:
            break
    assert deaths > 1 and done.code == 0 and "done already" in done.err
    assert output.read_bytes() == whole.read_bytes() and not part.exists()


def test_a_journal_that_ends_anywhere_is_gone_on_with(tmp_path):
    """What a kill leaves is the beginning of the file, to any byte."""
    path, mark = tmp_path / "out.part", {"input": "a", "model": "b"}
    results = [(n, {"id": f"batch-{n}", "text": "\u00e9\u2028" * n}) for n in (3, 1, 2)]
    journal = module.Journal(path, mark)
    for one in results:
        journal.add([one])
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        again = module.Journal(path, mark)
        done = max(0, whole[:size].count(b"\n") - 1)
        assert again.results == dict(results[:done])
        for one in results[done:]:
            again.add([one])
        assert path.read_bytes() == whole and module.Journal(path, mark).results == dict(results)
    for content in (b"x", b'{"mark": "other', whole.replace(b"mark", b"note")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="is damaged: remove it"):
            module.Journal(path, mark)
    path.write_text('{"mark": "5e1f"}\n{"line": 1, "result": {}}\n')
    with pytest.raises(ConfigError, match="was begun by another version of offload-run"):
        module.Journal(path, mark)


def test_ctrl_c_keeps_what_is_done(tiny_model, source, tmp_path, offload_run, monkeypatch):
    output, real, sweeps = tmp_path / "out.jsonl", Crowd.advance, []

    def interrupted(self):
        sweeps.append(1)
        if len(sweeps) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    monkeypatch.setattr(Crowd, "advance", interrupted)
    done = offload_run(*words(tiny_model, source, output))
    assert done.code == 130 and "the same command goes on" in done.err and not output.exists()
    other = offload_run(*words(tiny_model, source, output, "--temperature", 1))
    assert other.code == 2 and "was begun with another sampling" in other.err
    part = tmp_path / "out.jsonl.part"
    lines = part.read_bytes()
    part.write_bytes(b"{}\n" + lines)
    assert "is damaged: remove it" in offload_run(*words(tiny_model, source, output)).err
    part.write_bytes(lines)
    assert offload_run(*words(tiny_model, source, output)).code == 0


@pytest.fixture(scope="module")
def journals():
    """What batches that were interrupted left, by model, lines and options."""
    return {}


@pytest.fixture
def cut_off(tmp_path, offload_run, monkeypatch, journals):
    """Begin a batch that is interrupted after a few sweeps; returns its output's path.

    Where the same one was begun before, its journal is written again; not where it is `anew`.
    """

    def begin(model, source, *more, anew=False):
        output, real, sweeps = tmp_path / "cut.jsonl", Crowd.advance, []
        part, key = output.with_name("cut.jsonl.part"), (model, source.read_text(), more)
        part.unlink(missing_ok=True)
        if key in journals and not anew:
            part.write_bytes(journals[key])
            part.chmod(0o600)
            return output

        def interrupted(self):
            sweeps.append(1)
            if len(sweeps) == 8:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self)

        with monkeypatch.context() as patched:
            patched.setattr(Crowd, "advance", interrupted)
            assert offload_run(*words(model, source, output, *more)).code == 130
        journals[key] = part.read_bytes()
        return output

    return begin


SAMPLED = ("--temperature", 0.9, "--seed", 5)


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (SAMPLED, ("--accept", "typical"), "another --draft, its options, or --accept"),
        ((), ("--exact", "off"), "another --exact"),
        (("--exact", "off", "--dtype", "bfloat16"), ("--draft-tokens", 3), "another --draft or"),
        ((), ("--dtype", "bfloat16"), "another --dtype"),
        ((), ("--context", 64), "or --context"),
    ],
)
def test_what_answers_depend_on_is_not_changed_midway(
    tiny_model, source, offload_run, cut_off, first, then, said
):
    output = cut_off(tiny_model, source, *first)
    before = output.with_name("cut.jsonl.part").read_bytes()
    done = offload_run(*words(tiny_model, source, output, *first, *then))
    assert done.code == 2 and said in done.err and "Traceback" not in done.err, done.err
    assert output.with_name("cut.jsonl.part").read_bytes() == before and not output.exists()


def test_what_answers_do_not_depend_on_may_be_changed(tiny_model, source, offload_run, cut_off):
    output = cut_off(tiny_model, source)
    more = ("--sequences", 2, "--draft-tokens", 3, "--resident-layers", 0, "--slots", 2)
    done = offload_run(*words(tiny_model, source, output, *more))
    assert done.code == 0, done.err


def test_the_same_command_finds_the_same_room_again(
    tiny_model, source, offload_run, cut_off, monkeypatch
):
    real, asked = shared.fastest_room, []

    def noted(model, settings, device, free, needs, sequences):
        asked.append(needs)
        return real(model, settings, device, free, needs, sequences)

    monkeypatch.setattr(shared, "fastest_room", noted)
    output = cut_off(tiny_model, source, anew=True)
    done = offload_run(*words(tiny_model, source, output))
    assert done.code == 0 and "of 11 lines are done already" in done.err, done.err
    assert "5 of 11 lines are done already" not in done.err  # the refused ones alone
    assert asked[0] == asked[1] and len(asked[0]) == 6


@pytest.mark.parametrize(("exact", "more"), [("off", ()), ("on", ("--draft", "none"))])
def test_what_was_open_is_as_the_journal_was_begun(
    tiny_model, source, offload_run, cut_off, exact, more
):
    """By itself it would be on with a drafter, and off without."""
    more = ("--dtype", "bfloat16", *more)
    output = cut_off(tiny_model, source, *more, "--exact", exact)
    done = offload_run(*words(tiny_model, source, output, *more))
    assert done.code == 0 and f"was begun with --exact {exact}, it goes on so" in done.err, done.err


def test_bits_that_no_line_tells_are_not_compared_in_fp32(
    tiny_model, tmp_path, offload_run, cut_off
):
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(line for line in LINES if "logprobs" not in line))
    output = cut_off(tiny_model, source, "--exact", "on")
    done = offload_run(*words(tiny_model, source, output, "--exact", "off"))
    assert done.code == 0, done.err


def test_another_kind_of_device_is_seen_behind_auto(
    tiny_model, source, offload_run, cut_off, monkeypatch
):
    output = cut_off(tiny_model, source, "--device", "auto")
    other = CPU if opening.chosen_kind(RuntimeConfig()) is CUDA else CUDA
    monkeypatch.setattr(opening, "chosen_kind", lambda config: other)
    done = offload_run(*words(tiny_model, source, output, "--device", "auto"))
    assert done.code == 2 and "was begun with another kind of --device" in done.err, done.err


def test_a_journal_that_has_the_kind_in_its_mark_is_gone_on_with(
    tiny_model, source, offload_run, cut_off
):
    """As those of before December 2026; of another kind it is refused."""
    output = cut_off(tiny_model, source)
    part = output.with_name("cut.jsonl.part")
    head, *lines = map(json.loads, part.read_text().splitlines())
    for line in lines:
        if line["line"] == 0:
            head["mark"][KIND] = line["result"].pop(KIND)
    assert head["mark"][KIND] == "cpu"
    old = "".join(json.dumps(line) + "\n" for line in (head, *lines))
    part.write_text(old.replace('"cpu"', '"cuda"', 1))
    done = offload_run(*words(tiny_model, source, output))
    assert done.code == 2 and "was begun with another kind of --device" in done.err, done.err
    part.write_text(old)
    done = offload_run(*words(tiny_model, source, output))
    assert done.code == 0, done.err


def test_a_model_of_the_same_name_with_other_weights_is_another(
    tiny_model, source, tmp_path, offload_run, cut_off
):
    folder = shutil.copytree(tiny_model, tmp_path / "copy" / tiny_model.name)
    output = cut_off(tiny_model, source)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    extent = open_checkpoint(folder).tensors["model.layers.1.mlp.up_proj.weight"]
    changed = bytearray(whole)
    for place in range(extent.offset, extent.offset + extent.nbytes, 4):
        changed[place] ^= 1  # the last bit of each number of one matrix
    weights.write_bytes(changed)
    done = offload_run(*words(folder, source, output))
    assert done.code == 2 and "another weights of that model" in done.err, done.err
    weights.write_bytes(whole)  # a copy of other dates and place is the same
    assert offload_run(*words(folder, source, output)).code == 0


def test_an_adapter_of_the_same_name_with_other_weights_is_another(tmp_path):
    digests = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        numbers = torch.full((4, 4), float(number))
        save_file({"base_model.model.x.lora_A.weight": numbers}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
        digests.append(read_adapter(folder).digest)
    assert digests[0] != digests[1] and digests[0] == read_adapter(tmp_path / "0").digest


def test_files_that_cannot_be_are_sentences(tiny_model, tmp_path, offload_run):
    source, output = tmp_path / "in", tmp_path / "out"
    for content, said in ((None, "cannot read"), (b"\n\n", "has no lines"), (b"\xff\xfe\x00", "")):
        if content is not None:
            source.write_bytes(content)
        done = offload_run(*words(tiny_model, source, output))
        assert done.code == 2 and said in done.err and len(done.err.splitlines()) == 1
    source.write_text("{]\n[1]\n")
    assert offload_run(*words(tiny_model, source, output)).code == 0  # [1] is a prompt as it is
    source.write_text("{]\n")
    done = offload_run(*words(tiny_model, source, tmp_path / "none"))
    assert done.code == 2 and "0 of 1 lines answered" in done.err
    done = offload_run(*words(tiny_model, source, tmp_path / "no" / "out"))
    assert done.code == 2 and "no" in done.err


def test_more_run_at_once_where_that_is_predicted_to_be_faster(tiny_model):
    from offload_rt.cli.plan import device_there
    from offload_rt.session.adapters import open_answering
    from offload_rt.session.options import settings_from
    from offload_rt.session.session import Logged
    from offload_rt.session.shared import fastest_room

    chosen = {"device": "cpu", "device_memory": "512MiB", "draft": "none", "resident_layers": 0}
    settings = settings_from(chosen)
    model, settings = open_answering(str(tiny_model), settings, Logged())
    there = device_there(settings.runtime)
    rooms = fastest_room(model, settings, *there, [(20, 12)] * 30)
    assert rooms[0].sequences > 4 and {room.context_tokens for room in rooms} == {32}
    (alone,) = fastest_room(model, settings, *there, [(20, 12), (50, 20)], sequences=2)
    assert (alone.context_tokens, alone.kv_tokens) == (70, 121)
    assert module.PLAIN_TOKENS == 16
