"""What programs that know the OpenAI protocol see of our server; needs the extra `clients`.

    python tools/check_clients.py openai|langchain|curl|fuzz MODEL
    python tools/check_clients.py lm-eval MODEL --dtype float32 --device-memory 2GiB

`openai` and `langchain` ask with these packages, `curl` with `curl -N`. `lm-eval` scores tasks made
here (`compare_lm_eval.py`) through `local-completions` and `local-chat-completions`, and compares
with the harness's own `hf` model. `fuzz` has schemathesis send what the OpenAPI document allows,
and what it does not: no answer may be a 5xx, undocumented, or take longer than a minute. Each
prints one JSON object; the exit code is 1 if something is not as it should be.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_serving import Server, served
from compare_lm_eval import WINDOW, logprobs, write_tasks

_KEY = "a-long-secret"
_LONG, _LEFT_S, _NEWS_S = 600, 10.0, 0.25
_ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]
_CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,ignored_auth,unsupported_method,allow_header_conformance"
)


def main() -> None:
    """Run one of them and print what it found."""
    work = {"openai": of_openai, "langchain": of_langchain, "curl": of_curl}
    work |= {"lm-eval": of_lm_eval, "fuzz": fuzzed}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(work))
    parser.add_argument("model")
    parser.add_argument("--device-memory", default="1GiB")
    parser.add_argument("--draft", default="none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--examples", type=int, default=100, help="of each route, for fuzz")
    parser.add_argument("--seed", type=int, default=1, help="for fuzz")
    given = parser.parse_args()
    found = work[given.what](given)
    print(json.dumps(found))
    sys.exit(0 if found.pop("right") else 1)


def of_openai(given: argparse.Namespace) -> dict[str, Any]:
    """Chat, its stream, scores, and what is refused."""
    import openai

    with served(given, "--api-key", _KEY) as server:
        address = server.address
        known = openai.OpenAI(base_url=f"{address}/v1", api_key=_KEY, max_retries=0)
        (model,) = known.models.list().data
        whole = known.chat.completions.create(
            model=model.id, messages=_ASKED, max_completion_tokens=12, logprobs=True, top_logprobs=2
        )
        pieces = known.chat.completions.create(
            model=model.id,
            messages=_ASKED,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        parts = list(pieces)
        text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
        plain = known.completions.create(
            model=model.id, prompt=[[1, 2, 3]], max_tokens=1, echo=True, logprobs=1
        )
        stopped = _left(known, server, model.id)
        refusals = {}
        wrong = openai.OpenAI(base_url=f"{address}/v1", api_key="another-key", max_retries=0)
        for name, ask in {
            "key": lambda: wrong.models.list(),
            "model": lambda: known.chat.completions.create(model="other", messages=_ASKED),
            "n": lambda: known.chat.completions.create(model=model.id, messages=_ASKED, n=99),
        }.items():
            try:
                ask()
            except openai.APIStatusError as error:
                refusals[name] = type(error).__name__
    assert whole.usage is not None and parts[-1].usage is not None
    content = whole.choices[0].logprobs and whole.choices[0].logprobs.content
    usage = [whole.usage.completion_tokens, parts[-1].usage.completion_tokens]
    same = text == whole.choices[0].message.content
    expected = ["AuthenticationError", "NotFoundError", "BadRequestError"]
    return {
        "model": model.id,
        "text": whole.choices[0].message.content,
        "stream_is_the_same": same,
        "logprobs": len(content or ()),
        "usage": usage,
        "scored": plain.choices[0].logprobs is not None,
        "refusals": refusals,
        "stopped": stopped,
        "right": same
        and usage[0] == usage[1]
        and list(refusals.values()) == expected
        and stopped["in_time"],
    }


def _left(known: Any, server: Server, model: str) -> dict[str, Any]:  # noqa: ANN401 - a client
    """Close a stream after its first words; the server makes no more of the answer.

    Its rows are freed before the next layer, so within the sweep that was being made or the next.
    """
    before = server.metrics(_KEY)
    left = known.chat.completions.create(
        model=model,
        messages=_ASKED,
        stream=True,
        max_completion_tokens=_LONG,
        extra_body={"ignore_eos": True},
    )
    pieces = iter(left)
    while not next(pieces).choices[0].delta.content:
        pass
    left.close()
    closed = server.metrics(_KEY)
    start = time.perf_counter()
    while (after := server.metrics(_KEY))["vllm:num_requests_running"]:
        if time.perf_counter() - start > _LEFT_S:
            break
        time.sleep(0.005)
    aborts = 'vllm:request_success_total,finished_reason="abort"'
    names = {
        "sweeps": "offload_rt:sweeps_total",
        "tokens": "vllm:generation_tokens_total",
        "aborted": aborts,
    }
    found = {name: after[key] - before[key] for name, key in names.items()}
    swept_s = closed["offload_rt:sweep_seconds_total"] / closed["offload_rt:sweeps_total"]
    more = after["offload_rt:sweeps_total"] - closed["offload_rt:sweeps_total"]
    return {
        **found,
        "s_after": time.perf_counter() - start,
        "s_of_a_sweep": swept_s,
        "sweeps_after": more,
        "in_time": found["aborted"] == 1
        and found["tokens"] < _LONG
        # A sweep, and what the news of the end takes to come here.
        and more * swept_s <= 2 * swept_s + _NEWS_S
        and after["vllm:num_requests_running"] == 0,
    }


def of_langchain(given: argparse.Namespace) -> dict[str, Any]:
    """ChatOpenAI: an answer, its stream, a batch, and what a chain reads of usage."""
    from langchain_openai import ChatOpenAI

    with served(given, "--api-key", _KEY) as server:
        address = server.address
        chat = ChatOpenAI(
            base_url=f"{address}/v1",
            api_key=_KEY,
            model=Path(given.model).name,
            temperature=0,
            max_tokens=12,
            max_retries=0,
            stream_usage=True,
        )
        whole = chat.invoke(_ASKED[0]["content"])
        parts = list(chat.stream(_ASKED[0]["content"]))
        text = "".join(str(part.content) for part in parts)
        both = chat.batch([_ASKED[0]["content"], [("system", "Be brief."), ("human", "Hi")]])
    usage = whole.usage_metadata
    used = [part.usage_metadata for part in parts if part.usage_metadata]
    same = text == whole.content == both[0].content
    return {
        "text": whole.content,
        "stream_and_batch_are_the_same": same,
        "usage": usage and usage["output_tokens"],
        "right": same and bool(usage) and bool(used) and bool(both[1].content),
    }


def of_curl(given: argparse.Namespace) -> dict[str, Any]:
    """`curl -N`: events, one after the other, as they come.

    The first is here while the server still writes, and from it to the last it takes about as long
    as the answer was written.
    """
    body = {"messages": _ASKED, "max_tokens": 40, "ignore_eos": True, "stream": True}
    events, times, running = [], [], 0.0
    with served(given) as server:
        asking = subprocess.Popen(
            [
                *("curl", "-sN", "-H", "content-type: application/json"),
                *("-d", json.dumps(body), f"{server.address}/v1/chat/completions"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert asking.stdout is not None
        for line in asking.stdout:
            if not line.startswith("data: "):
                continue
            times.append(time.perf_counter())
            events.append(line[6:].strip())
            if len(events) == 3:
                running = server.metrics()["vllm:num_requests_running"]
        code = asking.wait()
        written_s = server.metrics()["vllm:request_decode_time_seconds_sum"]
    pieces = [json.loads(event)["choices"][0] for event in events if event != "[DONE]"]
    said = [at for at, one in zip(times, pieces, strict=False) if one["delta"].get("content")]
    came_s = said[-1] - said[0]
    ends = events[-1] == "[DONE]" and pieces[-1]["finish_reason"] == "length"
    return {
        "text": "".join(piece["delta"].get("content", "") for piece in pieces),
        "events": len(events),
        "written_s": written_s,
        "came_s": came_s,
        "running_at_the_third": running,
        "right": ends and code == 0 and running == 1 and came_s > 0.7 * written_s > 0,
    }


def of_lm_eval(given: argparse.Namespace) -> dict[str, Any]:
    """Scores and continuations over the protocol against those of the harness's `hf` model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        tasks = TaskManager(include_path=folder)

        def found(model: Any, names: list[str], **more: Any) -> Any:  # noqa: ANN401
            return lm_eval.simple_evaluate(
                model=model, tasks=names, task_manager=tasks, bootstrap_iters=0, **more
            )["samples"]

        hf = HFLM(given.model, dtype=given.dtype, device="cpu", max_length=WINDOW)
        plain = ["local_choice", "local_rolling", "local_until"]
        theirs = found(hf, plain)
        chat = {"apply_chat_template": True, "num_fewshot": 0}
        their_chat = found(hf, ["local_until"], **chat)
        room = WINDOW + 2  # what is scored has a token more, and one is generated behind it
        with served(given, "--context", str(room), "--queue", "300") as server:
            address = server.address
            args = {
                "model": Path(given.model).name,
                "tokenizer": given.model,
                "tokenizer_backend": "huggingface",
                "max_length": room,
                "num_concurrent": 4,
            }
            url = f"{address}/v1/completions"
            ours = found("local-completions", plain, model_args=args | {"base_url": url})
            url = f"{address}/v1/chat/completions"
            args = args | {"base_url": url}
            our_chat = found("local-chat-completions", ["local_until"], model_args=args, **chat)
    told: dict[str, Any] = {}
    for name in plain[:2]:
        pairs = list(zip(logprobs(ours[name]), logprobs(theirs[name]), strict=True))
        told[name] = {"scores": len(pairs), "apart": max(abs(a - b) for a, b in pairs)}
    for name, one, other in (
        ("completions", ours["local_until"], theirs["local_until"]),
        ("chat", our_chat["local_until"], their_chat["local_until"]),
    ):
        same = sum(a["resps"] == b["resps"] for a, b in zip(one, other, strict=True))
        told[name] = {"continuations": len(one), "same": same}
    near = all(told[name]["apart"] < 0.02 for name in plain[:2])
    texts = [told["completions"], told["chat"]]
    whole = all(one["same"] == one["continuations"] for one in texts)
    return {**told, "right": near and whole}


def fuzzed(given: argparse.Namespace) -> dict[str, Any]:
    """What schemathesis finds with the OpenAPI document."""
    beside = Path(sys.executable).with_name("schemathesis")
    command = str(beside) if beside.exists() else shutil.which("schemathesis")
    if command is None:
        raise SystemExit("schemathesis is not here: install the extra `clients`")
    limits = ("--max-tokens", "4", "--context", "256", "--queue", "100", "--api-key", _KEY)
    with served(given, *limits) as server, tempfile.TemporaryDirectory() as folder:
        address = server.address
        done = subprocess.run(
            [
                *(command, "run", f"{address}/openapi.json", "--checks", _CHECKS),
                *("-H", f"Authorization: Bearer {_KEY}", "--request-timeout", "60"),
                *("--max-examples", str(given.examples), "--seed", str(given.seed)),
                *("--phases", "examples,coverage,fuzzing", "--continue-on-failure"),
            ],
            stdout=sys.stderr,
            check=False,
            cwd=folder,  # it writes notes where it runs
        )
    return {"exit_code": done.returncode, "right": done.returncode == 0}


if __name__ == "__main__":
    main()
