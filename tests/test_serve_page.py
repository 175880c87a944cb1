"""The page's script, in node beside a few stand-ins for what a browser has."""

import json
import re
import shutil
import subprocess

import pytest

from offload_rt.serve.app import page

BROWSER = """
const elements = {}, asked = [];
function element() {
  const heard = {};
  return {
    style: {}, classList: { add() {}, contains: () => false }, value: "", append() {}, focus() {},
    replaceChildren() {}, firstElementChild: { style: {} },
    addEventListener: (name, told) => { heard[name] = told; },
    tell: (name) => heard[name]({ preventDefault() {} }),
  };
}
const document = {
  getElementById: (id) => (elements[id] = elements[id] || element()), createElement: element,
};
const setInterval = () => {};
const piece = (content) => new TextEncoder().encode(
  "data: " + JSON.stringify({ choices: [{ delta: { content } }] }) + "\\n\\n");
async function fetch(route, options) {
  if (route === "/props") return { status: 503, ok: false };
  asked.push(JSON.parse(options.body).messages);
  return { ok: true, body: new ReadableStream({ start(body) {
    body.enqueue(piece("so "));
    if (asked.length === 2) { body.enqueue(piece("far")); body.close(); }
    options.signal.addEventListener("abort", () => body.error(new DOMException("", "AbortError")));
  } }) };
}
"""

USER = """
const soon = () => new Promise((go) => setTimeout(go, 20));
async function say(text) { at("turn").value = text; at("form").tell("submit"); await soon(); }
(async () => {
  await say("one");
  at("CLICKED").tell("click");
  await soon();
  await say("two");
  await say("three");
  console.log(JSON.stringify(asked));
})();
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the script")
@pytest.mark.parametrize(("clicked", "before"), [("clear", []), ("stop", ["one", "so "])])
def test_what_is_asked_is_the_talk_that_is_seen(clicked, before):
    """A talk that is cleared in the middle of an answer is not gone on with; a stopped one is."""
    (script,) = re.findall(r"<script>(.*?)</script>", page()[0], re.DOTALL)
    whole = BROWSER + script.replace('"use strict";', "") + USER.replace("CLICKED", clicked)
    done = subprocess.run(["node", "-e", whole], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = [[turn["content"] for turn in messages] for messages in json.loads(done.stdout)]
    assert said == [["one"], [*before, "two"], [*before, "two", "so far", "three"]]
