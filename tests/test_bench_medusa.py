"""The bench of Medusa heads: replayed passes are those that are made, prompts are as promised."""

import ast
import importlib.util
import json
import sys
import sysconfig
from pathlib import Path

import pytest
from medusa_heads import write_own

from offload_rt.errors import ConfigError

TOOL = Path(__file__).parent.parent / "tools" / "bench_medusa.py"


@pytest.fixture
def bench(capsys, monkeypatch):
    """Run a command line of the tool; returns what it printed."""
    spec = importlib.util.spec_from_file_location("bench_medusa", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"the {word} fox\n" for word in ["quick", "brown", "lazy", "dog"]))
    return path


def test_replayed_passes_are_those_that_are_made(bench, tiny_model, offload_run, prompts, tmp_path):
    heads = tmp_path / "heads"
    options = ("--epochs", 20, "--heads", 3, "--self-distill", "--answer-tokens", 30, "-q")
    done = offload_run(
        *("train-medusa", tiny_model, "--output", heads, "--data", prompts, *options),
        *("--device", "cpu", "--device-memory", "400MiB", "--lr", 0.01),
    )
    assert done.code == 0, done.err
    more = ("--answer", 30, "--device-memory", "400MiB", "--json", "--together", 3)
    out = bench(
        "trees", tiny_model, heads, "--prompts", prompts, "--measure", 9, "--replay", "3,30", *more
    )
    found = json.loads(out)
    assert found["passes"] < found["tokens"]  # drafts stood, so there is something to replay
    three, nine, thirty = found["trees"]
    first, *_ = found["heads"]["top1"]
    assert 0 < first <= found["heads"]["top5"][0] <= 1
    assert nine["measured"] == nine["replayed"] == found["tokens"] / found["passes"]
    assert three["measured"] is None and three["replayed"] <= thirty["replayed"]


def test_heads_without_calibration_are_refused(bench, tiny_model, prompts, tmp_path):
    heads = write_own(tmp_path / "heads")
    with pytest.raises(ConfigError, match="is not calibrated"):
        bench("trees", tiny_model, heads, "--prompts", prompts)


def test_prompts_are_split_for_good_and_made_of_code(bench, tmp_path):
    out = bench("code", "--count", 40)
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 40
    for record in records:
        (function,) = ast.parse(record["prompt"]).body
        assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function)
        module = record["task_id"].removeprefix("code/").split(".")[0]
        assert (Path(sysconfig.get_path("stdlib")) / f"{module}.py").exists()
    data, train, test = (tmp_path / name for name in ("all", "train", "test"))
    data.write_text(out)
    bench("split", data, "--share", 0.75, "--train", train, "--test", test)
    one, two = (path.read_text().splitlines() for path in (train, test))
    assert len(one) == 30 and sorted(one + two) == sorted(out.splitlines())
