"""The first line of a prediction, and lines that fit the terminal."""

import json
import re
import shutil

import pytest

from offload_rt.cli.columns import hanging
from offload_rt.session.summary import layer_words
from offload_rt.units import format_speed, parse_size

GPU, CPU = "rtx4090-pcie4x16", "cpu-2core-avx512bf16"


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory):
    """A folder with the sizes of Llama-3-70B and no weights."""
    folder = tmp_path_factory.mktemp("big") / "llama-70b"
    folder.mkdir()
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    more = {"model_type": "llama", "max_position_embeddings": 8192, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(sizes | heads | more))
    return folder


def parts(out):
    """Name, tokens a second, what binds, what more memory, tokens a second with it."""
    first = re.match(
        r"(\S+): (\S+) tokens/s, bound by ([a-z ]+)"
        r"(?:; (\S+ [MG]iB) more (device|host)\s+memory\s+would\s+give\s+(\S+)\s+tokens/s)?\n",
        re.sub(r"\n  (?=[A-Za-z0-9])", " ", out, count=1),
    )
    assert first, out
    return first.groups()


def test_simulates_first_line_is_what_simulating_with_more_memory_gives(llama_70b, offload_run):
    base = ("simulate", llama_70b, "--profile", GPU, "--profile-set", "ram_bytes=256GiB")
    name, rate, bound, more, memory, with_more = parts(offload_run(*base).out)
    record = json.loads(offload_run(*base, "--json").out)
    assert (name, bound) == ("llama-70b", "the link to host memory")
    assert rate == format_speed(record["s_per_token"]).split()[0]
    limit = record["device_limit_bytes"] + parse_size(more)
    assert memory == "device" and limit == record["more_memory"]["limit_bytes"]
    roomy = json.loads(
        offload_run(
            *base,
            "--profile-set",
            "machine.gpus[0].memory_bytes=107374182400",
            "--device-memory",
            limit,
            "--json",
        ).out
    )
    assert with_more == format_speed(roomy["s_per_token"]).split()[0]
    assert float(with_more) > 1.05 * float(rate)


def test_of_several_machines_the_one_that_lacks_host_memory_is_told(
    llama_70b, offload_run, tmp_path
):
    """The first has 96 GiB and lacks none; the second has 16."""

    def planned(*host_memory, as_json=False):
        nodes = zip(("desk", "shelf"), host_memory, strict=True)
        roster = tmp_path / "nodes.toml"
        line = '[[node]]\nname = "{}"\ndevice_memory = "20GiB"\nhost_memory = "{}"\n'
        roster.write_text("".join(line.format(*node) for node in nodes))
        how = ("--device", "cuda", "--profile", GPU, "--draft", "none", "--context", 512)
        return offload_run("plan", llama_70b, "--nodes", roster, *how, *["--json"] * as_json).out

    _, rate, _, more, memory, with_more = parts(planned("96GiB", "16GiB"))
    assert memory == "host" and float(with_more) > 3 * float(rate)
    grown = 16 * 2**30 + parse_size(more)
    roomy = json.loads(planned("96GiB", f"{grown}", as_json=True))
    assert with_more == format_speed(roomy["predicted"]["s_per_token"]).split()[0]
    assert parts(planned("96GiB", f"{grown}"))[4] != "host"


def test_a_gpu_whose_layers_do_not_fit_in_host_memory_is_told_so(llama_70b, offload_run):
    base = ("simulate", llama_70b, "--profile", GPU, "--profile-set", "ram_bytes=96GiB")
    _, rate, bound, more, memory, with_more = parts(offload_run(*base).out)
    assert (bound, memory) == ("the disk and the link to host memory", "host")
    record = json.loads(offload_run(*base, "--json").out)
    assert record["home"] == "split"
    disk = json.loads(offload_run(*base, "--home", "disk", "--json").out)
    assert disk["s_per_token"] > 3 * record["s_per_token"]  # most of the layers are in memory
    grown = f"ram_bytes={int(record['more_memory']['limit_bytes'] / 0.85) + 1}"
    roomy = json.loads(offload_run(*base, "--profile-set", grown, "--json").out)
    assert roomy["home"] == "host"
    assert with_more == format_speed(roomy["s_per_token"]).split()[0]
    assert float(with_more) > 1.05 * float(rate)


def test_a_limit_on_pinned_memory_is_said_and_priced(llama_70b, offload_run):
    base = ("simulate", llama_70b, "--profile", GPU, "--profile-set", "ram_bytes=256GiB")
    free = json.loads(offload_run(*base, "--json").out)
    assert free["host_pinned_bytes"] == free["host_bytes"] > 2**36
    assert "can be pinned" not in offload_run(*base).out
    base += ("--profile-set", "pinned_bytes=1GiB")
    capped = json.loads(offload_run(*base, "--json").out)
    # An embedding that cannot be pinned is on the device, and fewer layers are.
    assert capped["host_base_bytes"] == 0 < 2**30 < free["host_base_bytes"]
    assert capped["host_bytes"] > free["host_bytes"] - free["host_base_bytes"]
    assert 2**29 < capped["host_pinned_bytes"] < 2**30
    assert capped["s_per_token"] > 1.05 * free["s_per_token"]
    said = offload_run(*base).out.replace("\n", " ")
    assert re.search(r"in\s+host\s+memory\s+944 MiB\s+can\s+be\s+pinned", said)
    refused = offload_run("simulate", llama_70b, "--profile", CPU, "--profile-set", base[-1])
    assert refused.code == 2 and "no pinned memory" in refused.err


def test_host_memory_holds_the_embedding_or_the_device_does(llama_70b, offload_run):
    """2 GiB of it; where that is all of host memory that is used, a limit below has no effect."""
    base = ("simulate", llama_70b, "--profile", GPU, "--home", "disk", "--draft", "none")
    found = json.loads(offload_run(*base, "--host-memory", "3GiB", "--json").out)
    assert found["home"] == "disk" and found["host_bytes"] == found["host_base_bytes"]
    assert found["host_base_bytes"] == 128256 * 8192 * 2
    assert "in host memory, by rows" in offload_run(*base, "--host-memory", "3GiB").out
    refused = offload_run(*base, "--host-memory", "1GiB")
    assert refused.code == 2 and "--host-memory limits streamed layers" in refused.err


def test_plans_first_line(make_tiny, offload_run):
    model = make_tiny("llama", tokenizer=True, num_hidden_layers=8)
    base = ("plan", model, "--draft", "none", "-c", 64)
    smallest = json.loads(offload_run(*base, "--json").out)["smallest_device_bytes"]
    record = json.loads(offload_run(*base, "--device-memory", smallest, "--json").out)
    predicted, more = record["predicted"], record["more_memory"]
    assert predicted["tokens_per_s"] == pytest.approx(1 / predicted["s_per_token"])
    shown = parts(offload_run(*base, "--device-memory", smallest).out)
    assert shown[1] == format_speed(predicted["s_per_token"]).split()[0]
    if more is not None:  # the profile's times decide
        roomy = offload_run(*base, "--device-memory", more["limit_bytes"], "--json")
        assert json.loads(roomy.out)["predicted"]["s_per_token"] == more["s_per_token"]


def test_nothing_is_promised_where_nothing_is_streamed(tiny_model, offload_run):
    assert parts(offload_run("plan", tiny_model, "--draft", "none").out)[3] is None
    record = json.loads(offload_run("plan", tiny_model, "--resident-layers", 1, "--json").out)
    assert record["more_memory"] is None  # the user fixed what is streamed


@pytest.mark.parametrize("width", [60, 80, 120])
def test_plans_keep_to_the_terminal(width, llama_70b, make_tiny, offload_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    model = make_tiny("llama", tokenizer=True, num_hidden_layers=8)
    outs = [
        offload_run("plan", model, "--device-memory", "300MiB", "--resident-layers", 3).out,
        offload_run("plan", model, "--draft", "triforce", "--device-memory", "400MiB").out,
        offload_run("simulate", llama_70b, "--profile", GPU).out,
    ]
    for out in outs:
        assert out and max(map(len, out.splitlines())) <= min(width, 100)


def test_refused_ways_are_readable_at_80_columns(make_tiny, offload_run):
    model = make_tiny("llama", tokenizer=True, max_position_embeddings=4096)
    base = ("plan", model, "--kv", "disk", "-c", 4096)
    fits = json.loads(offload_run(*base, "--draft", "none", "--json").out)["smallest_device_bytes"]
    done = offload_run(*base, "--device-memory", fits)
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    refused = " ".join(done.out[done.out.index("other ways") :].split())
    assert "needs" in refused and "use --device-memory" in refused


def test_tokens_a_second_have_three_digits():
    found = [format_speed(s) for s in (0.001, 0.0123, 0.345, 4.87, 25.13)]
    assert [f.split()[0] for f in found] == ["1000", "81.3", "2.90", "0.205", "0.0398"]


def test_a_hanging_line_keeps_words_and_shows_no_controls():
    line = "a\x1b[2J name: use --retrieval-budget-tokens and --device-memory 12GiB or less"
    broken = hanging(line, 4, 40)
    assert all(len(part) <= 40 for part in broken.splitlines())
    assert " ".join(broken.split()) == line.replace("\x1b", "\\x1b")
    assert "\x1b" not in broken


def test_layers_that_are_spread_evenly_are_few_words():
    assert layer_words([0, 1, 2, 3, 7]) == "0-3, 7"
    assert layer_words([2, 7, 12, 17, 22]) == "every 5th from 2 to 22"
    assert layer_words([1, 3, 6, 8, 11]) == "every 2nd or 3rd from 1 to 11"
    assert layer_words([1, 3, 9, 11, 30]) == "1, 3, 9, 11, 30"


def test_a_model_of_the_hubs_cache_is_called_by_its_id(
    tiny_model, offload_run, tmp_path, monkeypatch
):
    commit = "7e27bd9f95328f0f3b08261d1252705110c806f8"
    repository = tmp_path / "models--org--small-model"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    done = offload_run("plan", "org/small-model")
    assert done.out.startswith("org/small-model: ")
    assert commit not in done.out
    assert "org/small-model, float32 on cpu" in offload_run("org/small-model", "x", "-n", 2).err
