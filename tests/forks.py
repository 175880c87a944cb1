"""Processes of Python that need not import: forks of one that has imported what `generate` does.

torch, transformers and this package are 5 s of processor time, and tests of signals, pipes and
files that other processes hold are not about them. What is about imports or an environment that
libraries read when they are imported has to start a Python of its own. What reads text for a fork
is a fork of that.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

PROGRAM = "offload-run"  # instead of the path of a program: the command line of a console
IMPORTED = (  # not numba, whose variables are read when it is
    *("offload_rt.cli.app", "offload_rt.cli.answering", "offload_rt.engine"),
    *("transformers.models.llama.modeling_llama", "llvmlite.binding", "llvmlite.ir"),
)
TEXT = ("offload_rt.text.worker", "transformers.models.auto.tokenization_auto", "jinja2")
_PR_SET_CHILD_SUBREAPER = 36  # prctl.h
_MESSAGE_BYTES = 2**20
_lines: dict[str, socket.socket] = {}


class Forked(subprocess.Popen):
    """As `subprocess.Popen` of `[sys.executable, "-c", ...]`, `"-m"`, or `[PROGRAM, ...]`."""

    imported = "all"

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startup, flags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore, gid, gids, uid, umask,
        start_new_session, *more,
    ):  # fmt: skip
        words = list(map(os.fspath, args))
        assert words[0] in (PROGRAM, sys.executable) and not (preexec_fn or shell)
        job = {
            "words": words if words[0] == PROGRAM else [w for w in words[1:] if w != "-P"],
            "kept": sorted(pass_fds),
            "folder": os.fspath(cwd or os.getcwd()),
            "environment": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        streams = [
            number if given == -1 else given
            for number, given in enumerate((p2cread, c2pwrite, errwrite))
        ]
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whose parent ends is a child of this process
        try:
            line = _line(self.imported)
            socket.send_fds(line, [json.dumps(job).encode()], [*streams, *job["kept"]])
            self.pid = int(line.recv(_MESSAGE_BYTES))
            assert line.recv(_MESSAGE_BYTES) == b"ended"
        finally:
            prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self._child_created = True


class ForkedText(Forked):
    """The same of a process that has imported what one for tokenizers does, and no torch."""

    imported = "text"


def fork_tokenizers(monkeypatch):
    """Have processes for tokenizers be forks; each of those that a bomb ends takes 1.4 s else."""
    from offload_rt.text import process

    pipes = {name: getattr(subprocess, name) for name in ("PIPE", "DEVNULL")}
    monkeypatch.setattr(process, "subprocess", SimpleNamespace(Popen=ForkedText, **pipes))


class _Text(subprocess.Popen):
    """The process for tokenizers of one that is a fork, whose fork it is."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startup, flags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more,
    ):  # fmt: skip
        self.pid = os.fork()
        if not self.pid:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may be noted, as by a program
                os.setsid()
                for number, stream in enumerate((p2cread, c2pwrite, errwrite, *pass_fds)):
                    os.dup2(stream, number)
                os.closerange(3 + len(pass_fds), os.sysconf("SC_OPEN_MAX"))
                os.environ.update(env)
                from offload_rt.text import worker

                worker.sys = SimpleNamespace(modules={})  # torch is there, and would be taken away
                worker.main(3)
                os._exit(0)
            finally:
                os._exit(1)  # whatever was raised: it is not to go on as the program it is of
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def run(arguments, **options):
    """As `subprocess.run` with output that is kept as text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Forked(arguments, **(pipes | options)) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _line(imported):
    """To the process that has imported `all`, or `text`; it ends with this one."""
    if imported not in _lines:
        from offload_rt.text.process import _ENVIRONMENT

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), imported],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | (_ENVIRONMENT if imported == "text" else {}),
        )
        theirs.close()
        _lines[imported] = ours
    return _lines[imported]


def _jobs(line):
    """Fork as asked until nobody can ask; returns in a process that was asked for."""
    while True:
        message, streams, _, _ = socket.recv_fds(line, _MESSAGE_BYTES, 8)
        if not message:
            sys.exit()
        between = os.fork()
        if not between:
            if asked := os.fork():
                line.send(str(asked).encode())
                os._exit(0)
            line.close()
            return json.loads(message), streams
        os.waitpid(between, 0)
        line.send(b"ended")
        for stream in streams:
            os.close(stream)


def _settle(job, streams):
    """Make this process what it would be if it had just been started."""
    for number, stream in zip([0, 1, 2, *job["kept"]], streams, strict=True):
        if number != stream:
            os.dup2(stream, number)
            os.close(stream)
    if job["session"]:
        os.setsid()
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    for number, (name, mode, errors) in enumerate(
        [("stdin", "r", "strict"), ("stdout", "w", "strict"), ("stderr", "w", "backslashreplace")]
    ):
        stream = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        if number == 2:
            stream.reconfigure(line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _import_all():
    from offload_rt.device.system import put_tables_aside
    from offload_rt.folders import cache_folder
    from offload_rt.model.sparing import import_compiler, spare_compiler

    spare_compiler()
    for name in (*IMPORTED, *TEXT):
        import_module(name)
    import_compiler()
    put_tables_aside(cache_folder())  # once for all forks
    made = import_module("transformers.conversion_mapping")
    made.get_checkpoint_conversion_mapping("llama")  # compiles expressions of all families


def _import_text():
    from offload_rt.model.sparing import import_models

    sys.modules["torch"] = None
    import_models()
    for name in TEXT:
        import_module(name)


def _main():
    line = socket.socket(fileno=int(sys.argv[1]))
    _import_all() if sys.argv[2] == "all" else _import_text()
    assert "numba" not in sys.modules
    gc.freeze()
    job, streams = _jobs(line)
    _settle(job, streams)
    if sys.argv[2] == "all":
        pipes = {"PIPE": subprocess.PIPE, "DEVNULL": subprocess.DEVNULL}
        import_module("offload_rt.text.process").subprocess = SimpleNamespace(Popen=_Text, **pipes)
    kind, *rest = job["words"]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        from offload_rt.cli import main

        sys.argv = job["words"]
        sys.exit(main())


if __name__ == "__main__":
    _main()
