"""What the shell is answered when it asks for completions."""

import shutil
import subprocess

import pytest


@pytest.fixture
def complete(offload_run, monkeypatch, tmp_path):
    """Complete the last word of a command line as bash's script asks for it."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--name").mkdir()

    def ask(line):
        words = line.split()
        monkeypatch.setenv("_OFFLOAD_RUN_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - (not line.endswith(" "))))
        done = offload_run()
        assert done.code == 0
        return done.out.splitlines()

    return ask


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("offload-run pl", ["dir,pl", "plain,plan"]),
        ("offload-run or", ["dir,or", "plain,org/name"]),
        ("offload-run plan org/", ["dir,org/", "plain,org/name"]),
        ("offload-run -m de", ["dir,de", "plain,demo"]),
        ("offload-run ./model --draft-to", ["plain,--draft-tokens"]),
        (
            "offload-run plan demo --home ",
            ["plain,auto", "plain,host", "plain,disk", "plain,split"],
        ),
        ("offload-run plan demo --draft ng", ["dir,ng", "plain,ngram"]),
        ("offload-run bench demo --prompts q", ["file,q"]),
        ("offload-run medusa c", ["plain,calibrate"]),
        ("offload-run completion b", ["plain,bash"]),
    ],
)
def test_words(line, wanted, complete):
    assert complete(line) == wanted


def test_profiles(complete):
    assert "plain,rtx4090-pcie4x16" in complete("offload-run plan demo --profile rtx")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_asks_us(shell, offload_run):
    done = offload_run("completion", shell)
    assert done.code == 0 and f"_OFFLOAD_RUN_COMPLETE={shell}_complete" in done.out
    if program := shutil.which(shell):
        check = [program, "-n"] if shell != "fish" else [program, "--no-execute"]
        assert subprocess.run(check, input=done.out, text=True, check=False).returncode == 0


def test_a_broken_file_does_not_break_completion(complete, tmp_path, monkeypatch):
    (tmp_path / "bad.toml").write_text("[nonsense")
    monkeypatch.setenv("OFFLOAD_RT_CONFIG", str(tmp_path / "bad.toml"))
    assert complete("offload-run plan demo --home d") == ["plain,disk"]
