"""An engine that computes nothing, for tests of the comparison: python fake_worker.py BEHAVIOUR."""

import json
import os
import subprocess
import sys
import time

SPEEDS = {"good": 0.5, "slow": 1.0, "other": 0.5}  # s/token it claims


def say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def reply(**values):
    say(json.dumps({"ok": True, **values}))


def answer_of(prompt, count, other):
    tokens = [3 + (sum(prompt) + i) % 200 for i in range(count)]
    if other and count > 2:
        tokens[2:] = [token + 1 for token in tokens[2:]]
    return tokens


def misbehave(behaviour, request):
    """What the bad ones do when they should answer (or load)."""
    kind, _, when = behaviour.partition("@")
    if request["do"] != (when or "answer"):
        return
    if kind == "hang":
        child = subprocess.Popen(["sleep", "600"])
        with open(os.environ["FAKE_PIDS"], "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    elif kind == "crash":
        sys.exit("Traceback\nValueError: no such layer")
    elif kind == "hungry":
        kept = []
        while True:
            kept.append(bytearray(os.urandom(2**20)) * 8)
    elif kind == "garbage":
        say("Loading checkpoint shards: 100%|####|")
    elif kind == "error":
        say(json.dumps({"ok": False, "error": "OutOfMemoryError: needs\n2 GiB"}))
    elif kind == "closed":
        os.close(1)
        time.sleep(600)
    elif kind == "nan":
        say('{"ok": true, "load_s": NaN, "facts": {}}')


def main():
    behaviour = sys.argv[1]
    with open(os.environ.get("FAKE_LOG", os.devnull), "a") as log:
        for line in sys.stdin:
            request = json.loads(line)
            log.write(f"{behaviour} {request['do']}\n")
            log.flush()
            misbehave(behaviour, request)
            peaks = {"host_peak_bytes": 5 * 2**20, "device_peak_bytes": 2**20}
            if request["do"] == "load":
                config = {name: request.get(name) for name in ("scratch", "draft")}
                facts = {"config": config | {"first_draft_tokens": 8}, "versions": {}}
                if load := os.environ.get("FAKE_LOAD"):
                    with open(load, "w") as file:
                        json.dump(request, file)
                reply(load_s=0.25, facts=facts, **peaks)
            elif request["do"] == "gap":
                reply(logits=[16.0, 15.875], best=request["tokens"][0])
            else:
                count = request["max_tokens"]
                answers = [answer_of(p, count, behaviour == "other") for p in request["prompts"]]
                time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
                reply(
                    token_ids=answers,
                    ttft_s=0.125,
                    decode_s=SPEEDS.get(behaviour, 0.5) * (count - 1),
                    first_tokens=len(answers),
                    passes=count,
                    prompt_read_bytes=1000,
                    decode_read_bytes=10**9 * (count - 1),
                    decode_link_bytes=None,
                    **peaks,
                )


if __name__ == "__main__":
    main()
