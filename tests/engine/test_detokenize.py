"""The incremental text against a decode of everything at once, for tokenizers of three kinds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyruntime.engine.detokenize import IncrementalDetokenizer
from pyruntime.engine.tokenizer import Tokenizer

SAMPLE = ["the cat sat on the mat. the end", "the 🦙 llama says é and ü, 中文字 too", "  two  spaces\n\tand tabs"]
SPECIALS = ["<unk>", "<s>", "</s>"]

HOSTILE_TEXT = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=("Cs",)), st.sampled_from("🦙👩‍🚀é́ ̈中文\ufffd\u200d\ufe0f🇨🇭 the\n")
    ),
    max_size=40,
)


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE * 3, trainer)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    pieces = [
        *SPECIALS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdehtns.é",
        "th",
        "the",
        "▁the",
        "\ufffd",
    ]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("t", "h"), ("th", "e"), ("▁", "the")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.add_special_tokens(SPECIALS)
    norm, dec = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")])
    backend.decoder = dec.Sequence([dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)])
    return backend


def word_piece() -> tokenizers.Tokenizer:
    pieces = [*SPECIALS, "the", "cat", "##s", "##.", ".", "n", "##'t", "a"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    backend.add_special_tokens(SPECIALS)
    backend.decoder = tokenizers.decoders.WordPiece()
    return backend


BUILDERS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_piece": word_piece}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found = {}
    for name, builder in BUILDERS.items():
        folder = tmp_path_factory.mktemp(name)
        builder().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        found[name] = Tokenizer(folder)
    return found


def run(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    output: Sequence[int],
    stop: tuple[str, ...] = (),
    include_stop: bool = False,
    skip: bool = True,
    min_tokens: int = 0,
) -> tuple[str, str | None, list[str]]:
    """Final text, stop string, and the released pieces."""
    stream = IncrementalDetokenizer(
        tokenizer, prompt, stop=stop, include_stop=include_stop, skip_special_tokens=skip, min_tokens=min_tokens
    )
    pieces, matched = [], None
    for token_id in output:
        matched = stream.push(token_id)
        pieces.append(stream.take())
        if matched is not None:
            break
    if matched is None:
        matched = stream.finish()
        pieces.append(stream.take())
    assert stream.finish() is None
    assert stream.take() == ""
    assert "".join(pieces) == stream.text
    return stream.text, matched, pieces


def whole(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], skip: bool = True) -> str:
    """The same text from two decodes of everything, the prompt included."""
    before = tokenizer.decode(list(prompt), skip_special_tokens=skip)
    after = tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
    common = 0
    while common < min(len(before), len(after)) and before[common] == after[common]:
        common += 1
    return after[common:]


SLACK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLACK
@given(prompt=HOSTILE_TEXT, text=HOSTILE_TEXT)
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_any_text_comes_out_as_it_is_decoded_at_once(
    built: dict[str, Tokenizer], name: str, prompt: str, text: str
) -> None:
    tokenizer = built[name]
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(text, add_special_tokens=False)
    found, stop, pieces = run(tokenizer, prompt_ids, ids)
    assert found == whole(tokenizer, prompt_ids, ids)
    assert stop is None
    if name == "byte_level":
        # without a prefix space the tokenizer loses nothing, so the text itself is the oracle
        assert found == text
        assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


@SLACK
@given(data=st.data())
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_any_ids_come_out_as_they_are_decoded_at_once(
    built: dict[str, Tokenizer], name: str, skip: bool, data: st.DataObject
) -> None:
    # ids at random: broken characters, byte runs, special tokens, ids without a token
    tokenizer = built[name]
    token_id = st.one_of(st.integers(0, tokenizer.vocab_size + 2), st.integers(120, 262))
    prompt = data.draw(st.lists(token_id, max_size=20))
    output = data.draw(st.lists(token_id, max_size=90))
    assert run(tokenizer, prompt, output, skip=skip)[0] == whole(tokenizer, prompt, output, skip)


@SLACK
@given(data=st.data())
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_what_is_released_is_always_a_prefix_of_the_end(
    built: dict[str, Tokenizer], name: str, data: st.DataObject
) -> None:
    tokenizer = built[name]
    output = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=60))
    final = whole(tokenizer, [1], output)
    stream = IncrementalDetokenizer(tokenizer, [1])
    for token_id in output:
        stream.push(token_id)
        assert final.startswith(stream.text)


@SLACK
@given(data=st.data())
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_what_is_pushed_into_a_copy_does_not_reach_the_original(
    built: dict[str, Tokenizer], name: str, data: st.DataObject
) -> None:
    tokenizer = built[name]
    ids = st.lists(st.integers(0, tokenizer.vocab_size), max_size=50)
    begin, end, other = data.draw(ids), data.draw(ids), data.draw(ids)
    stream = IncrementalDetokenizer(tokenizer, [1], stop=("the cat sat on the mat",))
    for token_id in begin:
        stream.push(token_id)
    for each, pushed in ((stream.copy(), other), (stream, end)):
        for token_id in pushed:
            each.push(token_id)
        each.finish()
    assert stream.text == whole(tokenizer, [1], [*begin, *end])


def test_a_split_character_is_held_back(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_level"]
    ids = [i for text in "a👩b" for i in tokenizer.encode(text)]
    assert len(ids) > 4
    _, _, pieces = run(tokenizer, [], ids)
    assert [piece for piece in pieces if piece] == ["a", "👩", "b"]
    assert pieces[0] == "a"


def test_a_character_that_the_prompt_began_belongs_to_the_output(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_level"]
    ids = tokenizer.encode("x👩")
    found, _, _ = run(tokenizer, ids[:-1], ids[-1:])
    assert found == "👩"


def test_a_genuine_replacement_character_is_kept(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_level"]
    ids = tokenizer.encode("a\ufffd\ufffdb\ufffd")
    assert run(tokenizer, [], ids)[0] == "a\ufffd\ufffdb\ufffd"
    assert run(tokenizer, tokenizer.encode("x\ufffd"), tokenizer.encode("y"))[0] == "y"


def test_the_leading_space_of_the_first_word_depends_on_the_prompt(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_fallback"]
    the = tokenizer.encode("the")
    assert tokenizer.token_piece(the[0]) == "▁the"
    assert run(tokenizer, tokenizer.encode("a"), the)[0] == " the"
    assert run(tokenizer, [tokenizer.bos_id or 1], the)[0] == "the"
    assert run(tokenizer, [], the)[0] == "the"
    assert run(tokenizer, tokenizer.encode("a"), the * 50)[0] == " the" * 50


def test_special_tokens_are_shown_on_request(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_level"]
    ids = [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    assert run(tokenizer, [], ids)[0] == "ab"
    assert run(tokenizer, [], ids, skip=False)[0] == "a</s>b"


def test_a_byte_run_waits_for_its_end(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_fallback"]
    ids = [3 + byte for byte in "中".encode()]
    a = tokenizer.encode("a")[-1]
    assert [piece for piece in run(tokenizer, [a], [*ids, a])[2] if piece] == ["中a"]
    assert run(tokenizer, [a], ids)[0] == "中"
    # the decoder judges a run as a whole: one bad byte spoils the good ones
    assert run(tokenizer, [a], [*ids, 3 + 0xFF, a])[0] == "\ufffd" * 4 + "a"


def test_a_byte_run_of_the_prompt_is_not_cut(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_fallback"]
    a = tokenizer.encode("a")[-1]
    run_ids = [3 + byte for byte in "中中中中".encode()]
    prompt, output = [a, *run_ids[:-1]], [run_ids[-1], a]
    assert run(tokenizer, prompt, output)[0] == whole(tokenizer, prompt, output) == "中中中中a"


def test_a_decoder_that_strips_many_spaces(tmp_path: Path) -> None:
    backend, dec = byte_fallback(), tokenizers.decoders
    backend.decoder = dec.Sequence([dec.Replace("▁", " "), dec.Fuse(), dec.Strip(" ", 20, 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    a, space = tokenizer.encode("a")[-1], tokenizer.encode(" ")[0]
    assert tokenizer.token_piece(space) == "▁"
    assert run(tokenizer, [a], [space] * 60 + [a])[0] == " " * 60 + "a"


# stop strings


def naive_stop(text_by_token: list[str], stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """Character by character: the first moment at which the text ends with a stop string."""
    text = "".join(text_by_token)
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@SLACK
@given(
    text=st.text(alphabet="abé🦙 ", max_size=40),
    stops=st.lists(st.text(alphabet="abé🦙 ", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_over_token_borders(
    built: dict[str, Tokenizer], text: str, stops: list[str], include: bool
) -> None:
    tokenizer = built["byte_level"]
    # byte by byte, so that stop strings lie over borders, characters too
    ids = [i for character in text for i in tokenizer.encode(character)]
    expected = naive_stop(list(text), tuple(stops), include)
    found, matched, _ = run(tokenizer, [], ids, stop=tuple(stops), include_stop=include)
    assert (found, matched) == expected
    assert run(tokenizer, [], tokenizer.encode(text), stop=tuple(stops), include_stop=include)[:2] == expected


def test_the_start_of_a_stop_string_is_never_released(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_level"]
    ids = [tokenizer.encode(character)[0] for character in "ab##c###d"]
    _, matched, pieces = run(tokenizer, [], ids, stop=("###",))
    assert pieces == ["a", "b", "", "", "##c", "", "", ""]
    assert matched == "###"
    _, matched, pieces = run(tokenizer, [], ids[:4], stop=("###",))
    assert pieces == ["a", "b", "", "", "##"]
    assert matched is None


def test_text_behind_the_stop_string_in_one_token_is_dropped(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_level"]
    ids = tokenizer.encode(" the")
    assert len(ids) == 1
    assert run(tokenizer, [], ids, stop=("h",)) == (" t", "h", [" t"])
    assert run(tokenizer, [], ids, stop=("h",), include_stop=True) == (" th", "h", [" th"])


def test_a_stop_string_in_what_finish_releases(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_fallback"]
    ids = [3 + byte for byte in "中".encode()]
    assert run(tokenizer, [], [tokenizer.encode("a")[-1], *ids], stop=("中",))[:2] == ("a", "中")


def test_min_tokens_lets_stop_strings_pass(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_level"]
    ids = [tokenizer.encode(character)[0] for character in "xyxyxy"]
    assert run(tokenizer, [], ids, stop=("xy",))[0] == ""
    assert run(tokenizer, [], ids, stop=("xy",), min_tokens=1)[0] == ""
    assert run(tokenizer, [], ids, stop=("xy",), min_tokens=2)[0] == "xy"
    # a stop string may begin within the first tokens if it ends behind them
    assert run(tokenizer, [], ids, stop=("xy",), min_tokens=3)[0] == "xy"
    assert run(tokenizer, [], ids, stop=("xy",), min_tokens=6)[:2] == ("xyxyxy", None)


def test_a_stop_string_of_the_first_tokens_does_not_count_later(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_level"]
    ids = [tokenizer.encode(character)[0] for character in "xyqxy"]
    # "xy" is held back as the start of the longer one
    assert run(tokenizer, [], ids[:3], stop=("xy", "xyz"), min_tokens=2)[:2] == ("xyq", None)
    assert run(tokenizer, [], ids, stop=("xy", "xyz"), min_tokens=2)[:2] == ("xyq", "xy")


def test_nothing_may_be_pushed_after_a_stop(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_level"]
    stream = IncrementalDetokenizer(tokenizer, [], stop=("a",))
    assert stream.push(tokenizer.encode("a")[0]) == "a"
    with pytest.raises(AssertionError):
        stream.push(tokenizer.encode("b")[0])


@pytest.mark.parametrize(
    "what", ["text", "broken bytes", "continuation bytes", "replacement characters", "stop candidates"]
)
def test_the_work_per_token_does_not_grow(built: dict[str, Tokenizer], what: str) -> None:
    tokenizer = built["byte_level"]
    table = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert len(table) == 256
    ids = {
        "text": tokenizer.encode(" the cat"),
        "broken bytes": tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) > 1 else tokenizer.encode("ÿ")[:1],
        "continuation bytes": tokenizer.encode("👩")[-1:],
        "replacement characters": tokenizer.encode("\ufffd"),
        "stop candidates": tokenizer.encode("a"),
    }[what]
    longest = 0
    stream = IncrementalDetokenizer(tokenizer, [], stop=("a" * 100 + "b",))
    for i in range(3000):
        stream.push(ids[i % len(ids)])
        longest = max(longest, len(stream._window))
    assert longest <= 40


def test_a_long_byte_run_is_decoded_once(built: dict[str, Tokenizer]) -> None:
    tokenizer = built["byte_fallback"]
    ids = [3 + byte for byte in "中".encode()] * 5000
    start = time.perf_counter()
    assert run(tokenizer, [], ids)[0] == "中" * 5000
    # decoding 15,000 growing windows takes minutes
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("model", ["stories260k", "babyllama-char-1m"])
def test_real_tokenizers(model: str) -> None:
    data = os.environ.get("PYRUNTIME_TEST_DATA")
    if data is None:
        pytest.skip("PYRUNTIME_TEST_DATA not set")
    tokenizer = Tokenizer(Path(data) / "models" / model)
    prompt = tokenizer.encode("Once upon a time")
    text = " there was a café with 🦙 llamas. The end" * 3
    output = tokenizer.encode(text, add_special_tokens=False)
    found, _, pieces = run(tokenizer, prompt, output)
    assert found == tokenizer.decode(prompt + output)[len(tokenizer.decode(prompt)) :]
    assert len([piece for piece in pieces if piece]) > 10
    stopped, matched, _ = run(tokenizer, prompt, output, stop=("The end",))
    assert matched == "The end"
    assert stopped == found[: found.index("The end")]
