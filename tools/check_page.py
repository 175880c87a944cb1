"""What a browser makes of the server's page; needs Chromium.

    python tools/check_page.py MODEL --device-memory 240MiB --shots FOLDER

Starts a server and drives headless Chromium by its DevTools protocol, over pipes: types and clicks
as a person does, and looks at what is shown. Seen are an answer that grows, one that is stopped, a
system prompt, the bars and numbers of `/props`, a key that is wanted, a server that is gone. No
request may leave the server's address, nothing may be refused by the page's own policy, no error be
thrown, nothing be wider than the window. Prints one JSON object; the exit code is 1 if something is
not as it should be. FOLDER gets PNG pictures of a wide and a narrow window, light and dark.
"""

import argparse
import base64
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
from bench_serving import Server, served

_KEY = "a-long-secret"
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
)
_WATCH = """
window.refused = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.refused.push(event.violatedDirective + " " + event.blockedURI));
"""
_WIDE, _NARROW = (1280, 800), (390, 844)


def main() -> None:
    """Look at everything and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--device-memory", default="240MiB")
    parser.add_argument("--draft", default="none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=60, help="of an answer")
    parser.add_argument("--shots", type=Path, default=None, help="folder for pictures")
    given = parser.parse_args()
    with browsing() as browser:
        seen = talked(given, browser) | keyed(given, browser)
    right = all(value is not False for value in seen.values())
    print(json.dumps({**seen, "right": right}, indent=1))
    sys.exit(0 if right else 1)


@dataclass(slots=True)
class Browser:
    """Chromium, spoken to over two pipes: JSON messages that end in NUL.

    Attributes:
        events: that were told of, in their order.
    """

    write_to: int
    read_from: int
    events: list[dict[str, Any]] = field(default_factory=list)
    session: str | None = None
    _number: int = 0
    _replies: "Queue[dict[str, Any]]" = field(default_factory=Queue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        held = b""
        while data := os.read(self.read_from, 1 << 20):
            *whole, held = (held + data).split(b"\0")
            for one in map(json.loads, whole):
                if "id" in one:
                    self._replies.put(one)
                else:
                    self.events.append(one)

    def call(self, method: str, **params: object) -> Any:  # noqa: ANN401 - as the protocol has it
        """Have something done; returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        reply = self._replies.get(timeout=60)
        if "error" in reply or reply["id"] != self._number:
            raise SystemExit(f"{method}: {reply}")
        return reply["result"]

    def opened(self, address: str) -> None:
        """Open a page in a window of its own."""
        self.session, self.events = None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)
        self.sized(*_WIDE)
        self.call("Page.navigate", url=address)
        self.until(lambda: self.js("document.readyState") == "complete")

    def sized(self, width: int, height: int, *, dark: bool = False) -> None:
        """A window of this size, of somebody who likes it light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def js(self, source: str) -> Any:  # noqa: ANN401 - whatever it is
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=source, returnByValue=True)
        return found["result"].get("value")

    def text(self, name: str) -> str:
        """What an element says, the last of several."""
        return str(self.js(f"[...document.querySelectorAll('{name}')].at(-1)?.textContent ?? ''"))

    def click(self, name: str) -> None:
        """Press the mouse over an element."""
        source = f"(() => {{ const b = document.querySelector('{name}').getBoundingClientRect();"
        x, y = self.js(source + "return [b.x + b.width / 2, b.y + b.height / 2]; })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def typed(self, name: str, text: str, *, enter: bool = False) -> None:
        """Write over what a field holds, and send it."""
        self.click(name)
        self.js(f"document.querySelector('{name}').select()")
        self.call("Input.insertText", text=text)
        if enter:
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
            self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **key)
            self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def until(self, ready: Callable[[], object], most_s: float = 120.0) -> None:
        """Wait until something holds."""
        until_s = time.monotonic() + most_s
        while not ready():
            if time.monotonic() > until_s:
                raise SystemExit("what was waited for did not come")
            time.sleep(0.03)

    def requests(self) -> list[dict[str, Any]]:
        """All that the page asked for."""
        told = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [one["request"] for one in told]

    def shot(self, folder: Path | None, name: str) -> None:
        """Keep a picture of the window."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            data = self.call("Page.captureScreenshot", format="png")["data"]
            (folder / f"{name}.png").write_bytes(base64.b64decode(data))


@contextmanager
def browsing() -> Iterator[Browser]:
    """Headless Chromium with a folder of its own."""
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        raise SystemExit("Chromium is not here: `apt install chromium`")
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    far = [fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in (theirs_in, theirs_out)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pid = os.posix_spawn(
            program,
            [program, *_FLAGS, f"--user-data-dir={folder}", "about:blank"],
            os.environ,
            file_actions=[  # the protocol has its pipes as 3 and 4
                *((os.POSIX_SPAWN_DUP2, one, place) for place, one in enumerate(far, 3)),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
        )
        for one in (theirs_in, theirs_out, *far):
            os.close(one)
        try:
            yield Browser(ours_out, ours_in)
        finally:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


def talked(given: argparse.Namespace, browser: Browser) -> dict[str, Any]:
    """A talk, from the first message to a server that is gone."""
    seen: dict[str, Any] = {}
    with served(given, "--sequences", "2", "--context", "1024") as server:
        browser.opened(server.address)
        browser.until(lambda: browser.text("#model") == Path(given.model).name)
        browser.typed("#most", str(given.tokens))
        seen |= _answered(browser, given)
        seen |= _stopped(browser, server)
        seen |= _systemic(browser)
        seen |= _sized(browser, given)
        polls, start = _polls(browser), time.monotonic()
        time.sleep(3.0)
        seen["polls_a_second"] = (_polls(browser) - polls) / (time.monotonic() - start)
        seen["goes_on_polling"] = seen["polls_a_second"] > 0.5
        browser.click("#clear")
        seen["cleared"] = browser.js("document.getElementById('talk').childElementCount") == 0
    browser.until(lambda: browser.text("#now") == "the server does not answer")
    foreign = [r["url"] for r in browser.requests() if not r["url"].startswith(server.address)]
    foreign = [url for url in foreign if not url.startswith("data:")]
    seen |= {"asked_elsewhere": len(foreign), "asks_nobody_else": not foreign}
    refused = browser.js("window.refused")
    seen |= {"refused_by_policy": refused, "policy_is_kept": refused == []}
    thrown = [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"]
    logged = [e["params"]["entry"] for e in browser.events if e["method"] == "Log.entryAdded"]
    # That a server which is gone refuses connections is logged, as it should be.
    logged = [one["text"] for one in logged if "CONNECTION_REFUSED" not in one["text"]]
    return seen | {"logged": logged, "throws_nothing": not thrown and not logged}


def _polls(browser: Browser) -> int:
    return sum(one["url"].endswith("/props") for one in browser.requests())


def _over(browser: Browser) -> bool:
    return bool(browser.js("document.getElementById('stop').disabled"))


def _answered(browser: Browser, given: argparse.Namespace) -> dict[str, Any]:
    """An answer that grows, and what is shown beside it."""
    browser.typed("#turn", "Tell me a long story about the sea.", enter=True)
    lengths: list[int] = []
    widths: dict[str, float] = {"link": 0.0, "work": 0.0}
    running = shot = False
    while not (lengths and _over(browser)):
        if (length := len(browser.text(".assistant span"))) and length not in lengths[-1:]:
            lengths.append(length)
        for name in widths:
            width = browser.js(f"parseFloat(document.querySelector('#{name} i').style.width)")
            widths[name] = max(widths[name], width or 0.0)
        running |= "1 running" in browser.text("#now")
        if not shot and len(lengths) > 10 and running:
            browser.shot(given.shots, "wide-writing")
            shot = True
        time.sleep(0.03)
    note = browser.text(".note")
    return {
        "times_it_grew": len(lengths),
        "grows": len(lengths) > 5,
        "bars": widths,
        "bars_move": all(width > 0 for width in widths.values()),
        "says_it_runs": running,
        "note": note,
        "says_how_fast": f"{given.tokens} tokens, " in note and "tokens/s" in note,
        "plan": browser.text("#plan"),
    }


def _stopped(browser: Browser, server: Server) -> dict[str, Any]:
    """An answer that is stopped in the middle: its text stays, the server makes no more of it."""
    browser.typed("#most", "900")
    browser.typed("#turn", "And another one, as long as you can.", enter=True)
    browser.until(lambda: len(browser.text(".assistant span")) > 20)
    browser.click("#stop")
    clicked = time.monotonic()
    browser.until(lambda: _over(browser))
    text = browser.text(".assistant span")

    def aborted() -> bool:
        found = httpx.get(f"{server.address}/metrics").text
        return 'finished_reason="abort"} 1\n' in found and "requests_running{" in found

    browser.until(aborted, 10.0)
    freed_s = time.monotonic() - clicked
    time.sleep(0.5)
    return {
        "stopped_note": browser.text(".note"),
        "stops": browser.text(".note") == "stopped" and browser.text(".assistant span") == text,
        "freed_s": freed_s,
    }


def _systemic(browser: Browser) -> dict[str, Any]:
    """A system prompt is sent, and turns before it are."""
    browser.click("summary")
    browser.typed("#system", "You are a pirate.")
    browser.typed("#most", "8")
    browser.typed("#turn", "Who are you?")
    browser.click("#send")
    browser.until(lambda: browser.js("document.querySelectorAll('.assistant').length") == 3)
    browser.until(lambda: _over(browser))
    sent = [json.loads(one["postData"]) for one in browser.requests() if "postData" in one]
    roles = [turn["role"] for turn in sent[-1]["messages"]]
    expected = ["system", *["user", "assistant"] * 2, "user"]
    note = browser.text(".note")
    return {"roles": roles, "system_is_sent": roles == expected, "cut": "cut at max" in note}


def _sized(browser: Browser, given: argparse.Namespace) -> dict[str, Any]:
    """Nothing is wider than its window, and what is typed into is in it."""
    seen = {}
    for name, size in (("wide", _WIDE), ("narrow", _NARROW)):
        for dark in (False, True):
            browser.sized(*size, dark=dark)
            time.sleep(0.3)
            browser.shot(given.shots, f"{name}-{'dark' if dark else 'light'}")
        inside = "document.documentElement.scrollWidth <= innerWidth && "
        inside += "document.documentElement.scrollHeight <= innerHeight && "
        inside += "document.getElementById('send').getBoundingClientRect().bottom <= innerHeight"
        seen[f"{name}_fits"] = bool(browser.js(inside))
        room = browser.js("document.getElementById('talk').clientHeight / innerHeight")
        seen[f"{name}_talk_share"] = round(room, 2)
        seen[f"{name}_talk_has_room"] = room > 0.3
    browser.sized(*_WIDE)
    return seen


def keyed(given: argparse.Namespace, browser: Browser) -> dict[str, Any]:
    """A server that wants a key: the page asks for it."""
    with served(given, "--sequences", "1", "--context", "1024", "--api-key", _KEY) as server:
        browser.opened(server.address)
        hidden = "document.getElementById('keyed').hidden"
        browser.until(lambda: browser.js(hidden) is False)
        browser.typed("#turn", "Hi", enter=True)
        browser.until(lambda: "API key" in browser.text(".note"))
        browser.shot(given.shots, "wide-key")
        browser.typed("#key", _KEY)
        browser.typed("#most", "6")
        browser.typed("#turn", "Hi", enter=True)
        browser.until(lambda: "tokens/s" in browser.text(".note"))
        refused = browser.js("window.refused")
    return {"key_is_taken": True, "policy_is_kept_with_a_key": refused == []}


if __name__ == "__main__":
    main()
