"""The model for lm-evaluation-harness, with as little of the harness as it asks for.

The comparison with the harness's own model is in docs/RESULTS.md.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from engines import reference_model
from transformers import AutoTokenizer

from offload_rt.errors import ConfigError

NAME = "offload_rt.integrations.lm_eval"


class LM:
    """What the class inherits."""

    def __init__(self):
        self.kept = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.kept.append(entry))


@pytest.fixture(scope="module")
def module():
    """The integration, with stubs of the harness's modules."""
    registered = {}
    stubs = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {
            "register_model": lambda name: lambda made: registered.setdefault(name, made)
        },
    }
    before = {name: sys.modules.get(name) for name in (*stubs, NAME)}
    for name, content in stubs.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    sys.modules.pop(NAME, None)
    try:
        made = importlib.import_module(NAME)
        assert registered == {"offload_rt": made.OffloadLM}
        yield made
    finally:
        for name, was in before.items():
            sys.modules.pop(name, None)
            if was is not None:
                sys.modules[name] = was


@pytest.fixture(scope="module")
def lm(module, tiny_model):
    made = module.OffloadLM(
        tiny_model, batch_size=4, dtype="float32", device="cpu", context=64, draft="none"
    )
    with made.session:
        yield made


def request(*args):
    return SimpleNamespace(args=args)


def reference(folder, context, continuation):
    """The sum by transformers."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        rows = reference_model(folder)(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return float(rows[range(len(continuation)), list(continuation)].sum())


def test_log_likelihoods(lm, tiny_model):
    encode = AutoTokenizer.from_pretrained(tiny_model).encode
    requests = [request("the quick ", "brown fox"), request("", "lazy dog")]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    first = encode("the quick"), encode(" brown fox")
    end = AutoTokenizer.from_pretrained(tiny_model).eos_token_id
    assert found[0][0] == pytest.approx(reference(tiny_model, *first), abs=1e-3)
    second = reference(tiny_model, [end], encode("lazy dog"))
    assert found[1][0] == pytest.approx(second, abs=1e-3)
    assert lm.kept[-2:] == [
        ("loglikelihood", r.args, answer) for r, answer in zip(requests, found, strict=True)
    ]


def test_a_long_text_is_read_in_windows(lm, module, tiny_model):
    """Of 64 tokens; those of the last have as much context as fits."""
    text = "the quick brown fox jumps over the lazy dog " * 10
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer.encode(text)
    assert 64 < len(ids) < 128
    whole = [tokenizer.eos_token_id, *ids]
    expected = reference(tiny_model, whole[:1], ids[:64])
    expected += reference(tiny_model, whole[len(ids) - 64 : 65], ids[64:])
    (found,) = lm.loglikelihood_rolling([request(text)])
    assert found == pytest.approx(expected, abs=1e-3)
    for length in (1, 63, 64, 65, 128, 200):
        windows = list(module.rolling_windows(range(length), -1, 64))
        assert [t for _, scored in windows for t in scored] == list(range(length))
        for context, scored in windows:
            joined = [*context, *scored]
            assert joined == list(range(joined[0], joined[0] + len(joined)))
            assert len(joined) <= 65 and context


def test_continuations_end_where_the_task_says(lm):
    texts = ["the quick brown", "lazy"]
    plain = lm.generate_until([request(text, {"max_gen_toks": 12}) for text in texts])
    answers = lm.session.generate(texts, raw=True, max_tokens=12)
    assert plain == [answer.text for answer in answers]
    stop = plain[0][4:6]
    asked = {"until": [stop], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    cut = lm.generate_until([request(texts[0], asked), request(texts[1], {"max_gen_toks": 12})])
    assert cut == [plain[0][: plain[0].index(stop)], plain[1]]


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ({}, {"max_tokens": 256, "stop": []}),
        ({"until": "x", "max_gen_toks": 3}, {"max_tokens": 3, "stop": ["x"]}),
        ({"do_sample": False, "temperature": 0.7}, {"max_tokens": 256, "stop": []}),
        ({"do_sample": True}, {"max_tokens": 256, "stop": [], "temperature": 1.0}),
        ({"temperature": 0.5, "top_p": 0.9}, None),
    ],
)
def test_what_a_task_asks_of_answers(wanted, options, module):
    options = options or {"max_tokens": 256, "stop": [], "temperature": 0.5, "top_p": 0.9}
    assert module.answer_options(wanted) == options


def test_what_is_refused(lm, module):
    with pytest.raises(ConfigError, match="generation_kwargs has num_beams"):
        module.answer_options({"num_beams": 4})
    with pytest.raises(ConfigError, match="pair 1 has .* up to 65"):
        lm.loglikelihood([request("the quick fox " * 30, "x")])
    with pytest.raises(ConfigError, match="begun for the model"):
        lm.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=False)


def test_conversations(lm):
    written = lm.apply_chat_template([{"role": "user", "content": "the fox"}])
    assert written.endswith("<|im_start|>assistant\n") and "the fox" in written
    assert "im_start" in lm.chat_template(True) and lm.chat_template(False) is None
    assert lm.tokenizer_name == lm.session.plan.name
