"""The bench of drafts: a replay takes the passes that are made, and other answers are refused."""

import json

import pytest
from tool_runs import loaded


@pytest.fixture
def bench(run_tool, capsys):
    """Run a command line of the tool; returns what it printed, on stdout or as an error."""
    with loaded("bench_drafting") as tool:

        def run(*arguments):
            try:
                return run_tool(tool, *arguments)
            except SystemExit as ended:
                assert ended.code == 2
                return capsys.readouterr().err

        yield run


@pytest.fixture(scope="module")
def undrafted(tmp_path_factory):
    """Where the first test leaves answers without drafts to the others."""
    return tmp_path_factory.mktemp("undrafted")


@pytest.mark.parametrize(("nodes", "window"), [(3, "full"), (24, 44)])
def test_a_replay_takes_the_passes_that_are_made(
    bench, tiny_model, offload_run, tmp_path, undrafted, nodes, window
):
    prompt_file = undrafted / "prompts.txt"
    prompt_file.write_text("the quick fox\nthe lazy fox\n")
    model = small = tiny_model  # a window makes it err
    common = ("bench", model, "--prompts", prompt_file, "-n", 40, "--device-memory", "400MiB", "-q")
    drafting = ("--draft", f"model:{small}", "--draft-tokens", nodes, "--draft-window", window)
    answers = undrafted / "bench.json"
    if not answers.exists():
        assert offload_run(*common, "--draft", "none", "--output", undrafted).code == 0
    assert offload_run(*common, *drafting, "--output", tmp_path).code == 0
    plain, drafted = (json.loads(p.read_text()) for p in (answers, tmp_path / "bench.json"))
    sizes = ("--nodes", nodes, "--windows", window, "--json")
    (row,) = json.loads(bench(model, small, "--prompts", prompt_file, "--answers", answers, *sizes))
    assert plain["totals"]["tokens_per_pass"] == 1
    assert row["tokens_per_pass"] == pytest.approx(drafted["totals"]["tokens_per_pass"])
    assert row["answers"] == 2 and row["lowest"] <= row["tokens_per_pass"] <= row["highest"]
    assert row["nodes"] == nodes and row["draft_passes"] >= 1


def test_what_is_no_greedy_bench_is_refused(bench, make_tiny, offload_run, prompt_file, tmp_path):
    model = make_tiny("llama", tokenizer=True)
    asked = (model, model, "--prompts", prompt_file, "--answers")
    assert "is not what `offload-run bench` writes" in bench(*asked, prompt_file)
    common = ("bench", model, "--prompts", prompt_file, "-n", 3, "-q", "--output", tmp_path)
    assert offload_run(*common, "--temperature", 1).code == 0
    assert "was sampled" in bench(*asked, tmp_path / "bench.json")
