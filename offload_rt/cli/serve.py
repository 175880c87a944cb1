"""`offload-run serve`: the OpenAI protocol over HTTP, one sweep of the weights for everybody."""

import signal
import threading
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload_rt.cli import options
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.interrupts import Interrupts
from offload_rt.cli.options import output_of, settings_of
from offload_rt.config import MOST_SEQUENCES
from offload_rt.errors import ConfigError
from offload_rt.reading import read_plain
from offload_rt.session.across import across, be_guest, is_guest
from offload_rt.session.adapters import adapted, open_answering
from offload_rt.session.settings import Settings

if TYPE_CHECKING:
    from offload_rt.engine import Engine
    from offload_rt.session.opening import Model
    from offload_rt.session.shared import Shared

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_NEEDED = ("fastapi", "uvicorn", "sse_starlette")
_KEY_BYTES = 4096
_LEAST_KEY = 8


@click.command()
@click.option("--host", default="127.0.0.1", help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, help="Port; 0 takes a free one."
)
@click.option(
    "--api-key",
    default=None,
    show_default="none",
    help="Key that every request but / and /health must bring. Others can read it in the list of "
    "processes: OFFLOAD_RT_SERVE_API_KEY or --api-key-file say the same unseen.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    default=None,
    show_default="none",
    help="File whose only line is that key.",
)
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    show_default="MODEL's name",
    help="What clients call the model; may be given several times.",
)
@click.option(
    "--sequences",
    type=click.IntRange(1, MOST_SEQUENCES),
    default=None,
    show_default="auto",
    help="Answers in the making at once; auto is 8, or fewer where memory is short.",
)
@click.option(
    "--kv-tokens",
    type=click.IntRange(min=1),
    default=None,
    show_default="auto",
    help="Tokens of all answers in the making, prompts included, to set KV memory aside for; auto "
    "is one --context and 1024 for each further sequence.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=0),
    default=64,
    help="Further answers that may wait; more are refused with 429.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(min=0.0),
    default=30.0,
    help="Seconds for which answers in the making are finished after SIGTERM or Ctrl-C; a second "
    "one ends them at once.",
)
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    show_default="loopback's names",
    help="Another name under which requests may ask for this server; may be given several times.",
)
@click.option(
    "--cors-origin",
    "origins",
    multiple=True,
    show_default="none",
    help="Origin of pages elsewhere that may ask, as https://chat.example; may be given several "
    "times.",
)
@click.option(
    "--ping-interval",
    type=click.FloatRange(min=0.05),
    default=15.0,
    help="Seconds between the comments that keep a stream alive while a pass takes long.",
)
@click.option("--log-prompts", is_flag=True, help="Log prompts too; without it no log has them.")
@options.nodes_option
@options.adapter_option
@options.max_tokens_option
@options.drawing_options
@options.draft_options
@options.accept_option
@options.placement_options
@options.wire_option
@options.runtime_options
@options.plan_options
@options.output_options
@click.argument("model")
@click.pass_obj
def serve(interrupts: Interrupts, model: str, **values: Any) -> int:  # noqa: ANN401
    """Answer over HTTP, in the OpenAI protocol.

    One thread makes the passes, and each pass serves all who ask: /v1/chat/completions,
    /v1/completions, /v1/models, /tokenize, /detokenize, /health, /metrics, and a page to talk at /.
    --max-tokens and sampling are those of requests that do not say.

    There is no TLS: put a proxy in front for that. Answers are not constrained (response_format),
    tool calls are left as the model writes them, and images are refused.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serve needs {', '.join(missing)}: install them with `pip install offload-rt[serve]`"
        )
    key = _key_of(values)
    if values["host"] not in _LOOPBACK and key is None:
        raise ConfigError(
            f"--host {values['host']} lets other machines ask: add --api-key, or leave --host out"
        )
    fixed = {"seed": None, "stop": (), "ignore_eos": False, "system": None}
    settings, output = settings_of({**values, **fixed}), output_of(values)
    quiet_libraries(output)
    console = Console(output)
    if is_guest(nodes := values["nodes"]):
        with interrupts.raising(False):
            return be_guest(model, settings, console)
    opened, settings = open_answering(model, settings, console)
    from offload_rt.session.shared import shared_room

    rooms = shared_room(opened, settings, values["sequences"], values["kv_tokens"])
    opened = adapted(opened, settings, console)
    with across(nodes, opened.checkpoint, settings, console) as settings:
        _serve(opened, settings, console, interrupts, {**values, "rooms": rooms, "key": key})
    return 0


def _serve(
    model: "Model",
    settings: Settings,
    console: Console,
    interrupts: Interrupts,
    values: dict[str, Any],
) -> None:
    """Load the model in a thread of its own, and answer until a signal ends it."""
    from offload_rt.nodes.line import NodeError
    from offload_rt.serve.app import Service, make_app
    from offload_rt.serve.desk import Desk
    from offload_rt.serve.guards import LOOPBACK, Rules
    from offload_rt.serve.running import run_server
    from offload_rt.session.shared import shared_engine
    from offload_rt.text import Tokenizer
    from offload_rt.text.process import TextProcess

    folder, rows = model.checkpoint.folder, model.checkpoint.embedding.shape[0]
    prompts = Tokenizer(folder, rows, TextProcess())
    desk, loaded = Desk(model), threading.Event()
    found: list[tuple[Engine, Shared]] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            # Most servers have one client at a time; with more of them less is drafted.
            with shared_engine(model, settings, console, values["rooms"], running=1) as opened:
                found.append(opened)
                loaded.set()
                desk.work(opened[0])
        except BaseException as error:  # noqa: BLE001 - raised again where it is told
            failed.append(error)
            if found and isinstance(error, NodeError):  # nobody can be answered any more
                signal.raise_signal(signal.SIGTERM)
        finally:
            loaded.set()

    thread = threading.Thread(target=work, name="engine", daemon=True)
    thread.start()
    while not loaded.wait(0.1):
        interrupts.check()
    if failed:
        raise failed[0]
    engine, room = found[0]
    names = tuple(values["names"]) or (model.name,)
    service = Service(
        desk,
        _offer(engine, room, settings, names, values),
        prompts.wait(),
        model.end_tokens,
        log=console.note,
    )
    hosts = (*LOOPBACK, *values["hosts"]) if values["host"] in _LOOPBACK else values["hosts"]
    key = values["key"]
    rules = Rules(key=key, hosts=tuple(map(str.lower, hosts)), origins=tuple(values["origins"]))
    try:
        run_server(
            make_app(service, rules),
            service,
            host="127.0.0.1" if values["host"] == "localhost" else values["host"],
            port=values["port"],
            drain_s=values["drain_timeout"],
            on_started=lambda address: _tell(console, address, names[0], room, key),
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {values['host']} port {values['port']} ({error.strerror}): take "
            "another --port"
        ) from error
    finally:
        desk.withdraw_all()
        desk.close()
        thread.join()
    if failed:
        raise failed[0]


def _offer(
    engine: "Engine",
    room: "Shared",
    settings: Settings,
    names: tuple[str, ...],
    values: dict[str, Any],
) -> Any:  # noqa: ANN401 - Offer, which is imported late
    from offload_rt.serve.orders import Offer
    from offload_rt.session.summary import drafter_name

    placement = engine.placement
    return Offer(
        names=names,
        sampling=settings.sampling,
        max_tokens=settings.generation.max_tokens,
        context_tokens=room.context_tokens,
        kv_tokens=engine.kv_tokens,
        sequences=room.sequences,
        queue=values["queue"],
        ping_s=values["ping_interval"],
        version=metadata.version("offload-rt"),
        plan={
            "device": engine.devices.name,
            "resident_layers": len(placement.resident),
            "streamed_layers": len(placement.streamed),
            "bytes_per_pass": engine.bytes_per_pass,
            "drafter": drafter_name(engine.draft),
            "device_bytes": placement.device_bytes,
            "device_limit_bytes": placement.device_limit_bytes,
        },
        memory={
            "resident": placement.resident_bytes,
            "base": placement.base_bytes,
            "kv": placement.kv_bytes,
            "slots": placement.slots * placement.slot_bytes,
            "drafter": placement.drafter_bytes,
            "workspace": placement.workspace_bytes,
        },
        logs_prompts=values["log_prompts"],
    )


def _tell(console: Console, address: str, name: str, room: "Shared", key: str | None) -> None:
    keyed = "" if key is None else ", with its API key"
    console.note(
        f"{name} answers at {address}/v1{keyed}: {room.sequences} at once, "
        f"{room.kv_tokens} tokens of KV, up to {room.context_tokens} each; {address} is a page to "
        "talk to it"
    )


def _key_of(values: dict[str, Any]) -> str | None:
    """The key that requests must bring."""
    key, file = values["api_key"], values["api_key_file"]
    if key is not None and file is not None:
        raise ConfigError("--api-key and --api-key-file both say a key: give one of them")
    if file is not None:
        try:
            key = read_plain(file, _KEY_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from error
    if key is not None and (len(key) < _LEAST_KEY or not key.isascii() or not key.isprintable()):
        raise ConfigError(
            f"the API key has {len(key)} characters, accepted are {_LEAST_KEY} or more of ASCII"
        )
    found: str | None = key
    return found
