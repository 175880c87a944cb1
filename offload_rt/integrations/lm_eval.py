"""A model for lm-evaluation-harness (`pip install offload-rt[eval]`).

    python -m offload_rt.integrations.lm_eval run --model offload_rt --device auto \
        --model_args pretrained=MODEL,device_memory=20GiB --tasks TASK

`model_args` are the options of `offload_rt.load`; `--device` is the harness's own option, and takes
`auto` and `cpu` too. From Python give `OffloadLM(MODEL, ...)` to `lm_eval.simple_evaluate`.
Requests are cut into tokens as the harness's own `hf` model does. What is longer than the model was
made for is refused, where `hf` cuts it on the left.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

import offload_rt
from offload_rt.errors import ConfigError

_MAX_GEN_TOKENS = 256  # the harness's own, where a task does not say
_DRAWING = ("temperature", "top_k", "top_p", "min_p")


@register_model("offload_rt")
class OffloadLM(LM):
    """A model that may be larger than memory, as the harness asks it.

    Args:
        pretrained: the model, as `offload_rt.load` takes it.
        batch_size: ignored, as is `max_batch_size`: as much runs together as fits.
        max_batch_size: see there.
        device: as `offload_rt.load` takes it.
        options: of `offload_rt.load`.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: object = None,
        max_batch_size: object = None,
        device: str | None = None,
        **options: Any,  # noqa: ANN401 - `load` checks them
    ) -> None:
        super().__init__()
        if device is not None:
            options["device"] = device
        self.session = offload_rt.load(pretrained, **options)

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the chat template's owner in its caches."""
        return self.session.plan.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template, for the harness's records."""
        found = self.session.tokenizer.chat_template
        return str(found) if chat_template and found is not None else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model's template writes it.

        Raises:
            ConfigError: the answer is to be begun for the model.
        """
        if not add_generation_prompt:
            raise ConfigError("an answer that is begun for the model cannot be asked for here")
        chars = sum(len(turn["content"]) for turn in chat_history)
        return self.session.tokenizer.render([dict(turn) for turn in chat_history], chars)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        pairs = [self._pair(*request.args) for request in requests]
        found = [(score.logprob, score.is_greedy) for score in self.session.score(pairs)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each text, in windows as long as the model was made for."""
        begin, longest = self._begin(), self.session.max_tokens
        windows = [
            list(rolling_windows(self._encoded(request.args[0]), begin, longest))
            for request in requests
        ]
        scores = iter(self.session.score([pair for of in windows for pair in of]))
        found = [sum(next(scores).logprob for _ in of) for of in windows]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a text of `until` or its most tokens."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        found = [""] * len(requests)
        for places in groups.values():
            wanted = requests[places[0]].args[1]
            prompts = [self._encoded(requests[place].args[0]) for place in places]
            answers = self.session.generate(prompts, **answer_options(wanted))
            for place, answer in zip(places, answers, strict=True):
                found[place] = answer.text
                self.cache_hook.add_partial("generate_until", requests[place].args, answer.text)
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            ids, begin = self._encoded(continuation, special=False), self._begin()
            return (ids[:1], ids[1:]) if ids[:1] == [begin] else ([begin], ids)
        kept = context.rstrip()
        before = self._encoded(kept)
        return before, self._encoded(context + continuation)[len(before) :]

    def _encoded(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; one that begins with the token of a beginning gets no second."""
        tokenizer = self.session.tokenizer
        begin = tokenizer.token(self._begin())
        special = special and not (begin is not None and text.startswith(begin))
        return tokenizer.encode(text, add_special_tokens=special)

    def _begin(self) -> int:
        begin = self.session.tokenizer.begin_token_id
        if begin is None:
            raise ConfigError("the tokenizer has no token that begins or ends a text")
        return begin


def answer_options(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an answer that a task's `generation_kwargs` stand for.

    Raises:
        ConfigError: one of them is not known here.
    """
    left = dict(wanted)
    until = left.pop("until", None) or []
    most = left.pop("max_gen_toks", _MAX_GEN_TOKENS)
    most = left.pop("max_new_tokens", most)
    samples = left.pop("do_sample", left.get("temperature", 0.0) != 0.0)
    drawing = {name: left.pop(name) for name in _DRAWING if name in left}
    if left:
        raise ConfigError(f"generation_kwargs has {', '.join(left)}, which has no effect here")
    if samples and not drawing.get("temperature"):
        drawing["temperature"] = 1.0
    options = {"max_tokens": most, "stop": [until] if isinstance(until, str) else list(until)}
    return options | (drawing if samples else {})


def rolling_windows(
    tokens: Sequence[int], begin: int, longest: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """A text in windows: what the model reads before them, and the tokens that are scored.

    Each token is scored once. All windows but the first have as much context as fits, at least one
    token, as `lm_eval.utils.get_rolling_token_windows` with `context_len=1`.
    """
    whole = [begin, *tokens]
    for start in range(0, len(tokens), longest):
        end = min(start + longest, len(tokens))
        first = max(0, end - longest) if start else 0
        yield whole[first : start + 1], whole[start + 1 : end + 1]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
