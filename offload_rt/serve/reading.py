"""Texts that nobody wants answered: /tokenize and /detokenize, beside the prompts of answers."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from offload_rt.serve.orders import Maker
from offload_rt.serve.wire import WireError
from offload_rt.text import Tokenizer
from offload_rt.text.process import TextProcess

MOST_TEXTS = 16  # that are read or wait: each takes seconds at most

T = TypeVar("T")


@dataclass(slots=True)
class Reading:
    """Reads one text after the other, in a process and a thread of its own.

    A prompt of an answer is behind none of them. The process is begun by the first text: it takes
    about 100 MB.

    Args:
        maker: of the answers; reads as it does.
    """

    maker: Maker
    _process: TextProcess = field(default_factory=TextProcess)
    _own: Maker | None = None
    _texts: int = 0
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "reading"))

    async def read(self, work: Callable[[Maker], T]) -> T:
        """The result of some work on texts.

        Raises:
            WireError: too many wait for theirs.
        """
        if self._texts >= MOST_TEXTS:
            raise WireError(
                f"{self._texts} texts are read or wait, {MOST_TEXTS} are accepted: try again",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
                retry_s=1,
            )
        self._texts += 1
        # Nobody takes it back, so that what is counted is what there is.
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._done, work)
        done.add_done_callback(self._over)
        return await asyncio.shield(done)

    def _over(self, done: "asyncio.Future[Any]") -> None:
        self._texts -= 1
        if not done.cancelled():
            done.exception()  # seen, if its client is gone

    def _done(self, work: Callable[[Maker], T]) -> T:
        if self._own is None:
            known = self.maker.prompts
            own = Tokenizer(known.folder, known.rows, self._process)
            self._own = replace(self.maker, prompts=own)
        return work(self._own)

    def end(self) -> None:
        """Read no more; who waits gets an error."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._process.end()
