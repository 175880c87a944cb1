"""`offload-run medusa` and heads on the command line: what is shown, written and refused."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from medusa_heads import random_heads, write_own, write_pickled, write_shared, write_vllm

from offload_rt.speculative.medusa.calibration import CALIBRATION_FILE, read_calibration

BASE = ("-p", "hello there", "-n", 12)


@pytest.fixture
def shared(tmp_path):
    return write_shared(tmp_path / "heads")


def test_answers_stay_what_they_were_and_the_block_names_the_heads(tiny_model, offload_run, shared):
    plain = offload_run("generate", tiny_model, *BASE)
    done = offload_run("generate", tiny_model, *BASE, "--draft", f"medusa:{shared}")
    assert (done.code, done.out) == (0, plain.out)
    assert re.search(r"drafting medusa heads, \d+ of \d+ drafted accepted", done.err)
    fixed = ("--draft", f"medusa:{shared}", "--draft-tokens", 10, "--json")
    record = offload_run("generate", tiny_model, *BASE, *fixed)
    made = json.loads(record.out)
    assert made["speculation"]["drafter"] == "medusa"
    assert made["plan"]["draft_tokens"] == 10 and made["plan"]["drafter_bytes"] > 49 * 1024


def test_plan_counts_the_heads_without_torch(tiny_model, shared):
    source = (
        "import sys; from offload_rt.cli import run; code = run(sys.argv[1:])\n"
        "print(code, 'torch' in sys.modules)"
    )
    for arguments in (
        ["plan", tiny_model, "--draft", f"medusa:{shared}"],
        ["medusa", "info", shared],
    ):
        done = subprocess.run(
            [sys.executable, "-c", source, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "0 False"
        if arguments[0] == "plan":
            assert re.search(r"Medusa heads +[\d.]+ KiB +heads, their logits", done.stdout)


def test_the_plan_is_what_the_run_uses(tiny_model, offload_run, shared):
    options = (
        "--context",
        64,
        "--device-memory",
        "300MiB",
        "--json",
        "--draft",
        f"medusa:{shared}",
    )
    planned = json.loads(offload_run("plan", tiny_model, *options).out)
    ran = json.loads(offload_run("generate", tiny_model, "-p", "x", *options).out)
    assert planned["drafter_bytes"] == ran["plan"]["drafter_bytes"] > 0


def test_info_shows_what_the_tensors_say(offload_run, tmp_path, shared):
    shown = offload_run("medusa", "info", shared).out
    assert "3, 1 layer each (config.json says 2 heads; the tensors decide)" in shown
    assert "64, with biases" in shown and "the model's\n" in shown and "made for      tiny" in shown
    assert "mc_sim_7b_63, 61 nodes" in shown
    own = write_own(tmp_path / "own", heads=5, layers=2, bias=False)
    record = json.loads(offload_run("medusa", "info", own, "--json").out)
    assert (record["heads"], record["layers"], record["bias"]) == (5, 2, False)
    assert record["lm_head"] == "own" and record["head_rows"] == 300
    assert record["bytes"] == 4 * (5 * (2 * 64 * 64 + 300 * 64))
    pickled = write_pickled(tmp_path / "pt", random_heads())
    refused = offload_run("medusa", "info", pickled)
    assert refused.code == 4 and "tools/convert_medusa.py" in refused.err
    vllm = write_vllm(tmp_path / "vllm", random_heads(own=True), token_map=[4, 9])
    assert "one stored for each, 300 rows, of which a token map names 2" in (
        offload_run("medusa", "info", vllm).out
    )


def test_converted_heads_draft(tiny_model, offload_run, convert_medusa, tmp_path):
    pickled = write_pickled(tmp_path / "pt", random_heads(own=True))
    run = ("generate", tiny_model, *BASE, "-q", "--draft")
    refused = offload_run(*run, f"medusa:{pickled}")
    assert (
        refused.code == 4
        and f"`python tools/convert_medusa.py {pickled} NEW_FOLDER`" in refused.err
    )
    plain = offload_run("generate", tiny_model, *BASE).out
    for layout in ("tgi", "vllm"):
        new = tmp_path / layout
        done = convert_medusa(pickled, new, "--to", layout)
        made = "3 heads of 1 layers, hidden size 64, with biases, an output head of 300 rows each"
        assert done.code == 0 and done.out.startswith(f"{made}\n{new}/")
        assert re.search(r"/\w+\.safetensors \(\d+ KiB\)\n$", done.out)
        assert convert_medusa(new).out == f"{made}\n"
        assert offload_run(*run, f"medusa:{new}").out == plain


def test_the_models_head_goes_to_vllm(tiny_model, offload_run, convert_medusa, tmp_path, shared):
    for arguments, message in (
        (["--to", "vllm"], "add --model"),
        (["--to", "tgi", "--model", tiny_model], "--model has no effect"),
    ):
        done = convert_medusa(shared, tmp_path / "new", *arguments)
        assert done.code == 2 and message in done.err and not (tmp_path / "new").exists()
    new = tmp_path / "new"
    done = convert_medusa(shared, new, "--to", "vllm", "--model", tiny_model)
    assert done.code == 0
    assert "one stored for all, 300 rows" in offload_run("medusa", "info", new).out


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{word} fox\n" for word in ["the", "quick", "brown", "lazy"]))
    return path


def test_calibrating_shapes_later_trees(tiny_model, offload_run, shared, prompts):
    command = ("medusa", "calibrate", shared, tiny_model, "--prompts", prompts, "-n", 12)
    done = offload_run(*command, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["file"] == str(shared / CALIBRATION_FILE)
    kept = read_calibration(shared)
    assert kept.accuracy == record["accuracy"] and kept.model == tiny_model.name
    assert [len(row) for row in kept.hits] == [32] * 3
    one, two, three = kept.places
    assert one >= two >= three > 0 and one <= 4 * 11
    shown = offload_run("medusa", "info", shared).out
    assert f"{one} places in answers of {tiny_model.name}" in shown and "head 3" in shown
    plain = offload_run("generate", tiny_model, *BASE).out
    drafted = offload_run("generate", tiny_model, *BASE, "--draft", f"medusa:{shared}")
    assert drafted.out == plain
    # Streamed and with one prompt at a time the same is counted.
    some = offload_run(*command, "--resident-layers", 0, "--slots", 2)
    assert some.code == 0 and "is expected to give" in some.out
    assert read_calibration(shared) == kept


def test_calibration_goes_where_it_is_told(tiny_model, offload_run, shared, prompts, tmp_path):
    command = ("medusa", "calibrate", shared, tiny_model, "--prompts", prompts, "--limit", 2)
    missing = offload_run(*command, "--output", tmp_path / "missing")
    assert missing.code == 2 and "is no folder" in missing.err
    (tmp_path / "there").mkdir()
    assert offload_run(*command, "-n", 4, "--output", tmp_path / "there").code == 0
    assert read_calibration(tmp_path / "there") and not (shared / CALIBRATION_FILE).exists()


def test_bad_usage(tiny_model, offload_run, shared, prompts, tmp_path):
    calibrate = ("medusa", "calibrate", shared, tiny_model, "--prompts")
    bare = shutil.copytree(shared, tmp_path / "bare")
    (bare / "medusa_lm_head.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    write_own(tmp_path / "wide", size=128)
    for arguments, code, message in (
        (("medusa", "info", "/no/such/folder"), 4, "'/no/such/folder' does not exist"),
        (("medusa", "info", tiny_model), 4, "holds no Medusa heads"),
        (("medusa", "info", bare), 4, "holds no Medusa heads"),
        (("medusa", "convert", shared, shared), 2, "use `python tools/convert_medusa.py HEADS FOL"),
        ((*calibrate, "/no/such/file"), 2, "cannot read the prompts"),
        ((*calibrate, prompts, "--context", 20), 2, "there is room for 20"),
        (("generate", tiny_model, "-p", "x", "--draft", "medusa:"), 2, "is not known"),
        (
            ("generate", tiny_model, "-p", "x", "--draft", f"medusa:{tmp_path / 'wide'}"),
            2,
            "hidden state of 128 numbers",
        ),
        (
            ("plan", tiny_model, "--draft", f"medusa:{tmp_path / 'wide'}"),
            2,
            "hidden state of 128 numbers",
        ),
    ):
        done = offload_run(*arguments)
        assert (done.code, done.out) == (code, ""), done.err
        assert message in done.err and "Traceback" not in done.err


def test_bad_usage_of_the_converter(convert_medusa, shared, tmp_path):
    nan = {n: t.fill_(torch.nan) for n, t in random_heads().items()}
    write_pickled(tmp_path / "nan", nan)
    for arguments, code, message in (
        ((tmp_path / "nan", tmp_path / "x"), 4, "not finite"),
        ((shared, shared), 2, "is already there"),
        ((shared, tmp_path / "x", "--to", "pt"), 2, "'pt'"),
    ):
        done = convert_medusa(*arguments)
        assert (done.code, done.err.count("Traceback")) == (code, 0) and message in done.err
    assert not (tmp_path / "x").exists()
