"""The model's own sampling: offered, taken when asked for, and never over what was typed."""

import json
import shutil

import pytest

PROMPT = "hello there"
QWEN = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.05,
}


@pytest.fixture
def recommending(tiny_model, tmp_path):
    """Return the tiny model with settings in its generation_config.json."""

    def make(**settings):
        folder = tmp_path / "recommending"
        if not folder.exists():
            shutil.copytree(tiny_model, folder)
        path = folder / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": 2} | settings))
        return folder

    return make


def answer(offload_run, folder, *more):
    done = offload_run("generate", folder, "-p", PROMPT, "-n", 8, "--json", *more)
    assert done.code == 0, done.err
    record = json.loads(done.out)
    record["sampling"].pop("seed")
    return record, " ".join(done.err.split())


def test_what_is_recommended_is_said_once_and_not_taken(recommending, offload_run):
    record, err = answer(offload_run, recommending(**QWEN))
    assert record["sampling"] == {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert err.count("the model's authors recommend") == 1
    assert "temperature 0.6, top-k 20 and top-p 0.95: --sampling model" in err
    assert "without its repetition_penalty 1.05" in err
    for chosen in (("--temp", 0), ("--temp", 1), ("--sampling", "greedy"), ("-q",)):
        assert "recommend" not in answer(offload_run, recommending(**QWEN), *chosen)[1]


def test_asked_for_it_is_what_the_flags_would_be(recommending, offload_run):
    folder = recommending(**QWEN)
    record, err = answer(offload_run, folder, "--sampling", "model", "-s", 5)
    assert "sampling with temperature 0.6, top-k 20 and top-p 0.95" in err
    assert "without its repetition_penalty 1.05" in err
    flags = ("--temp", 0.6, "--top-k", 20, "--top-p", 0.95)
    same, _ = answer(offload_run, folder, *flags, "-s", 5)
    assert (record["sampling"], record["token_ids"]) == (same["sampling"], same["token_ids"])


def test_what_is_typed_wins(recommending, offload_run):
    folder = recommending(**QWEN)
    record, _ = answer(offload_run, folder, "--sampling", "model", "--top-p", 0.5, "--min-p", 0.1)
    assert record["sampling"] == {"temperature": 0.6, "top_k": 20, "top_p": 0.5, "min_p": 0.1}
    record, _ = answer(offload_run, folder, "--sampling", "model", "--temp", 0)
    assert record["seed"] is None and record["sampling"]["top_k"] == 0


def test_a_default_of_the_users_wins_only_over_his_own_wish(recommending, offload_run, monkeypatch):
    folder = recommending(**QWEN)
    monkeypatch.setenv("OFFLOAD_RT_TEMPERATURE", "0.9")
    assert answer(offload_run, folder)[0]["sampling"]["temperature"] == 0.9
    record, _ = answer(offload_run, folder, "--sampling", "model")
    assert record["sampling"]["temperature"] == 0.6
    monkeypatch.setenv("OFFLOAD_RT_SAMPLING", "model")
    record, _ = answer(offload_run, folder)
    assert record["sampling"] == {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.0}


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}]
)
def test_nothing_to_recommend(settings, recommending, offload_run):
    folder = recommending(**settings)
    assert "recommend" not in answer(offload_run, folder)[1]
    done = offload_run("generate", folder, "-p", PROMPT, "--sampling", "model")
    assert done.code == 2 and "recommends no sampling" in done.err


def test_sampling_without_numbers_is_temperature_1(recommending, offload_run):
    record, _ = answer(offload_run, recommending(do_sample=True), "--sampling", "model")
    assert record["sampling"]["temperature"] == 1.0 and record["seed"] is not None


def test_a_damaged_value_stops_only_who_asks_for_it(recommending, offload_run):
    folder = recommending(do_sample=True, temperature=0.6, top_p=7)
    answer(offload_run, folder)
    done = offload_run("generate", folder, "-p", PROMPT, "--sampling", "model")
    assert done.code == 4 and "top_p" in done.err


def test_accept_rules_are_checked_with_it(recommending, offload_run):
    folder = recommending(**QWEN)
    rule = ("--draft", "ngram", "--accept")
    answer(offload_run, folder, "--sampling", "model", *rule, "typical")
    done = offload_run(folder, PROMPT, "--sampling", "model", *rule, "greedy")
    assert done.code == 2 and "--accept greedy contradicts --temperature 0.6" in done.err


def test_chat_offers_and_takes_it(recommending, offload_run):
    folder = recommending(**QWEN)
    done = offload_run("chat", folder, "-n", 4, stdin=b"hello\nhello\n")
    assert done.err.count("the model's authors recommend") == 1
    done = offload_run("chat", folder, "-n", 4, "--sampling", "model", stdin=b"hello\n/stats\n")
    assert "sampling with temperature 0.6" in done.err and "seed" in done.err
