"""`offload-run train-medusa`: from a file to heads that draft; stopped, resumed and refused."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path

import forks
import pytest
import torch
from engines import reference_model
from safetensors.torch import load_file

from offload_rt.cli import run
from offload_rt.cli.held import held
from offload_rt.cli.talk_file import read_talks
from offload_rt.speculative.medusa.calibration import read_calibration
from offload_rt.training import job
from offload_rt.training.frozen import FrozenTrainer
from offload_rt.training.talks import Talk, split

HERE = Path(__file__).parent
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
ASK = ("-p", "hello there", "-n", 12)
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed"
)


@pytest.fixture(autouse=True)
def no_curve(request, monkeypatch):
    """A curve is half a second of drawing: only who looks for one has it drawn."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(job, "draw_curve", lambda *_: True)


@pytest.fixture
def curves():
    """They are drawn."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.txt"
    path.write_text("".join(f"{a} {b} fox\n" for a in WORDS for b in WORDS[:2]))
    return path


def command(model, output, data, *more):
    """A training of seconds."""
    usual = ("--epochs", 2, "--batch-tokens", 64, "--heads", 3, "--seed", 3, "-q")
    usual += ("--vocabulary", "full")
    place = ("--device", "cpu", "--device-memory", "400MiB")
    return ("train-medusa", model, "--output", output, "--data", data, *usual, *place, *more)


DISTILL = ("--self-distill", "--answer-tokens", 14, "--sequences", 4, "--holdout", 0.25)


@pytest.fixture(scope="module")
def folder_bytes():
    return lambda folder: {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_from_prompts_to_heads_that_draft(
    tiny_model, offload_run, prompts, tmp_path, folder_bytes, curves
):
    before, heads = folder_bytes(tiny_model), tmp_path / "heads"
    training = command(tiny_model, heads, prompts, *DISTILL, "--epochs", 6, "--json")
    done = offload_run(*training)
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["train"]["texts"] == 12 and made["held_out"]["texts"] == 4
    assert len(made["heads"]) == 3 and made["perplexity"] is None
    assert folder_bytes(tiny_model) == before  # Medusa-1 does not touch the model
    assert not (heads / "cache").exists() and not (heads / "training.state").exists()
    plain = offload_run("generate", tiny_model, *ASK)
    drafted = offload_run("generate", tiny_model, *ASK, "--draft", f"medusa:{heads}")
    assert (drafted.code, drafted.out) == (0, plain.out)
    shown = offload_run("medusa", "info", heads).out
    assert "one stored for each, 300 rows" in shown and f"of {tiny_model.name}" in shown
    lines = (heads / "loss.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[len(losses) // 2 :]) < sum(losses[: len(losses) // 2])
    # What is trained already is not trained again.
    same = offload_run(*training)
    assert same.code == 0 and json.loads(same.out) == made


def test_the_calibration_is_what_calibrating_on_held_out_prompts_gives(
    tiny_model, offload_run, prompts, tmp_path
):
    heads = tmp_path / "heads"
    small = ("--vocabulary", 64, "--temperature", 0.8)
    done = offload_run(*command(tiny_model, heads, prompts, *DISTILL, *small))
    assert done.code == 0, done.err
    trained = read_calibration(heads)
    _, held_out = split(read_talks(str(prompts)), 0.25, 3)
    test = tmp_path / "test.txt"
    test.write_text("".join(talk.turns[0][1] + "\n" for talk in held_out))
    listened = offload_run("medusa", "calibrate", heads, tiny_model, "--prompts", test, "-n", 14)
    assert listened.code == 0, listened.err
    calibrated = read_calibration(heads)
    # Heads were scored in fp32 from a state each, here in the run: a tie may fall another way.
    assert calibrated.places == trained.places
    for one, two in zip(calibrated.accuracy, trained.accuracy, strict=True):
        assert sum(abs(a - b) for a, b in zip(one, two, strict=True)) <= 0.05


def write_talks(path, count=12):
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{WORDS[n % 8]} {n}"},
                {"role": "assistant", "content": "the quick brown fox jumps over the lazy dog"},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": "the lazy dog jumps over the quick brown fox"},
            ]
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_given_answers_are_learnt(tiny_model, offload_run, tmp_path):
    """The same two answers every time: after training, heads know them by heart."""
    data = write_talks(tmp_path / "talks.jsonl")
    heads = tmp_path / "heads"
    options = ("--epochs", 60, "--lr", 0.01, "--json", "--vocabulary", "full")
    done = offload_run(*command(tiny_model, heads, data, *options))
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["held_out"]["texts"] == 1 and not made["calibrated"]
    assert made["heads"][0]["top1"] > 0.8 > 10 * (1 / 300)
    assert read_calibration(heads) is None
    shared = offload_run(*command(tiny_model, tmp_path / "s", data, "--vocabulary", "shared"))
    assert shared.code == 0 and "medusa calibrate" in shared.out
    assert set(load_file(tmp_path / "s" / "medusa_lm_head.safetensors")) == {
        f"{head}.0.linear.{part}" for head in range(3) for part in ("weight", "bias")
    }


def test_sharegpt_is_read_as_messages(tmp_path):
    messages = write_talks(tmp_path / "a.jsonl", 2)
    record = json.loads(messages.read_text().splitlines()[0])
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[t["role"]], "value": t["content"]} for t in record["messages"]]
    sharegpt = tmp_path / "b.jsonl"
    sharegpt.write_text(json.dumps({"id": "x", "conversations": turns}) + "\n\n")
    assert read_talks(str(sharegpt)) == read_talks(str(messages))[:1]
    assert read_talks(str(sharegpt))[0].prompt == (("user", "the 0"),)


def test_a_cache_serves_several_trainings(tiny_model, offload_run, prompts, tmp_path):
    cache = ("--cache", tmp_path / "cache")
    one = offload_run(*command(tiny_model, tmp_path / "one", prompts, *DISTILL, *cache, "--json"))
    made = json.loads(one.out)
    assert made["seconds"].keys() == {"answers", "states", "heads"}
    other = ("--lr", 0.003, "--layers", 2, "--json")
    two = offload_run(*command(tiny_model, tmp_path / "two", prompts, *DISTILL, *cache, *other))
    assert two.code == 0, two.err
    assert json.loads(two.out)["seconds"].keys() == {"heads"}
    more = ("--heads", 4)
    refused = offload_run(
        *command(tiny_model, tmp_path / "three", prompts, *DISTILL, *cache, *more)
    )
    assert refused.code == 2 and "was made with --heads 3, now it is 4" in refused.err
    assert "another --cache" in refused.err


class Syncs:
    """Stands for `os.fsync`, which is slow; does something at one call."""

    def __init__(self, at=0, what=None):
        self.count, self.at, self.what = 0, at, what

    def __call__(self, fd):
        self.count += 1
        if self.count == self.at:
            self.what()


KILLS = """
import json, os, signal, sys
sys.path[:0] = [{here!r}]
import torch
torch.set_num_threads(1)
import offload_rt.training.job
from test_cli_train import Syncs
from offload_rt.cli import run
from offload_rt.training.frozen import FrozenTrainer

FrozenTrainer.run.__kwdefaults__["save_s"] = 0.0  # after every step
for after in json.loads(sys.argv[2]):
    output = os.path.join(sys.argv[3], str(after))
    pid = os.fork()
    if not pid:
        os.fsync = Syncs(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(run([*json.loads(sys.argv[1]), "--output", output]))
    died = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(died) and os.WTERMSIG(died) == signal.SIGKILL, (after, died)
"""
RESULTS = ("medusa_lm_head.safetensors", "medusa_calibration.json", "config.json")


@pytest.fixture
def saves_often(monkeypatch):
    """After every step."""
    monkeypatch.setitem(FrozenTrainer.run.__kwdefaults__, "save_s", 0.0)


@pytest.fixture(scope="module")
def whole(tiny_model, prompts, tmp_path_factory):
    """Heads from a training that was never stopped, how often it synced, its arguments."""
    folder, syncs = tmp_path_factory.mktemp("whole"), Syncs()
    options = (*DISTILL, "--epochs", 2, "--temperature", 0.8)
    arguments = command(tiny_model, folder / "heads", prompts, *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FrozenTrainer.run.__kwdefaults__, "save_s", 0.0)
        patch.setattr(os, "fsync", syncs)
        train_once(arguments, folder)
    return folder / "heads", syncs.count, arguments


def train_once(arguments, folder):
    """For several tests; what is kept of it is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "draw_curve", lambda *_: True)
        for kind in ("DATA", "CONFIG", "STATE"):
            patch.setenv(f"XDG_{kind}_HOME", str(folder / kind.lower()))
        assert run([str(part) for part in arguments]) == 0


def with_output(arguments, output):
    """The same arguments for another folder."""
    return [*arguments[:3], output, *arguments[4:]]


def test_killed_anywhere_and_resumed_gives_the_same_heads(
    whole, saves_often, offload_run, tmp_path, monkeypatch
):
    """Each kill comes where a file is brought to the disk: answers, states, steps, the result."""
    heads, syncs, arguments = whole
    rest = [str(part) for part in (arguments[:2] + arguments[4:])]
    kills = [7, 13, 24, syncs - 2]
    done = forks.run(
        [
            *(sys.executable, "-c", KILLS.format(here=str(HERE))),
            *(json.dumps(rest), json.dumps(kills), str(tmp_path)),
        ]
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(os, "fsync", Syncs())
    for after in kills:
        output = tmp_path / str(after)
        assert json.loads((output / "training.json").read_text())["result"] is None
        resumed = offload_run(*with_output(arguments, output))
        assert resumed.code == 0, resumed.err
        for name in RESULTS:
            assert (output / name).read_bytes() == (heads / name).read_bytes()


@pytest.mark.parametrize("after", [6, 14, 24])
def test_ctrl_c_says_how_to_go_on(whole, saves_often, offload_run, tmp_path, monkeypatch, after):
    heads, _, arguments = whole
    loud = [part for part in with_output(arguments, tmp_path / "heads") if part != "-q"]
    ctrl_c = Syncs(after, lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(os, "fsync", ctrl_c)
    stopped = offload_run(*loud)
    assert stopped.code == 130 and "run the same again" in stopped.err, stopped.err
    assert "Traceback" not in stopped.err
    resumed = offload_run(*loud)
    assert resumed.code == 0, resumed.err
    for name in RESULTS:
        assert (tmp_path / "heads" / name).read_bytes() == (heads / name).read_bytes()


def test_half_a_batch_of_answers_is_written_anew(tiny_model, offload_run, prompts, tmp_path):
    """The batch is the same one again, and so are its drawn answers."""
    cache = tmp_path / "cache"
    options = (*DISTILL, "--temperature", 0.8, "--cache", cache)
    assert offload_run(*command(tiny_model, tmp_path / "one", prompts, *options)).code == 0
    answers = (cache / "answers.jsonl").read_text()
    lines = answers.splitlines(keepends=True)
    (cache / "answers.jsonl").write_text("".join(lines[:6]) + lines[6][:5])
    assert offload_run(*command(tiny_model, tmp_path / "two", prompts, *options)).code == 0
    assert (cache / "answers.jsonl").read_text() == answers
    assert len(set(lines)) > 12


JOINT = (*DISTILL, "--method", "medusa-2", "--lora-rank", 4)


@pytest.fixture(scope="module")
def joint_heads(tiny_model, prompts, tmp_path_factory):
    """Heads and a model that learned together, by the warm-up."""
    made = {}

    def make(warm_up):
        if warm_up not in made:
            folder = tmp_path_factory.mktemp(warm_up)
            options = (*JOINT, "--warm-up", warm_up)
            train_once(command(tiny_model, folder / "heads", prompts, *options), folder)
            made[warm_up] = folder / "heads"
        return made[warm_up]

    return make


@needs_peft
@pytest.mark.parametrize("warm_up", ["two-stage", "sine"])
def test_medusa_2_makes_a_model_and_heads_that_generate_loads(
    tiny_model, joint_heads, offload_run, warm_up
):
    heads = joint_heads(warm_up)
    before, after = json.loads((heads / "training.json").read_text())["result"]["perplexity"]
    assert abs(after / before - 1) < 0.1 and after != before
    model = heads / "model"
    plain = offload_run("generate", model, *ASK)
    drafted = offload_run("generate", model, *ASK, "--draft", f"medusa:{heads}")
    assert plain.code == 0 and (drafted.code, drafted.out) == (0, plain.out)
    merged, original = reference_model(model), reference_model(tiny_model)
    changed = [
        name
        for (name, one), (_, two) in zip(
            merged.named_parameters(), original.named_parameters(), strict=True
        )
        if not torch.equal(one, two)
    ]
    assert changed and all(".layers." in name for name in changed)


@needs_peft
def test_medusa_2_resumes_to_the_same_weights(
    tiny_model, joint_heads, offload_run, prompts, tmp_path, monkeypatch
):
    from offload_rt.training import joint

    whole, heads = joint_heads("sine"), tmp_path / "heads"
    options = (*JOINT, "--warm-up", "sine")
    losses, calls = joint.JointTrainer._losses, 0

    def interrupting(*arguments):
        nonlocal calls
        calls += 1
        if calls == 9:  # in the middle of a step
            signal.raise_signal(signal.SIGINT)
        return losses(*arguments)

    monkeypatch.setattr(joint.JointTrainer, "_losses", interrupting)
    assert offload_run(*command(tiny_model, heads, prompts, *options)).code == 130
    torch.manual_seed(99)  # dropout must come from the training's own seed
    assert offload_run(*command(tiny_model, heads, prompts, *options)).code == 0
    for name in ("medusa_lm_head.safetensors", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (heads / name).read_bytes()


def test_a_folder_is_written_by_one_training_at_a_time(tiny_model, offload_run, prompts, tmp_path):
    folders = {"--output": tmp_path / "heads", "--cache": tmp_path / "cache"}
    arguments = command(tiny_model, folders["--output"], prompts, "--cache", folders["--cache"])
    for taken, folder in folders.items():
        folder.mkdir(exist_ok=True)
        with held(folder, taken):
            done = offload_run(*arguments, *DISTILL)
        assert done.code == 2
        assert f"another run is writing in {folder}" in done.err
        assert f"give another {taken}" in done.err
    assert offload_run(*arguments, *DISTILL).code == 0
    with held(folders["--output"], "--output"):  # what is trained may be asked for meanwhile
        done = offload_run(*arguments, *DISTILL)
    assert done.code == 0


def test_what_is_missing_is_a_sentence(
    tiny_model, offload_run, prompts, tmp_path, monkeypatch, curves
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name)
    )
    done = offload_run(*command(tiny_model, tmp_path / "x", prompts, "--method", "medusa-2"))
    assert done.code == 2 and "pip install 'offload-rt[train]'" in done.err
    monkeypatch.undo()
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    loud = [part for part in command(tiny_model, tmp_path / "y", prompts, *DISTILL) if part != "-q"]
    done = offload_run(*loud)
    assert done.code == 0 and "no loss curve: matplotlib is not installed" in done.err
    assert not (tmp_path / "y" / "loss.png").exists() and (tmp_path / "y" / "loss.jsonl").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
def test_the_curve_is_drawn(tmp_path):
    from offload_rt.training.output import draw_curve

    notes = [{"step": n, "loss": 1 / n, "top1": [0.1, 0.2]} for n in (1, 2)]
    assert draw_curve([*notes, notes[1] | {"held_out_top1": [0.1, 0.3]}], tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('[{"messages": []}]\n', "line 1 begins a JSON list"),
        ('{"prompt": "x"}\n{"prompt": 3}\n', "line 2 has no prompt"),
        ('\n{"prompt": "x"}\nnot json\n', "line 3 is not JSON"),
        ('{"messages": []}\n', "line 1: messages is not a list of turns"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: messages, turn 1 needs 'role'"),
        ('{"conversations": [{"from": "bot", "value": "x"}]}\n', "turn 1 needs 'from'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "turn 1 answers nothing"),
        ('{"messages": [{"role": "user", "content": " "}]}\n', "turn 1 is empty"),
        ('{"messages": [{"role": "system", "content": "x"}]}\n', "has no turn of a user"),
        (
            '{"messages": [{"role": "user", "content": "x"},'
            ' {"role": "assistant", "content": "\\ud83d"}]}\n',
            "turn 2 holds half a character",
        ),
        ('{"prompt": "x"}\n', "line 1 has a prompt but no answer: add --self-distill"),
        (b'{"prompt": "x"}\n{"prompt": "\xff"}\n', "line 2 is not UTF-8"),
    ],
)
def test_bad_data_names_its_line(tiny_model, offload_run, tmp_path, lines, message):
    data = tmp_path / "data"
    data.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    done = offload_run(*command(tiny_model, tmp_path / "out", data))
    assert (done.code, done.out) == (2, "") and message in done.err, done.err
    assert done.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_bad_usage(tiny_model, make_tiny, offload_run, prompts, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    out = tmp_path / "out"
    for arguments, code, message in (
        (command(tiny_model, out, prompts), 2, "line 1 has a prompt but no answer"),
        (command(tiny_model, out, "/no/such/file"), 2, "cannot read"),
        (command(tiny_model, tmp_path / "full", prompts, *DISTILL), 2, "no training made it"),
        (command("/no/such/model", out, prompts, *DISTILL), 4, "does not exist"),
        (command(tiny_model, out, prompts, "--temperature", 1), 2, "add --self-distill"),
        (command(tiny_model, out, prompts, "--kv", "host"), 2, "--kv is for answers"),
        (command(tiny_model, out, prompts, *DISTILL, "--lora-rank", 2), 2, "medusa-2"),
        (
            command(tiny_model, out, prompts, *DISTILL, "--vocabulary", "few"),
            2,
            "'few' is neither",
        ),
        (command(tiny_model, out, prompts, *DISTILL, "--kv", "none"), 2, "'none' is not one of"),
        (command(tiny_model, out, prompts, *DISTILL, "--context", 9999), 2, "made for up to 512"),
        (command(tiny_model, out, prompts, *DISTILL, "--heads", 99), 2, "--heads is 99"),
        (command(tiny_model, "/proc/no", prompts, *DISTILL), 2, "cannot make the folder /proc/no"),
    ):
        done = offload_run(*arguments)
        assert (done.code, done.out) == (code, ""), (arguments, done.err)
        assert message in done.err and "Traceback" not in done.err, done.err
    small = ("--device-memory", "90MiB", "--batch-tokens", 2**20)
    done = offload_run(*command(tiny_model, tmp_path / "small", prompts, *DISTILL, *small))
    assert done.code == 3 and re.search(r"training needs [\d.]+ GiB of device", done.err), done.err


def test_a_template_that_refuses_names_the_line(make_tiny, offload_run, tmp_path):
    model = shutil.copytree(make_tiny("llama", tokenizer=True), tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    data = write_talks(tmp_path / "talks.jsonl", 2)
    done = offload_run(*command(model, tmp_path / "out", data))
    assert done.code == 2 and "line 1 of the data:" in done.err and "no system role" in done.err


def test_long_prompts_are_said_and_nothing_left_is_refused(tiny_model, offload_run, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("fox\n" * 3 + "lazy dog\n" + "x" * 300 + "\n")
    options = (*DISTILL, "--context", 120)
    loud = [part for part in command(tiny_model, tmp_path / "a", data, *options) if part != "-q"]
    done = offload_run(*loud)
    assert done.code == 0 and "1 left out, the prompt fills the context" in done.err, done.err
    tight = offload_run(*command(tiny_model, tmp_path / "b", data, *DISTILL, "--context", 10))
    assert tight.code == 2 and "nothing is left to train on" in tight.err


def test_other_models_and_full_disks_are_refused(
    tiny_model, make_tiny, offload_run, prompts, tmp_path, monkeypatch
):
    Usage = namedtuple("Usage", "total used free")
    out = tmp_path / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9, 9, 1000))
    done = offload_run(*command(tiny_model, out, prompts, *DISTILL))
    assert done.code == 2 and "the hidden states need" in done.err and "another --cache" in done.err
    monkeypatch.undo()
    copy = shutil.copytree(tiny_model, tmp_path / tiny_model.name)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    other = offload_run(*command(copy, out, prompts, *DISTILL))
    assert other.code == 2 and "was made with MODEL" in other.err
    changed = offload_run(*command(tiny_model, out, prompts, *DISTILL, "--lr", 0.5))
    assert changed.code == 2 and "was made with --lr 0.001, now it is 0.5" in changed.err
    assert offload_run(*command(tiny_model, out, prompts, *DISTILL)).code == 0


def test_the_help_names_every_default(offload_run):
    shown = " ".join(offload_run("train-medusa", "--help").out.split()).replace("- ", "-")
    for part in ("[default: 8192]", "[default: two-stage]", "OUTPUT/cache, removed at the end"):
        assert part in shown


def test_a_prompt_is_what_comes_before_the_first_answer():
    talk = Talk(line=1, turns=(("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")))
    assert talk.prompt == (("system", "s"), ("user", "u"))
