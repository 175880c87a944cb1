"""Text: streamed pieces join to what `decode` gives, and a model folder cannot do harm."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.text import (
    Message,
    TextStream,
    answer_end_token,
    build_prompt,
    declared_end_ids,
    end_token_ids,
    load_tokenizer,
    worker,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog, then the dog sleeps. " * 3,
    "Grüße aus Köln; naïve café, déjà vu. " * 3,
    "你好,世界。今天天气很好。世界很大。" * 3,
    "👩\u200d👩\u200d👧 family 👍🏽 ok 👩\u200d👩\u200d👧 👍🏽 " * 3,
    "line\n\nline\n  indented\n</s> STOP END Human: ",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2 style; whole texts are one word, so merges cross spaces and characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2 style: `_` for spaces, the first space dropped, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,SETO你", "\u2581th", "\u2581\u2581"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("\u2581", "\u2581")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}
both_tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)

texts = st.lists(
    st.one_of(
        st.sampled_from(
            [*CORPUS, " ", "  ", "👩\u200d👩\u200d👧", "👍🏽", "你", "\ufffd", "a", "\u0301"]
        ),
        st.text(max_size=12),
    ),
    max_size=6,
).map("".join)
group_sizes = st.lists(st.integers(1, 7), min_size=1, max_size=8)


def grouped(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """Cut ids into pushes, repeating the sizes."""
    pushes, at, turn = [], 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pushes.append(ids[at : at + size])
        at, turn = at + size, turn + 1
    return pushes


def whole(tokenizer, ids, skip_special_tokens=True) -> str:
    return tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


def streamed(tokenizer, ids, sizes=(1,), stop=(), skip_special_tokens=True) -> TextStream:
    """A finished stream; checks that what was returned is what was kept."""
    stream = TextStream(tokenizer, stop, skip_special_tokens)
    pieces = [stream.push(push) for push in grouped(list(ids), list(sizes))]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return stream


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Where a stop string is complete first, going one character at a time."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


# --- streaming -------------------------------------------------------------------------------


@both_tokenizers
@settings(max_examples=100, deadline=None)
@given(text=texts, sizes=group_sizes)
def test_pieces_join_to_the_decoded_text(tokenizer, text, sizes):
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert streamed(tokenizer(), ids, sizes).text == whole(tokenizer(), ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), sizes=group_sizes, skip=st.booleans())
def test_any_tokens_join_to_the_decoded_text(data, sizes, skip):
    """Bytes that are no text, special tokens inside characters, ids past the vocabulary."""
    tokenizer = byte_level()
    rows = len(tokenizer)
    token = st.one_of(st.integers(0, rows - 1), st.sampled_from([0, 2, rows - 1, rows + 5]))
    ids = data.draw(st.lists(token, max_size=80))
    ids += data.draw(st.lists(st.sampled_from(tokenizer.encode("你👍\ufffd")), max_size=80))
    assert streamed(tokenizer, ids, sizes, (), skip).text == whole(tokenizer, ids, skip)


@both_tokenizers
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_nothing_shown_is_half_a_character_or_taken_back(tokenizer, text):
    tokenizer, text = tokenizer(), text.replace("\ufffd", "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    full = whole(tokenizer, ids)
    stream = TextStream(tokenizer)
    for token_id in ids:
        assert "\ufffd" not in stream.push([token_id])
        assert full.startswith(stream.text)


def test_an_unfinished_character_is_held_and_then_flushed():
    tokenizer = byte_fallback()
    ids = tokenizer.encode("a世", add_special_tokens=False)
    stream = TextStream(tokenizer)
    assert [stream.push([token_id]) for token_id in ids[-4:-1]] == ["a", "", ""]
    assert stream.finish() == "\ufffd\ufffd"
    assert stream.push([]) == stream.finish() == ""


def test_leading_spaces_of_later_words_survive_skipped_tokens():
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(["\u2581th", "e", "</s>", "<s>", "\u2581", "\u2581th"])
    assert streamed(tokenizer, ids).text == whole(tokenizer, ids) == "the  th"


@pytest.mark.parametrize("piece", ["a", "你", "\ufffd", "<|im_end|>", "\u0080"])
def test_work_grows_with_the_number_of_tokens_only(piece, monkeypatch):
    tokenizer = byte_level()
    ids = tokenizer.encode(piece) * 500
    if piece == "\u0080":  # only the second byte: never a character
        ids = ids[-1:] * 1000
    expected = whole(tokenizer, ids)
    decoded = []
    original = type(tokenizer).decode

    def counting(self, token_ids, **options):
        decoded.append(len(token_ids))
        return original(self, token_ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counting)
    assert streamed(tokenizer, ids).text == expected
    assert sum(decoded) < 60 * len(ids)


@pytest.mark.parametrize("count", range(28, 72))
def test_a_character_after_many_real_replacement_characters_is_whole(count):
    tokenizer = byte_level()
    stray = tokenizer.convert_tokens_to_ids("ł")  # byte A0
    ids = [stray] * count + tokenizer.convert_tokens_to_ids(["ä", "½", "ł"])
    assert streamed(tokenizer, ids).text == whole(tokenizer, ids) == "\ufffd" * count + "你"


def test_tokens_that_always_straddle_characters_do_not_widen_the_window(monkeypatch):
    """Each token is the end of one character and the beginning of the next."""
    symbols = dict(zip("你".encode(), "ä½ł", strict=True))
    straddling = symbols[0xA0] + symbols[0xE4] + symbols[0xBD]
    pieces = ["ä", "½", "ł", straddling]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[]))
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ids = [0, 1, *[3] * 300, 2]
    stream = TextStream(tokenizer)
    windows = []
    for token_id in ids:
        stream.push([token_id])
        windows.append(len(stream._window))
    assert stream.text + stream.finish() == "你" * 301
    assert max(windows) <= 4


# --- stop strings ----------------------------------------------------------------------------


@both_tokenizers
@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=texts, sizes=group_sizes)
def test_text_ends_where_the_first_stop_string_begins(tokenizer, data, text, sizes):
    tokenizer = tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    full = whole(tokenizer, ids)
    inside = st.tuples(st.integers(0, max(len(full) - 1, 0)), st.integers(1, 6)).map(
        lambda cut: full[cut[0] : cut[0] + cut[1]]
    )
    stop = st.one_of(inside, st.text(min_size=1, max_size=3), st.sampled_from(["ee", "the d"]))
    stops = data.draw(st.lists(stop.filter(bool), min_size=1, max_size=4))
    expected, met = cut_at_stop(full, stops)

    stream = streamed(tokenizer, ids, sizes, stops)
    assert (stream.text, stream.stopped) == (expected, met)

    # The kept tokens give the same; without the last of them no stop string is met.
    kept = streamed(tokenizer, ids[: stream.kept_tokens], sizes, stops)
    assert (kept.text, kept.stopped) == (expected, met)
    if met is None:
        assert stream.kept_tokens == len(ids)
    shorter = TextStream(tokenizer, stops)
    shorter.push(ids[: stream.kept_tokens - 1] if ids else [])
    assert shorter.stopped is None


@settings(max_examples=100, deadline=None)
@given(text=texts, stop=st.sampled_from(["the lazy", "世界", "\n\n", "👩\u200d👩\u200d👧", "aaab"]))
def test_no_beginning_of_a_stop_string_is_shown_early(text, stop):
    tokenizer = byte_level()
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, [stop])
    for count, token_id in enumerate(ids, start=1):
        stream.push([token_id])
        if stream.stopped:
            break
        known = whole(tokenizer, ids[:count]).rstrip("\ufffd")
        claimed = max(size for size in range(len(stop)) if known.endswith(stop[:size]))
        assert len(stream.text) <= len(known) - claimed


def test_a_stop_string_inside_a_push_cuts_at_its_token():
    tokenizer = byte_level()
    ids = tokenizer.encode("x", add_special_tokens=False)
    stop_ids = tokenizer.encode("STOP", add_special_tokens=False)
    assert len(stop_ids) >= 2
    stream = TextStream(tokenizer, ["STOP"])
    assert stream.push([*ids, *stop_ids, *ids, *ids]) == "x"
    assert (stream.stopped, stream.kept_tokens) == ("STOP", 1 + len(stop_ids))
    assert stream.push(ids) == stream.finish() == ""
    assert (stream.text, stream.kept_tokens) == ("x", 1 + len(stop_ids))


def test_the_stop_string_that_is_complete_first_wins():
    tokenizer = byte_level()
    for stops, text, stopped in (
        (["abcd", "bc"], "x a", "bc"),  # though "abcd" begins earlier
        (["c", "abc"], "x ", "abc"),  # same end: the longest
        (["abce", "abcdq"], "x abcd", None),  # neither: what was held comes out
    ):
        stream = streamed(tokenizer, tokenizer.encode("x abcd"), (3,), stops)
        assert (stream.text, stream.stopped) == (text, stopped)


def test_the_first_stop_string_wins_inside_one_token_too():
    tokenizer = byte_level()
    token_id = max(
        range(3, len(tokenizer) - 1), key=lambda token_id: len(tokenizer.decode(token_id))
    )
    text = tokenizer.decode(token_id)
    middle = text[1:3]
    assert len(text) > 4 and text.find(middle) == 1
    stream = streamed(tokenizer, [token_id], (1,), [text, middle])
    assert (stream.text, stream.stopped) == (text[0], middle)


def test_held_text_comes_out_when_the_stop_string_does_not_follow():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, ["END"])
    assert stream.push(tokenizer.encode("sEN")) == "s"
    assert stream.push(tokenizer.encode("EN")) == "EN"
    assert stream.finish() == "EN"
    assert stream.text == "sENEN"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="stop string is empty"):
        TextStream(byte_level(), ["x", ""])


# --- prompts ---------------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path):
    """Save a tokenizer with a chat template and load it as a run does."""

    def load(template, made=None):
        made = PreTrainedTokenizerFast(tokenizer_object=(made or byte_level())._tokenizer)
        made.chat_template = template
        folder = tmp_path / f"of{len(list(tmp_path.iterdir()))}"
        made.save_pretrained(folder)
        return load_tokenizer(folder)

    return load


def test_a_prompt_goes_through_the_chat_template_and_equals_transformers(loaded):
    tokenizer = loaded(TEMPLATE)
    local = AutoTokenizer.from_pretrained(tokenizer.folder)
    ids = build_prompt(tokenizer, "héllo", system="be brief")
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "héllo"},
    ]
    assert ids == local.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")

    turns = [Message(role=turn["role"], content=turn["content"]) for turn in conversation]
    assert build_prompt(tokenizer, turns) == ids
    assert build_prompt(tokenizer, turns[1:], system="be brief") == ids


def test_a_raw_prompt_and_a_model_without_template_get_plain_text(loaded):
    plain = byte_level().encode("hello")
    assert build_prompt(loaded(TEMPLATE), "hello", raw=True) == plain
    assert build_prompt(loaded(None), "hello") == plain


def test_the_first_token_of_a_text_is_added_to_plain_text_only(loaded):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level()._tokenizer.to_str())
    )
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    plain = byte_level().encode("hello")
    assert build_prompt(loaded(None, tokenizer), "hello") == [0, *plain]
    assert build_prompt(loaded("{{ messages[0]['content'] }}", tokenizer), "hello") == plain


@pytest.mark.parametrize(
    ("template", "prompt", "options", "message"),
    [
        (TEMPLATE, "", {}, "prompt is empty"),
        (None, "", {}, "prompt is empty"),
        (TEMPLATE, [], {}, "prompt is empty"),
        (TEMPLATE, "x", {"raw": True, "system": "s"}, "system prompt needs .* --raw leaves it out"),
        (None, "x", {"system": "s"}, "system prompt needs .* the model has none"),
        (None, [Message(role="user", content="x")], {}, "conversation needs .* the model has none"),
        (TEMPLATE, [Message(role="system", content="x")], {"system": "s"}, "two system prompts"),
        (TEMPLATE, "a\udc80", {}, "not UTF-8 at character 1"),
    ],
)
def test_prompts_that_cannot_be_used(template, prompt, options, message, loaded):
    with pytest.raises(ConfigError, match=message):
        build_prompt(loaded(template), prompt, **options)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "failed"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "failed: roles must alternate; use --raw",
        ),
        ("{% for i in range(10**9) %}{% endfor %}", "failed: .*100000"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "failed"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ 'x' * 30000000 }}", "wrote 30000000 characters, limit for this prompt is 1048608"),
    ],
)
def test_a_bad_chat_template_is_one_sentence(template, message, loaded):
    with pytest.raises(CheckpointError, match=message):
        build_prompt(loaded(template), "hi")


def test_a_template_that_rejects_system_prompts_says_so(loaded):
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with pytest.raises(CheckpointError, match="no system; leave out --system or use --raw"):
        build_prompt(loaded(template), "hi", system="s")


def test_an_endless_chat_template_is_stopped(monkeypatch, loaded):
    monkeypatch.setattr("offload_rt.text.tokenizer._RENDER_S", 0.3)
    numbers = "range(100000)"
    template = "".join(f"{{% for i in {numbers} %}}" for _ in range(4)) + "{% endfor %}" * 4
    with pytest.raises(CheckpointError, match="ran for more than 0.3 s; use --raw"):
        build_prompt(loaded(template), "hi")


# --- model folders ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def test_a_tokenizer_loads_from_its_folder(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("你好 the dog") == byte_level().encode("你好 the dog")


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_folder_without_tokenizer_files_is_refused(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=f"no tokenizer in {tmp_path}"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize("damaged", ["", "{", "{}", "[]", '{"added_tokens": [], "model": 3}'])
def test_a_damaged_tokenizer_is_one_sentence(folder, damaged):
    (folder / "tokenizer.json").write_text(damaged)
    with pytest.raises(CheckpointError, match=f"cannot load the tokenizer of {folder}: ."):
        load_tokenizer(folder)


def test_code_of_the_folder_never_runs_and_nothing_is_asked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    for name in ("tokenization_x.py", "configuration_x.py"):
        (folder / name).write_text("open('ran', 'w')\nraise SystemExit('ran')\n")
    monkeypatch.chdir(folder)
    config = {"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    load_tokenizer(folder)  # the tokenizer itself is an ordinary one

    auto_map = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "XTokenizer", "auto_map": auto_map})
    )
    with pytest.raises(CheckpointError, match="needs Python code of the folder"):
        load_tokenizer(folder)
    assert not (folder / "ran").exists()


def test_one_file_decides_about_end_tokens(folder):
    tokenizer = load_tokenizer(folder)  # eos is <|im_end|> = 2, <|endoftext|> = 0
    assert end_token_ids(tokenizer, folder) == {0, 2}
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 4}}))
    assert end_token_ids(tokenizer, folder) == {4}
    (folder / "config.json").write_text(
        json.dumps({"eos_token_id": 5, "text_config": {"eos_token_id": 4}})
    )
    assert end_token_ids(tokenizer, folder) == {5}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert end_token_ids(tokenizer, folder) == {6, 7}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert end_token_ids(tokenizer, folder) == {5}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": -1}))
    assert end_token_ids(tokenizer, folder) == set()


@pytest.mark.parametrize("declared", ['"2"', "true", "1.5", "[1, [2]]", "{}"])
def test_end_tokens_that_are_no_ids_are_refused(folder, declared):
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {declared}}}')
    with pytest.raises(CheckpointError, match="eos_token_id in .* expected a token id"):
        declared_end_ids(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_a_damaged_generation_config_is_one_sentence(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="generation_config.json"):
        declared_end_ids(folder)


@pytest.fixture
def ending(tmp_path):
    """A tokenizer whose own end of a text is not that of a turn."""

    def make(template, eos="<|endoftext|>"):
        made = PreTrainedTokenizerFast(tokenizer_object=byte_level()._tokenizer, eos_token=eos)
        made.chat_template = template
        made.save_pretrained(tmp_path)
        return load_tokenizer(tmp_path)

    return make


STRICT = "{% if (messages | length) > 2 %}{{ raise_exception('one turn') }}{% endif %}" + TEMPLATE


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (TEMPLATE, {}, "<|im_end|>"),
        (TEMPLATE.replace("<|im_end|>", "<|endoftext|>"), {}, "<|endoftext|>"),
        (TEMPLATE.replace("<|im_end|>", "</turn>"), {}, "<|endoftext|>"),  # no token ends it
        (TEMPLATE.replace("<|im_end|>", " x<|im_end|><|endoftext|>"), {}, "<|im_end|>"),
        (TEMPLATE, {"raw": True}, "<|endoftext|>"),
        (None, {}, "<|endoftext|>"),
        (STRICT, {}, "<|endoftext|>"),
    ],
)
def test_an_answer_ends_as_the_chat_template_ends_it(template, options, expected, ending):
    tokenizer = ending(template)
    ends = [tokenizer.get_vocab()[name] for name in ("<|im_end|>", "<|endoftext|>")]
    found = answer_end_token(tokenizer, ends, **options)
    assert tokenizer.token(found) == expected


def test_without_an_end_token_of_its_own_the_first_of_the_folders_ends_an_answer(ending):
    tokenizer = ending(None, eos=None)
    assert answer_end_token(tokenizer, [7, 5]) == 5
    assert answer_end_token(tokenizer, []) is None


def test_what_building_a_tokenizer_took_is_given_back(tmp_path, monkeypatch):
    byte_level().save_pretrained(tmp_path)
    served, order = worker._Served(), []
    differences = worker._differences
    monkeypatch.setattr(
        worker, "_differences", lambda *told: order.append("built") or differences(*told)
    )
    monkeypatch.setattr(worker, "give_back_holes", lambda: order.append("given back"))
    assert served.load(1, str(tmp_path))["tokens"] == len(byte_level())
    assert order == ["built", "given back"]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    changed = settings | {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed))
    served.load(2, str(tmp_path))
    built = served._tokenizers[2]
    assert type(built).__name__ == "Qwen2Tokenizer" and not {"_vocab", "_merges"} & set(vars(built))
    assert served.encode(2, "a cat", True) and len(served.vocabulary(2)) >= 256
