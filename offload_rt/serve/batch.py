"""Many prompts from a file, answered together; killed anywhere and started again, it goes on.

Answers come in any order. Each is added to a journal beside the output as it comes, and in the end
the output is written in the order of the input, at once. What is in a line is decided by the input,
the model and the settings alone: no time and no drawn name is in it. So a run that was killed ends
with the bytes of one that was not, as far as the answers are the same (docs/SERVING.md).
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from offload_rt.adapters.reading import read_adapter
from offload_rt.config import SEEDS, DType, Exact, ExpertMisses, Wire
from offload_rt.engine.sequence import Request, TokenLogprob
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.model.checkpoint import resolve_model
from offload_rt.model.identity import digest_of
from offload_rt.reading import decode_text, read_plain
from offload_rt.serve.bodies import Envelope, Json, Words
from offload_rt.serve.desk import known_tokens, tally_of
from offload_rt.serve.orders import PLAIN_TOKENS, Maker
from offload_rt.serve.wire import ChatBody, CompletionBody, WireError, read_body
from offload_rt.session.crowd import Crowd, Member
from offload_rt.session.observer import Observer
from offload_rt.session.opening import Model
from offload_rt.session.settings import NO_ADAPTER, Settings
from offload_rt.speculative.draft_model.pair import open_draft_checkpoint
from offload_rt.units import join_words
from offload_rt.writing import append, cut_off, write_text, writing

_LIMIT_BYTES = 2**30
_ROUTES = ("/v1/chat/completions", "/v1/completions")
WEIGHTS = "weights of that model"
KIND = "kind of --device"
_EXACT = "--exact, as it is on or off by what streams and who drafts"
_PASSES = 0  # in place of a line's number in a journal: what all answers are made with


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input.

    Attributes:
        number: from 1, blank lines counted.
        name: its `custom_id`, else `line N`.
        request: what is wanted of the engine; None where it is refused.
        stop: texts that end its answer.
        chat: it is answered as a chat completion.
        refusal: why there will be no answer.
    """

    number: int
    name: str
    request: Request | None = None
    stop: tuple[str, ...] = ()
    chat: bool = True
    refusal: str = ""


def read_batch(path: Path) -> tuple[list[tuple[int, str]], str]:
    """The lines of a file that are not blank, with their numbers; and its SHA-256.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or has no lines.
    """
    data = read_plain(path, _LIMIT_BYTES)
    text = decode_text(data, str(path))
    # Not splitlines(): JSON may hold what that takes for the end of a line.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{path} has no lines: give a file with a prompt or a request in each")
    return lines, hashlib.sha256(data).hexdigest()


def understood(maker: Maker, number: int, text: str) -> Line:
    """What a line wants.

    It is a request of OpenAI's batches, an object with `prompt` or `messages`, or a prompt as it
    is. The last two go through the chat template.
    """
    name = f"line {number}"
    try:
        plain = not text.lstrip().startswith("{")
        told = {"messages": _turn(text.rstrip("\r"))} if plain else json.loads(text)
        if not isinstance(told, dict):
            raise WireError("it is no JSON object")
        name = str(told.get("custom_id", name))[:200]
        url, body = told.get("url"), told.get("body")
        if url is None and body is None:
            told.pop("custom_id", None)
            url = "/v1/completions" if "prompt" in told else "/v1/chat/completions"
            if isinstance(told.get("prompt"), str):  # as `generate` takes a prompt
                url, told["messages"] = "/v1/chat/completions", _turn(told.pop("prompt"))
            body = told
        if url not in _ROUTES:
            raise WireError(f"its url is {url!r:.60}, accepted are {', '.join(_ROUTES)}")
        request, stop = _request(maker, number, json.dumps(body).encode(), url)
        return Line(number, name, request, stop, url == "/v1/chat/completions")
    except (OffloadError, ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, OffloadError) else "it is no JSON"
        return Line(number, name, refusal=said)


def _turn(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


def _request(maker: Maker, number: int, raw: bytes, url: str) -> tuple[Request, tuple[str, ...]]:
    chat = url == "/v1/chat/completions"
    body: ChatBody | CompletionBody
    body = read_body(ChatBody, raw) if chat else read_body(CompletionBody, raw)
    body.check()
    maker.check_model(body.model)
    if (body.n or 1) != 1:
        raise WireError("n is more than 1: give the line several times, with seeds of their own")
    if isinstance(body, ChatBody):
        ids = maker.chat_ids(body.messages, body.told_tools())
        asked, usual, top = body.asked_tokens(), maker.offer.max_tokens, body.top()
    else:
        prompts = body.prompts()
        if len(prompts) != 1 or body.echo:
            raise WireError("a line has one prompt, and echo is for the server")
        (prompt,) = prompts
        ids = prompt if isinstance(prompt, list) else maker.plain_ids(prompt)
        asked, usual, top = body.max_tokens, PLAIN_TOKENS, body.logprobs
    request = maker.request(body, ids, asked, usual, top)
    if not request.sampling.greedy and body.seed is None:  # one of its own for each line
        seed = ((maker.offer.sampling.seed or 0) + number) % SEEDS
        request = replace(request, seed=seed, sampling=replace(request.sampling, seed=seed))
    return request, body.stops()


class Journal:
    """Answers as they come, by their lines.

    Args:
        path: of the file; what a killed run left in it is read.
        mark: what decides about answers, by what it is called: a journal of others is refused.

    Raises:
        ConfigError: it is of another input or other settings, or damaged.
    """

    def __init__(self, path: Path, mark: Mapping[str, str]) -> None:
        self.path = path
        self.results: dict[int, Json] = {}
        self._settled: Json = {}
        head = json.dumps({"mark": mark}) + "\n"
        begun = read_plain(path, 4 * _LIMIT_BYTES) if path.exists() else b""
        if head.encode().startswith(begun):  # the run was killed before its first line was whole
            with writing(path):
                append(path, head[len(begun.decode()) :])
        else:
            self._read(begun, mark)

    def add(self, results: Sequence[tuple[int, Json]]) -> None:
        """Keep results; once this returns they are there for good."""
        self._append(results)
        self.results |= dict(results)

    @property
    def exact(self) -> str:
        """`on` or `off`, as passes were that began it; empty where that is open."""
        return str(self._settled.get(_EXACT, ""))

    def settle(self, passes: Mapping[str, str]) -> None:
        """Keep what decides about answers and is known only where they are made, and then.

        Raises:
            ConfigError: the run that began this journal found something else.
        """
        both = passes.keys() & self._settled.keys()
        self._compare({n: self._settled[n] for n in both}, {n: passes[n] for n in both})
        if passes.keys() - both:
            self._settled = {**self._settled, **passes}
            self._append([(_PASSES, self._settled)])

    def _append(self, results: Sequence[tuple[int, Json]]) -> None:
        lines = [json.dumps({"line": n, "result": r}, ensure_ascii=False) for n, r in results]
        with writing(self.path):
            append(self.path, "".join(line + "\n" for line in lines))

    def _read(self, begun: bytes, mark: Mapping[str, str]) -> None:
        whole, _, rest = begun.rpartition(b"\n")
        try:
            head, *lines = [json.loads(line) for line in whole.split(b"\n")]
            if not isinstance(known := head["mark"], dict):
                raise ConfigError(
                    f"{self.path} was begun by another version of offload-run: end it with that "
                    "one, remove the file to begin anew, or take another --output"
                )
            self.results = {int(line["line"]): dict(line["result"]) for line in lines}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(f"{self.path} is damaged: remove it to begin anew") from None
        begun_on = {KIND: known.pop(KIND)} if KIND in known else {}  # before December 2026
        self._compare(known, mark)
        self._settled = begun_on | self.results.pop(_PASSES, {})
        if rest:  # a line that was being written when the run was killed
            with writing(self.path):
                cut_off(self.path, len(rest))

    def _compare(self, known: Mapping[str, object], now: Mapping[str, str]) -> None:
        if others := [name for name in {**now, **known} if known.get(name) != now.get(name)]:
            raise ConfigError(
                f"{self.path} was begun with another {join_words(others)}: take the same again, "
                "remove the file to begin anew, or take another --output"
            )


class Results(Protocol):
    """Where results are kept, by their lines."""

    results: dict[int, Json]
    path: Path

    def add(self, results: Sequence[tuple[int, Json]], /) -> None:
        """Keep results."""


@dataclass(slots=True)
class Batch:
    """Lines that are answered together.

    Args:
        crowd: answers them.
        maker: its names go into answers.
        lines: all of the input.
        journal: has what is done.

    Attributes:
        emitted: tokens of this run's answers so far.
        failed: lines without an answer.
    """

    crowd: Crowd
    maker: Maker
    lines: Sequence[Line]
    journal: Results
    emitted: int = 0
    _texts: dict[int, list[str]] = field(default_factory=dict)
    _members: dict[Member, Line] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Lines that have no answer."""
        return sum(result["response"] is None for result in self.journal.results.values())

    @property
    def left(self) -> list[Line]:
        """Lines that are not done, those with the longest answers first: they end last."""
        left = [line for line in self.lines if line.number not in self.journal.results]
        return sorted(left, key=_need, reverse=True)

    def run(self, told: Callable[[], None]) -> None:
        """Answer all that is left.

        Args:
            told: called after each sweep.
        """
        self.refuse()
        todo = deque(self.left)
        most = 2 * self.crowd.engine.sequences  # that wait: a queue of all would be looked at
        while todo or self.crowd.busy:
            while todo and len(self._members) < most:
                self._begin(todo.popleft())
            if self.crowd.busy and (over := list(self._sweep())):
                self.journal.add(over)
            told()

    def refuse(self) -> None:
        """Keep why lines will have no answer."""
        refused = [line for line in self.left if line.request is None]
        if refused:
            self.journal.add([(line.number, failure(line, line.refusal)) for line in refused])

    def _begin(self, line: Line) -> None:
        assert line.request is not None
        try:
            member = self.crowd.join(line.request, line.stop)
        except OffloadError as error:
            self.journal.add([(line.number, failure(line, str(error)))])
            return
        self._members[member], self._texts[line.number] = line, []

    def _sweep(self) -> Iterator[tuple[int, Json]]:
        for gained in self.crowd.advance():
            line = self._members[gained.member]
            self._texts[line.number].append(gained.text)
            self.emitted += gained.tokens
            if gained.member.is_over:
                del self._members[gained.member]
                yield line.number, self._result(line, gained.member)

    def _result(self, line: Line, member: Member) -> Json:
        text = "".join(self._texts.pop(line.number))
        if (error := member.sequence.error) is not None:
            return failure(line, str(error))
        envelope = Envelope(
            id=f"batch-{line.number}",
            created=0,  # the same whenever it is made
            model=self.maker.offer.names[0],
            fingerprint=f"offload_rt-{self.maker.offer.version}",
            chat=line.chat,
        )
        choice = envelope.choice(0, text, member.finish_reason, self._logprobs(line, member))
        body = envelope.whole([choice], tally_of(member))
        del body["timings"]
        body["usage"].pop("prompt_tokens_details")  # what was reused depends on who was there
        request_id = f"batch-{line.number}"
        response = {"status_code": 200, "request_id": request_id, "body": body}
        return {"id": request_id, "custom_id": line.name, "response": response, "error": None}

    def _logprobs(self, line: Line, member: Member) -> Json | None:
        assert line.request is not None
        if line.request.logprobs is None:
            return None
        found: list[TokenLogprob] = member.logprobs
        ids = sorted(known_tokens(found))
        words = Words(dict(zip(ids, self.maker.prompts.texts(ids), strict=True)))
        return words.chat(found) if line.chat else words.plain(member.token_ids, found)

    def write(self, output: Path) -> None:
        """Write all results in the order of the input, and remove the journal."""
        results = [self.journal.results[line.number] for line in self.lines]
        text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        write_text(output, text, private=True)
        self.journal.path.unlink()


def mark_of(
    digest: str, model: Model, settings: Settings, version: str, lines: Sequence[Line]
) -> dict[str, str]:
    """What decides about answers, by what it is called.

    What layers are where, how many answers are made at once, and what streams are not in it. Who
    drafts is in it where a sampled answer rests on its drafts.

    Args:
        digest: of the input.
        model: that answers, without its adapter.
        settings: of the command line.
        version: of this program, which answers name.
        lines: of the input, with their tokens, sampling and limits.

    Raises:
        CheckpointError: files of the model, its adapter or its drafter cannot be read.
    """
    wanted = hashlib.sha256()
    for line in lines:
        asked = line.request and replace(line.request, seed=0)  # a greedy one's is drawn anew
        wanted.update(repr(replace(line, request=asked)).encode(errors="surrogatepass"))
    adapter, wire = "", settings.runtime.wire
    if settings.adapter not in (None, NO_ADAPTER):
        adapter = read_adapter(resolve_model(settings.adapter)).digest
    mark = {
        "input": digest,
        "sampling, tokenizer, chat template, --max-tokens or --context": wanted.hexdigest(),
        "model": model.name,
        WEIGHTS: digest_of(model.checkpoint),
        "adapter": adapter,
        "--dtype": str(settings.runtime.dtype),
        "--wire": str(wire) if wire in (Wire.INT8, Wire.INT4) else "",
        "version of offload-rt": version,
    }
    sampled = any(line.request and not line.request.sampling.greedy for line in lines)
    if sampled and settings.draft.answers_rest_on_it:
        drafter = open_draft_checkpoint(model.checkpoint, settings.draft)
        weights = digest_of(drafter) if drafter is not None else ""
        mark["--draft, its options, or --accept"] = f"{settings.draft} {weights}"
    return mark


def as_begun(settings: Settings, journal: Journal, observer: Observer) -> Settings:
    """The same with passes as they were that began a journal, where the user leaves them open.

    Memory may be another now, and with it what streams and who drafts.
    """
    runtime = settings.runtime
    if runtime.exact is not Exact.AUTO or journal.exact not in (Exact.ON, Exact.OFF):
        return settings
    observer.note(
        f"{journal.path} was begun with --exact {journal.exact}, it goes on so: remove it to begin "
        "anew"
    )
    # A host computes experts only where the user says off.
    misses = runtime.expert_misses if journal.exact == Exact.ON else ExpertMisses.LINK
    runtime = replace(runtime, exact=Exact(journal.exact), expert_misses=misses)
    return replace(settings, runtime=runtime)


def passes_of(settings: Settings, lines: Sequence[Line], *, exact: bool) -> dict[str, str]:
    """What decides about the last bits of answers, by what it is called.

    Args:
        settings: of the command line.
        lines: of the input.
        exact: passes are row-invariant. Where they are not, bits go by how many rows a pass has,
            and so by who drafts; in fp32 texts do not, and log-probabilities do.
    """
    in_fp32 = settings.runtime.dtype is DType.FLOAT32
    if in_fp32 and all(not line.request or line.request.logprobs is None for line in lines):
        return {}
    found = {_EXACT: "on" if exact else "off"}
    if not exact and not in_fp32:
        found["--draft or its options"] = str(settings.draft)
    return found


def tokens_of(result: Json) -> int:
    """Tokens of an answer; 0 where there is none."""
    answer = result["response"]
    return 0 if answer is None else int(answer["body"]["usage"]["completion_tokens"])


def failure(line: Line, why: str) -> Json:
    """The result of a line that has no answer."""
    error = {"code": "invalid_request" if line.request is None else "failed", "message": why}
    return {
        "id": f"batch-{line.number}",
        "custom_id": line.name,
        "response": None,
        "error": error,
    }


def _need(line: Line) -> int:
    """Rows of KV that a line wants."""
    return 0 if line.request is None else len(line.request.ids) + line.request.max_tokens
