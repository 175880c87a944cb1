"""Processes of Python that need not import: forks of one that has imported what `generate` does.

torch, transformers and this package are 5 s of processor time, and tests of signals, pipes and
files that other processes hold are not about them. What is about imports or an environment that
libraries read when they are imported has to start a Python of its own.
"""

import ctypes
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
from importlib import import_module

PROGRAM = "offload-run"  # instead of the path of a program: the command line of a console
IMPORTED = (  # not numba, whose variables are read when it is
    *("offload_rt.cli.app", "offload_rt.cli.answering", "offload_rt.engine"),
    *("transformers.models.llama.modeling_llama", "llvmlite.binding", "llvmlite.ir"),
)
_PR_SET_CHILD_SUBREAPER = 36  # prctl.h
_MESSAGE_BYTES = 2**20
_parent: list[socket.socket] = []


class Forked(subprocess.Popen):
    """As `subprocess.Popen` of `[sys.executable, "-c", ...]`, `"-m"`, or `[PROGRAM, ...]`."""

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startup, flags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore, gid, gids, uid, umask,
        start_new_session, *more,
    ):  # fmt: skip
        words = list(map(os.fspath, args))
        assert words[0] in (PROGRAM, sys.executable) and not (preexec_fn or pass_fds or shell)
        job = {
            "words": words if words[0] == PROGRAM else words[1:],
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
            line = _line()
            socket.send_fds(line, [json.dumps(job).encode()], streams)
            self.pid = int(line.recv(_MESSAGE_BYTES))
            assert line.recv(_MESSAGE_BYTES) == b"ended"
        finally:
            prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self._child_created = True


def run(arguments, **options):
    """As `subprocess.run` with output that is kept as text."""
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with Forked(arguments, **(pipes | {"text": True}), **options) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _line():
    """To the process that has imported all; it ends with this one."""
    if not _parent:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        _parent.append(ours)
    return _parent[0]


def _jobs(line):
    """Fork as asked until nobody can ask; returns in a process that was asked for."""
    while True:
        message, streams, _, _ = socket.recv_fds(line, _MESSAGE_BYTES, 3)
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
    for number, stream in enumerate(streams):
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
    for name in IMPORTED:
        import_module(name)
    import_compiler()
    put_tables_aside(cache_folder())  # once for all forks
    made = import_module("transformers.conversion_mapping")
    made.get_checkpoint_conversion_mapping("llama")  # compiles expressions of all families


def _main():
    line = socket.socket(fileno=int(sys.argv[1]))
    _import_all()
    assert "numba" not in sys.modules
    gc.freeze()
    job, streams = _jobs(line)
    _settle(job, streams)
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
