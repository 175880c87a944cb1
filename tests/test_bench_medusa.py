"""The bench of Medusa heads: replayed passes are those that are made, prompts are as promised."""

import ast
import json
import shutil
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from medusa_heads import write_own, write_shared
from tool_runs import loaded
from torch.nn.functional import pad

from offload_rt.errors import ConfigError
from offload_rt.speculative.medusa.calibration import CALIBRATION_FILE
from offload_rt.speculative.medusa.checkpoint import open_heads
from offload_rt.speculative.medusa.heads import MedusaHeads
from offload_rt.speculative.medusa.storage import read_heads


@pytest.fixture
def bench(run_tool):
    """Run a command line of the tool; returns what it printed."""
    with loaded("bench_medusa") as tool:
        yield partial(run_tool, tool)


def test_replayed_passes_are_those_that_are_made(
    bench, tiny_model, offload_run, prompt_file, tmp_path
):
    heads = tmp_path / "heads"
    options = ("--epochs", 20, "--heads", 3, "--self-distill", "--answer-tokens", 30, "-q")
    done = offload_run(
        *("train-medusa", tiny_model, "--output", heads, "--data", prompt_file, *options),
        *("--device", "cpu", "--device-memory", "400MiB", "--lr", 0.01),
    )
    assert done.code == 0, done.err
    more = ("--answer", 30, "--device-memory", "400MiB", "--json", "--together", 3)
    sizes = ("--measure", 9, "--replay", "3,30")
    out = bench("trees", tiny_model, heads, "--prompts", prompt_file, *sizes, *more)
    found = json.loads(out)
    assert found["passes"] < found["tokens"]  # drafts stood, so there is something to replay
    three, nine, thirty = found["trees"]
    first, *_ = found["heads"]["top1"]
    assert 0 < first <= found["heads"]["top5"][0] <= 1
    assert nine["measured"] == nine["replayed"] == found["tokens"] / found["passes"]
    assert three["measured"] is None and three["replayed"] <= thirty["replayed"]


def test_heads_without_calibration_are_refused(bench, tiny_model, prompt_file, tmp_path):
    heads = write_own(tmp_path / "heads")
    with pytest.raises(ConfigError, match="is not calibrated"):
        bench("trees", tiny_model, heads, "--prompts", prompt_file)


def test_prompts_are_split_for_good_and_made_of_code(bench, tmp_path, monkeypatch):
    stdlib, some = Path(sysconfig.get_path("stdlib")), tmp_path / "some"
    some.mkdir()
    for path in stdlib.glob("[a-c]*.py"):
        shutil.copy(path, some)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": some}[name])
    out = bench("code", "--count", 40)
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 40
    for record in records:
        (function,) = ast.parse(record["prompt"]).body
        assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function)
        module = record["task_id"].removeprefix("code/").split(".")[0]
        assert (stdlib / f"{module}.py").exists()
    data, train, test = (tmp_path / name for name in ("all", "train", "test"))
    data.write_text(out)
    bench("split", data, "--share", 0.75, "--train", train, "--test", test)
    one, two = (path.read_text().splitlines() for path in (train, test))
    assert len(one) == 30 and sorted(one + two) == sorted(out.splitlines())


@pytest.mark.parametrize("own", [True, False], ids=["own-head", "models-head"])
def test_widened_heads_say_the_same_of_a_padded_state(bench, make_tiny, tmp_path, own):
    narrow = (write_own if own else write_shared)(tmp_path / "narrow", size=48, bias=True)
    (narrow / CALIBRATION_FILE).write_text("{}")
    model = make_tiny("llama", hidden_size=64)
    bench("widen", narrow, model, "--output", tmp_path / "wide")
    assert (tmp_path / "wide" / CALIBRATION_FILE).read_text() == "{}"
    hidden, output = torch.randn(5, 48), torch.randn(300, 64)
    found = []
    for folder, rows in ((narrow, hidden), (tmp_path / "wide", pad(hidden, (0, 16)))):
        stored = read_heads(open_heads(folder))
        width = stored.shape.hidden_size
        heads = MedusaHeads(stored.shape, lambda state, w=width: state @ output[:, :w].T)
        heads.load_state_dict(stored.tensors)
        with torch.inference_mode():
            found.append(heads(rows))
    assert width == 64
    torch.testing.assert_close(found[1], found[0])


def test_heads_are_not_made_narrower(bench, make_tiny, tmp_path):
    heads = write_own(tmp_path / "heads", size=96)
    with pytest.raises(ConfigError, match="a hidden state of 64 numbers, the heads a wider"):
        bench("widen", heads, make_tiny("llama", hidden_size=64), "--output", tmp_path / "x")
