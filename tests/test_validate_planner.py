"""`tools/validate_planner.py`: errors of several profiles' predictions, and which curves fall."""

from dataclasses import replace
from itertools import pairwise

import pytest
from test_planner import PROFILE
from tool_runs import loaded

from offload_rt.planning import planner
from offload_rt.profiling.store import save_profile


@pytest.fixture(scope="module")
def tool():
    with loaded("validate_planner") as module:
        yield module


def row(case, measured, **by):
    numbers = dict.fromkeys(
        ("predicted_pass_s", "measured_pass_s", "predicted_draft_s", "measured_draft_s"), 0.0
    )
    return numbers | {
        "case": case,
        "drafting": "none",
        "streamed_layers": 3,
        "predicted_s_per_token": by["a"],
        "measured_s_per_token": measured,
        "predicted_by": by,
    }


def test_each_profile_is_judged_by_the_least_time_of_each_plan(tool):
    rows = [row("x", 2.0, a=1.1, b=2.0), row("y", 4.0, a=4.0, b=3.0), row("x", 1.0, a=1.1, b=2.0)]
    plans = tool.summarise(rows)
    assert [p["measured_s_per_token"] for p in plans] == [1.0, 4.0]
    assert plans[0]["errors"] == pytest.approx({"a": 0.1, "b": 1.0}) and plans[1]["error"] == 0.0
    table = tool.as_table(plans)
    assert "a: 2 predictions, median error 5.0%, 90th percentile 10.0%, largest 10.0%" in table
    assert "b: 2 predictions, median error 62.5%, 90th percentile 100.0%" in table
    assert "all: 4 predictions, median error 17.5%" in table


def test_curves_that_fall_are_counted(tool, tmp_path):
    path = tmp_path / "mine.json"
    flat = replace(PROFILE, name="mine", notes=("beside other work",), layers=PROFILE.layers[:1])
    times = flat.layers[0].times
    rising = all(a.layer_s.value <= b.layer_s.value for a, b in pairwise(times))
    save_profile(flat, path)
    assert rising and tool.describe(str(path)) == (
        "mine: 0 pairs of layer times fall; beside other work"
    )
    slow = replace(times[0], layer_s=replace(times[0].layer_s, value=times[2].layer_s.value * 1.01))
    wrong = replace(flat.layers[0], times=(slow, *times[1:]))
    save_profile(replace(flat, layers=(wrong,)), path)
    assert tool.describe(str(path)).startswith("mine: 2 pairs of layer times fall")


def test_other_processes_end_with_the_body(tool, monkeypatch):
    started = []
    popen = tool.subprocess.Popen

    def start(command):
        started.append(popen(["sleep", "60"]))
        return started[-1]

    monkeypatch.setattr(tool.subprocess, "Popen", start)
    with tool.busy(3, 1):
        pass
    assert all(process.poll() is not None for process in started)


def test_a_plan_is_predicted_in_the_forms_an_engine_looks_at(tool, monkeypatch, tiny_model):
    seen, forms = [], planner.forms_of_ends
    monkeypatch.setattr(planner, "forms_of_ends", lambda *of: seen.append(of) or forms(*of))
    case = tool.Case(model="small", memory=None)
    prompts, models = {"small": [[1, 2, 3]]}, {"small": tiny_model}
    bench = tool.Bench(models=models, prompts=prompts, answer=4, profiles=[None])
    predicted = bench._predicted_s(None, case, tool.NOTHING_SEEN)
    assert predicted > 0 and len(seen) == 1
    with bench._engine(case, tool.NOTHING_SEEN):
        assert seen[0][1:] == seen[1][1:]
