"""`offload-run serve`: what it refuses before it loads anything, and how it ends."""

import http.client
import json
import re
import signal
import subprocess
import sys
import threading

import pytest
from forks import Forked

from offload_rt.cli import serve as module


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask: add --api-key"),
        (["--api-key", "short"], "the API key has 5 characters, accepted are 8 or more"),
        (["--api-key", "abcdefgh\x1b"], "accepted are 8 or more of ASCII"),
        (["--api-key", "abcdefgh", "--api-key-file", "x"], "both say a key: give one of them"),
        (["--api-key-file", "no/such"], "cannot read no/such"),
        (["--kv-tokens", "100", "--context", "200"], "--kv-tokens is 100, one sequence"),
        (["--kv-tokens", "900", "--kv", "disk"], "--kv-tokens has no effect with --kv disk"),
        (["--sequences", "0"], "0 is not in the range"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--temperature", "-1"], "--temperature"),
        (["--seed", "1"], "No such option"),
        (["--wire", "lossless"], "has none: make one with `offload-run pack`"),
        (["--wire", "int4", "--resident-layers", "0"], "--wire int4"),
        (["--device-memory", "1MiB", "--sequences", "2"], "MiB"),
    ],
)
def test_what_cannot_be_is_a_sentence(options, sentence, tiny_model, offload_run):
    done = offload_run("serve", tiny_model, *options)
    assert done.code in (2, 3) and done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("offload-run: error: ") and sentence in line


def test_a_package_that_is_missing_is_named(tiny_model, offload_run, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "uvicorn" else name)
    done = offload_run("serve", tiny_model)
    assert done.code == 2
    assert "serve needs uvicorn: install them with `pip install offload-rt[serve]`" in done.err


def test_help_says_what_is_not_there_and_imports_little():
    source = (
        "import sys; from offload_rt.cli import main\n"
        "sys.argv = ['offload-run', 'serve', '--help']\n"
        "code = main()\n"
        "print(code, sorted({'torch', 'fastapi', 'uvicorn', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "There is no TLS: put a proxy in front" in " ".join(done.stdout.split())


def test_sigterm_finishes_answers_and_exits_with_zero(tiny_model):
    command = [
        *(sys.executable, "-m", "offload_rt", "serve", str(tiny_model), "--port", "0"),
        *("--device", "cpu", "--device-memory", "512MiB", "--draft", "none", "--sequences", "2"),
    ]
    process = Forked(command, stderr=subprocess.PIPE, text=True)
    try:
        lines, address = [], None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"answers at http://127\.0\.0\.1:(\d+)/v1", line):
                address = "127.0.0.1", int(found[1])
                break
        assert address is not None, lines
        threading.Thread(target=process.stderr.read, daemon=True).start()
        body = {
            "messages": [{"role": "user", "content": "fox"}],
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
        }
        client = http.client.HTTPConnection(*address, timeout=60)
        client.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body),
            {"content-type": "application/json"},
        )
        answer = client.getresponse()
        first = answer.read(400)
        process.send_signal(signal.SIGTERM)
        rest = first + answer.read()
        assert b'"finish_reason":"length"' in rest and rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
