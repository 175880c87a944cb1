"""`offload-run bench`: prompt sets, the table, the JSON, comparison, interruption."""

import json
import os
import re
import signal
from statistics import mean, median

import pytest

from offload_rt.cli.prompt_set import PromptItem, read_prompt_set, spread
from offload_rt.engine import Engine, Run
from offload_rt.speculative.draft_model.drafter import DraftModelDrafter

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["first turn", "second turn"]},
    {"question_id": 91, "category": "roleplay", "turns": ["you are a fox"]},
    {"question_id": 92, "category": "roleplay", "turns": ["be a lazy dog now"]},
]


def write_lines(path, records):
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    return write_lines(tmp_path / "questions.jsonl", MT_BENCH)


def drafting(folder):
    return ("--draft", f"model:{folder}", "--draft-tokens", 4, "--draft-shape", "chain")


def cells(markdown):
    """Rows of all tables, as lists of cells."""
    lines = (line for line in markdown.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_formats(tmp_path):
    def read(*records):
        return read_prompt_set(str(write_lines(tmp_path / "set", records)))

    assert read(*MT_BENCH)[:2] == [
        PromptItem(line=1, name="81", category="writing", text="first turn"),
        PromptItem(line=2, name="91", category="roleplay", text="you are a fox"),
    ]
    code = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "x"}
    assert read(code, "", code) == [
        PromptItem(line=1, name="HumanEval/0", category="HumanEval", text="def f():\n"),
        PromptItem(line=3, name="HumanEval/0", category="HumanEval", text="def f():\n"),
    ]
    assert read({"prompt": "a"}, {"prompt": "b", "category": "c"}) == [
        PromptItem(line=1, name="line 1", category="text", text="a"),
        PromptItem(line=2, name="line 2", category="c", text="b"),
    ]
    assert read("", "a \u20ac", "  ", '{"b"') == [
        PromptItem(line=2, name="line 2", category="text", text="a \u20ac"),
        PromptItem(line=4, name="line 4", category="text", text='{"b"'),
    ]


def test_windows_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "set"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [item.text for item in read_prompt_set(str(path))] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no prompts"),
        (b" \n\n", "has no prompts"),
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        (b'{"prompt": "a"}\nplain\n', "line 2 is not JSON"),
        (b'{"prompt": "a"}\n\n[1]\n', "line 3 is not a JSON object"),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2 has no prompt"),
        (b'{"prompt": ""}\n', "line 1 has no prompt"),
        (b'{"turns": []}\n', "line 1 has no prompt"),
        (b'{"turns": [3]}\n', "line 1 has no prompt"),
        (b'{"text": "a"}\n', "line 1 has no prompt"),
        (b'{"prompt": "a", "category": 7}\n', "line 1: category is 7"),
        (b"a\nb\xff\n", "line 2 is not UTF-8: byte 0xff at offset 1"),
        (b'{"prompt": ' + b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        (b'{"prompt": "\\ud800"}\n', "not UTF-8"),
    ],
)
def test_bad_prompt_files(content, message, tiny_model, offload_run, tmp_path):
    path = tmp_path / "set"
    path.write_bytes(content)
    done = offload_run("bench", tiny_model, "--prompts", path, "-n", 2)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(rf"offload-run: error: [^\n]*{re.escape(message)}[^\n]*\n", done.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--prompts'"),
        (["--prompts", "/no/such/file"], "cannot read the prompts of /no/such/file: No such file"),
        (["--prompts", "SET", "--limit", "0"], "--limit"),
        (["--prompts", "SET", "--rounds", "0"], "--rounds"),
        (
            ["--prompts", "SET", "--against-none", "--draft", "none"],
            "compares with a drafter: add --draft",
        ),
        (
            [
                "--prompts",
                "SET",
                "--against-none",
                "--temperature",
                "1",
                "--seed",
                "3",
                "--exact",
                "off",
            ],
            "--against-none has nothing to compare",
        ),
        (["--prompts", "SET", "--context", "16"], "tokens, --context sets memory aside for 16"),
        (["--prompts", "SET", "--output", "SET"], "cannot make the folder"),
    ],
)
def test_bad_usage(arguments, message, tiny_model, offload_run, questions):
    arguments = [questions if argument == "SET" else argument for argument in arguments]
    done = offload_run("bench", tiny_model, *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err and "Traceback" not in done.err


def test_spread_is_even_and_keeps_the_order():
    items = list(range(80))
    assert spread(items, None) == spread(items, 80) == spread(items, 100) == items
    assert spread(items, 8) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert spread(items, 3) == [0, 26, 53]
    assert spread(items, 1) == [0]


def test_a_table_without_drafting(tiny_model, offload_run, questions):
    more = ("--resident-layers", 1, "--device-memory", "100MiB", "--draft", "none")
    done = offload_run("bench", tiny_model, "--prompts", questions, "-n", 6, *more)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"# offload-run bench: {tiny_model.name}\n")
    assert f"model: {tiny_model.name}, float32 on cpu" in done.out
    assert "prompts: 3 of 3 in questions.jsonl" in done.out
    assert re.search(
        r"1 of 2 layers resident, 1 streamed .*, device memory limit 100 MiB", done.out
    )
    assert "- versions: offload_rt" in done.out and "- draft" not in done.out
    table = cells(done.out)
    assert table[0] == ["category", "prompts", "tokens", "tokens/pass", "acceptance", "tokens/s"]
    found = [row[:5] for row in table[2:]]
    assert found == [
        ["writing", "1", "6", "1.00", "-"],
        ["roleplay", "2", "12", "1.00", "-"],
        ["all", "3", "18", "1.00", "-"],
    ]
    assert re.fullmatch(r"[\d.]+ ± [\d.]+", table[-1][5])


def test_json_rows_make_the_totals(tiny_model, offload_run, questions, tmp_path):
    base = ("bench", tiny_model, "--prompts", questions, "-n", 11, *drafting(tiny_model))
    done = offload_run(*base, "--json", "--rounds", 2, "--output", tmp_path / "new" / "folder")
    record = json.loads(done.out)
    assert json.loads((tmp_path / "new/folder/bench.json").read_text()) == record
    assert (tmp_path / "new/folder/bench.md").read_text().startswith("# offload-run bench")
    assert record["prompts"]["measured"] == record["totals"]["prompts"] == 3
    assert [c["category"] for c in record["categories"]] == ["writing", "roleplay"]
    runs = [run for row in record["rows"] for run in row["runs"]]
    assert [run["round"] for run in record["rows"][0]["runs"]] == [0, 1]
    assert record["totals"]["tokens"] == sum(run["completion_tokens"] for run in runs) == 66
    # the prompt's pass gives 1 token, then come 4 + 1 twice
    assert record["totals"]["tokens_per_pass"] == 5
    assert {run["speculation"]["tokens_per_pass"] for run in runs} == {5}
    assert record["totals"]["acceptance_rate"] == 1.0
    assert record["totals"]["ratio"] is record["rows"][0]["ratio"] is None
    rates = [row["tokens_per_s"] for row in record["rows"]]
    assert record["totals"]["tokens_per_s"] == pytest.approx(mean(rates))
    each = [run["timings"]["tokens_per_s"] for run in record["rows"][0]["runs"]]
    assert rates[0] == pytest.approx(median(each))
    assert record["draft"]["draft"] == f"model:{tiny_model}"
    assert record["engines"]["draft"]["drafter_bytes"] > 0
    alone = offload_run("generate", tiny_model, "-p", "you are a fox", "-n", 11, "--json")
    assert record["rows"][1]["runs"][0]["token_ids"] == json.loads(alone.out)["token_ids"]


def test_against_none_takes_turns_and_finds_equal_texts(
    tiny_model, offload_run, questions, monkeypatch
):
    engines, sweep = [], Engine.sweep

    def noted(self, texts, *others, **options):
        assert not (texts and self._cached_ids[0])  # each prompt starts from an empty cache
        if not engines or engines[-1] is not self:
            engines.append(self)
        return sweep(self, texts, *others, **options)

    monkeypatch.setattr(Engine, "sweep", noted)
    base = ("bench", tiny_model, "--prompts", questions, "-n", 11, *drafting(tiny_model))
    done = offload_run(*base, "--against-none", "--rounds", 2, "--json")
    assert [engine.draft.kind for engine in engines] == ["none", "model", "none", "model"]
    record = json.loads(done.out)
    assert (record["totals"]["same"], record["totals"]["compared"]) == (3, 3)
    row = record["rows"][0]
    phases = [(run["round"], run["phase"]) for run in row["runs"]]
    assert phases == [(0, "none"), (0, "draft"), (1, "none"), (1, "draft")]
    assert row["same"] is True and row["first_difference"] is None
    assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["baseline_tokens_per_s"])
    assert record["totals"]["ratio"] == median(r["ratio"] for r in record["rows"])
    assert record["engines"]["none"]["drafter_bytes"] == 0


def test_against_none_shows_where_texts_differ(tiny_model, offload_run, questions, monkeypatch):
    emit = Run._emit

    def wrong(self, sequences, tokens):
        if self.drafter == "ngram" and self.passes == 4:
            tokens = [[(t + 1) % 256 for t in row] for row in tokens]
        return emit(self, sequences, tokens)

    monkeypatch.setattr(Run, "_emit", wrong)
    base = ("bench", tiny_model, "--prompts", questions, "-n", 6, "--limit", 1, "--against-none")
    done = offload_run(*base, "--draft", "ngram")
    table = cells(done.out)
    assert table[0][6:] == ["tokens/s without drafting", "ratio", "same text"]
    assert table[3][-1] == "0 of 1"
    assert (table[-1][0], table[-1][-1]) == ("81", "token 3")
    assert "same budget: the two engines ran one after the other" in done.out
    assert re.search(r"draft: ngram, up to \d+ tokens, accept greedy", done.out)


def test_a_seed_that_was_drawn_does_not_turn_drafting_off(tiny_model, offload_run, questions):
    base = ("bench", tiny_model, "--prompts", questions, "-n", 4, "--limit", 1)
    sampled = (*base, "--temperature", 1, "--draft", f"model:{tiny_model}", "--json")
    record = json.loads(offload_run(*sampled).out)
    assert type(record["sampling"]["seed"]) is int
    free = record["draft"]["draft_tokens"]
    fixed = json.loads(offload_run(*sampled, "--seed", 3).out)["draft"]["draft_tokens"]
    assert fixed == 64 and free != fixed


def test_sampled_texts_are_not_compared(tiny_model, offload_run, questions):
    base = ("bench", tiny_model, "--prompts", questions, "-n", 4, "--limit", 1, "--draft", "ngram")
    record = json.loads(offload_run(*base, "--against-none", "--temperature", 1, "--json").out)
    assert type(record["sampling"]["seed"]) is int
    assert record["totals"]["same"] is record["rows"][0]["same"] is None


def test_one_token_answers_have_no_rate(tiny_model, offload_run, questions):
    done = offload_run("bench", tiny_model, "--prompts", questions, "-n", 1)
    assert cells(done.out)[-1] == ["all", "3", "3", "-", "-", "-"]


def test_raw_and_names_that_would_break_the_table(tiny_model, offload_run, tmp_path):
    file = write_lines(tmp_path / "set", [{"prompt": "x", "category": "a|b\nc"}])
    done = offload_run("bench", tiny_model, "--prompts", file, "-n", 2, "--raw")
    assert r"| a\|b\nc | 1 | 2 |" in done.out
    assert "up to 1 tokens, raw" in done.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_prints_what_is_done(
    number, code, tiny_model, offload_run, questions, monkeypatch, tmp_path
):
    step, passes = Run.step, []

    def interrupted_step(self):
        passes.append(self)
        if len(passes) == 8:  # in the second answer
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Run, "step", interrupted_step)
    base = ("bench", tiny_model, "--prompts", questions, "-n", 6, "--output", tmp_path / "out")
    done = offload_run(*base)
    assert done.code == code
    assert cells(done.out)[-1][:3] == ["all", "1", "6"]
    assert "prompts: 3 of 3 in questions.jsonl, interrupted: 1 measured" in done.out
    record = json.loads((tmp_path / "out/bench.json").read_text())
    assert record["interrupted"] is True and len(record["rows"]) == 1


def test_ctrl_c_before_anything_is_done(tiny_model, offload_run, questions, monkeypatch):
    sweep = Engine.sweep

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return sweep(self, *arguments, **options)

    monkeypatch.setattr(Engine, "sweep", interrupted)
    done = offload_run("bench", tiny_model, "--prompts", questions, "-n", 6)
    assert (done.code, done.out, done.err) == (130, "", "offload-run: interrupted\n")


def test_every_answer_of_every_round_starts_cold(tiny_model, offload_run, questions, monkeypatch):
    """The draft model reads the whole prompt again each time; so does the target."""
    feed, forward, drafted, read = DraftModelDrafter.feed, Engine._pass, [], []

    def noted_feed(self, rows):
        if len(rows.tokens) > 6:  # a draft's own tokens come one by one
            drafted.append((self._cache.length, len(rows.tokens)))
        return feed(self, rows)

    def noted_pass(self, rows):
        if rows[0].keeps_all:
            read.append((self._caches[0].length, len(rows[0].tokens)))
        return forward(self, rows)

    monkeypatch.setattr(DraftModelDrafter, "feed", noted_feed)
    monkeypatch.setattr(Engine, "_pass", noted_pass)
    base = ("bench", tiny_model, "--prompts", questions, "-n", 6, "--limit", 1)
    done = offload_run(*base, *drafting(tiny_model), "--rounds", 3, "--json")
    (row,) = json.loads(done.out)["rows"]
    assert read == [(0, row["prompt_tokens"])] * 3
    assert drafted == [(0, row["prompt_tokens"] + 1)] * 3
