"""`serve` and `batch` over three processes with paced links: answers of one, and named deaths."""

import http.client
import json
import re
import signal
import threading

import pytest
from test_nodes import finish, start

import offload_rt

RATE = 0.004  # GB/s of each link
OPTIONS = ["--device", "cpu", "--device-memory", "1GiB", "--dtype", "fp32", "--draft", "none"]
STREAMED = ["--home", "host", "--resident-layers", "0", "--slots", "1"]


@pytest.fixture
def three(tmp_path):
    names = ("desk", "shelf", "attic")
    (path := tmp_path / "nodes.toml").write_text(
        "".join(f'[[node]]\nname = "{name}"\nlink_bandwidth = {RATE}\n' for name in names)
    )
    return path


def asked(port, **more):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"messages": [{"role": "user", "content": "the quick fox"}], "max_tokens": 6, **more}
    headers = {"content-type": "application/json"}
    client.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return client.getresponse()


@pytest.mark.slow
def test_a_server_over_three_processes_answers_as_one_and_names_who_dies(deep_model, three):
    with offload_rt.load(deep_model, device="cpu", dtype="float32", draft="none") as one:
        expected = one.generate("the quick fox", max_tokens=6).text
    more = ["--port", "0", *OPTIONS, *STREAMED]
    first, second, third = started = start(deep_model, three, 3, "serve", *more)
    try:
        said = b""
        while not (found := re.search(rb"answers at http://127\.0\.0\.1:(\d+)/v1", said)):
            said += (line := first.stderr.readline())
            assert line, said
        port = int(found[1])
        answers = []

        def ask():
            answer = json.loads(asked(port).read())
            answers.append(answer["choices"][0]["message"]["content"])

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert answers == [expected] * 3
        numbers = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        numbers.request("GET", "/metrics")
        told = numbers.getresponse().read().decode()
        moved, took_s = (
            float(re.search(rf"^offload_rt:{name}_total\S* (\S+)$", told, re.MULTILINE)[1])
            for name in ("layer_bytes", "sweep_seconds")
        )
        assert moved > 0 and took_s > 0.9 * moved / 3 / (RATE * 1e9)  # of links that are that slow
        stream = asked(port, stream=True, max_tokens=400, ignore_eos=True)
        assert stream.read(200)
        third.kill()
        rest = stream.read().decode()
        assert "attic (node 2" in rest and "error" in rest, rest
        code, _, err = finish(first)
        assert code == 2 and re.search(r"error: attic \(node 2, .*\) ended", err), err
        code, _, err = finish(second)
        assert code == 2 and "attic (node 2" in err, err
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_server_over_three_processes_ends_them_all_at_sigterm(deep_model, three):
    first, *others = started = start(
        deep_model, three, 3, "serve", "--port", "0", *OPTIONS, *STREAMED
    )
    try:
        while b"answers at" not in (line := first.stderr.readline()):
            assert line
        first.send_signal(signal.SIGTERM)
        assert [finish(process)[0] for process in (first, *others)] == [0, 0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_batch_over_three_processes_has_the_bytes_of_one(
    deep_model, three, tmp_path, offload_run
):
    lines = [{"prompt": f"the fox {n}", "temperature": 0.7 * (n % 2)} for n in range(5)]
    (source := tmp_path / "in").write_text("".join(json.dumps(one) + "\n" for one in lines))
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    more = ["-n", "5", "--seed", "3", *OPTIONS]
    done = offload_run("batch", deep_model, "--input", source, "--output", alone, *more)
    assert done.code == 0, done.err
    words = ["batch", "--input", source, "--output", spread, *more, *STREAMED]
    for process in start(deep_model, three, 3, *words):
        code, _, err = finish(process)
        assert code == 0, err
    assert spread.read_bytes() == alone.read_bytes()
