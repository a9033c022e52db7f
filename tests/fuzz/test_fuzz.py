"""Untrusted files: the kept corpus, fresh cases of the fuzzer, properties, and that the fuzzer sees what is wrong."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.families import FAMILIES
from pyruntime.checkpoint.folder import open_tensors
from pyruntime.errors import PyruntimeError, RunError, UsageError
from pyruntime.graph import Graph
from pyruntime.passes.drop import load_drop_plan, save_drop_plan
from pyruntime.spec import DropPlan
from tests.checkpoint.craft import INDEX, SINGLE, write_shards
from tests.fuzz import check
from tests.fuzz.cases import (
    CONFIG,
    CORPUS,
    TARGETS,
    Case,
    Entry,
    Seed,
    WeightFile,
    dump_entry,
    load_entry,
    load_seeds,
    whole,
)
from tests.fuzz.check import ACCEPTED, Bench, Violation, open_bench
from tests.fuzz.edits import to_text
from tests.fuzz.mutate import make_case
from tests.fuzz.run import main, usable_seeds
from tests.fuzz.shrink import shrink

# not that of the long runs, so that both together see more
SEED = 2
NUM_CASES = 750


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with open_bench() as found:
        yield found


@pytest.fixture(scope="module")
def seeds(bench: Bench) -> list[Seed]:
    return usable_seeds(bench)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_a_kept_case_ends_as_its_rule_says(bench: Bench, path: Path) -> None:
    entry = load_entry(path.read_text())
    outcome = bench.run(entry.case)
    assert fnmatchcase(outcome.code, entry.expect), f"{entry.rule} ({entry.why}) asks for {entry.expect}: {outcome}"


def test_the_corpus_is_small_and_covers_the_rules() -> None:
    texts = [path.read_text() for path in CORPUS.glob("*.json")]
    assert sum(map(len, texts)) < 300_000
    entries = [load_entry(text) for text in texts]
    rules = {f"L{number:02}" for number in (*range(1, 12), 13, 14, 18)} | {f"C{number:02}" for number in (1, 2, 3, 4)}
    assert {entry.rule for entry in entries} == rules | {"C06", "C07", "C08", "C09", "C10", "C11", "C12", "C13"}
    assert {entry.case.target for entry in entries} == set(TARGETS)
    assert [dump_entry(entry) for entry in entries] == texts


def test_every_seed_of_a_supported_family_is_read(bench: Bench) -> None:
    """What transformers saves, we read: its names and shapes judge ours."""
    for seed in load_seeds():
        supported = json.loads(seed.config)["model_type"] in FAMILIES
        outcome = bench.run(whole(seed))
        assert outcome.code == (ACCEPTED if supported else "CONFIG"), f"{seed.name}: {outcome}"


@pytest.mark.parametrize("target", TARGETS)
def test_a_hostile_input_gives_a_model_or_one_clear_refusal(bench: Bench, seeds: list[Seed], target: str) -> None:
    codes: Counter[str] = Counter()
    for number in range(NUM_CASES):
        case = make_case(target, SEED, number, seeds)
        try:
            codes[bench.run(case).code] += 1
        except Violation as violation:
            pytest.fail(f"case {number} of seed {SEED} {violation}:\n{dump_entry(Entry(case, '', '*', ''))[:3000]}")
    # both doors must be reached, or the cases say nothing
    assert 0.02 < codes[ACCEPTED] / NUM_CASES < 0.6


def test_the_edits_reach_every_rule_of_a_header(bench: Bench, seeds: list[Seed]) -> None:
    codes = {bench.run(make_case("header", SEED, number, seeds)).code for number in range(2 * NUM_CASES)}
    wanted = {"HEADER_SIZE", "HEADER_JSON", "DUPLICATE_NAME", "TENSOR_NAME", "DTYPE", "OFFSETS", "TRUNCATED", ACCEPTED}
    assert wanted <= codes


@pytest.mark.parametrize("target", TARGETS)
def test_a_seed_and_a_number_name_one_case(target: str) -> None:
    seeds = load_seeds()
    first, again = (([make_case(target, 7, number, seeds) for number in range(50)]) for _ in range(2))
    assert first == again
    assert first != [make_case(target, 8, number, seeds) for number in range(50)]
    assert all(load_entry(dump_entry(Entry(case, "", "*", ""))).case.files == case.files for case in first)


def _reads_a_tensor(case: Case, folder: Path) -> dict[str, Any]:
    fd = os.open(folder / SINGLE, os.O_RDONLY)
    try:
        os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)
    return {}


def _raw(message: str) -> UsageError:
    """An error whose message was not made printable."""
    error = UsageError("CONFIG", "x")
    error.args = (message,)
    return error


def _raises(error: BaseException) -> Callable[[Case, Path], Any]:
    def read(case: Case, folder: Path) -> Any:
        raise error

    return read


def _loops(case: Case, folder: Path) -> Any:
    while True:
        pass


FAULTS: dict[str, tuple[Callable[[Case, Path], Any], str]] = {
    "another exception": (_raises(KeyError("x")), "raised KeyError"),
    "recursion": (_raises(RecursionError()), "raised RecursionError"),
    "no memory": (_raises(MemoryError()), "raised MemoryError"),
    "our own mistake": (_raises(RunError("GRAPH", "broken")), "exit 70"),
    "a code in small letters": (_raises(UsageError("config", "x")), "its code"),
    "two lines": (_raises(_raw("a\nb")), "not one printable line"),
    "an escape sequence": (_raises(_raw("a\x1b[2J")), "not one printable line"),
    "half a surrogate pair": (_raises(_raw("\udcff")), "not one printable line"),
    "no message": (_raises(UsageError("CONFIG", "")), "characters"),
    "a tensor read": (_reads_a_tensor, "bytes of a tensor"),
    "a file elsewhere": (lambda case, folder: os.close(os.open("/dev/null", os.O_RDONLY)), "not in its folder"),
    "the folder above": (lambda case, folder: os.close(os.open(folder / "..", os.O_RDONLY)), "not in its folder"),
    "a file left open": (lambda case, folder: os.open(folder / CONFIG, os.O_RDONLY), "left a file open"),
    "an endless loop": (_loops, "more than 1"),
    "much memory": (lambda case, folder: bool(bytearray(80 << 20)) and {}, "MiB"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzzer_sees(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, message = FAULTS[fault]
    before = set(os.listdir("/proc/self/fd"))
    # `check_result` is not what is tested here
    monkeypatch.setattr(Bench, "check_result", lambda *_: None)
    monkeypatch.setattr(check, "read", read)
    with open_bench() as fresh, pytest.raises(Violation, match=message):
        fresh.run(whole(load_seeds()[0]))
    for fd in set(os.listdir("/proc/self/fd")) - before:
        if os.path.exists(f"/proc/self/fd/{fd}"):
            os.close(int(fd))


def _llama() -> Seed:
    return next(seed for seed in load_seeds() if seed.name == "llama")


def test_the_fuzzer_sees_a_model_that_is_not_what_the_files_hold(bench: Bench) -> None:
    case = whole(_llama())
    bench.run(case)
    file = case.files[SINGLE]
    assert isinstance(file, WeightFile)
    moved = json.loads(file.header)
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        moved[name]["data_offsets"] = [offset + 16 for offset in moved[name]["data_offsets"]]
    lie = Case(case.target, {**case.files, SINGLE: WeightFile(json.dumps(moved).encode(), file.data_bytes)}, case.place)
    model = read_model(bench.write(case))
    with pytest.raises(Violation, match="elsewhere"):
        bench.check_model(lie, model)


def test_the_fuzzer_sees_a_model_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Graph) -> None:
        raise PyruntimeError("GRAPH", "broken")

    monkeypatch.setattr(check, "verify", broken)
    with open_bench() as fresh, pytest.raises(Violation, match="broken"):
        fresh.run(whole(_llama()))


def test_a_failing_case_is_made_small(bench: Bench) -> None:
    def same(case: Case) -> bool:
        return bench.run(case).message.startswith("error[CONFIG]: config.json: num_hidden_layers is 0")

    config = {**json.loads(_llama().config), "num_hidden_layers": 0}
    small = shrink(Case("config", {CONFIG: to_text(config), SINGLE: _llama().file}, "x"), same)
    assert {name: json.loads(content) for name, content in small.files.items() if isinstance(content, bytes)} == {
        CONFIG: {"model_type": "llama", "num_hidden_layers": 0}
    }
    assert small.files.keys() == {CONFIG}


def test_the_runner_counts_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", "300", "--seed", "5", "--failures", str(tmp_path / "failed")]) == 0
    out = capsys.readouterr().out
    counts = [int(line.split()[2]) for line in out.splitlines() if line.startswith(TARGETS)]
    assert sum(counts) == 300
    assert "300 cases, seed 5" in out and "0 distinct failures" in out


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]
names = st.text("abc.é_0", min_size=1, max_size=12).filter(lambda name: ".." not in name)
stored = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(1, 3))


@given(st.dictionaries(names, stored, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_shards_that_the_library_saves_are_read_alike(wanted: dict[str, tuple[torch.dtype, list[int], int]]) -> None:
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, (dtype, shape, number) in wanted.items():
        data = torch.frombuffer(bytearray(os.urandom(8 * math.prod(shape) + 8)), dtype=torch.uint8)
        tensor = data[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        shards.setdefault(f"model-0000{number}-of-00003.safetensors", {})[name] = tensor
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), shards)
        found = open_tensors(Path(folder))
        assert found.keys() == wanted.keys()
        for file, tensors in shards.items():
            with safe_open(Path(folder) / file, "pt") as library:
                for name in tensors:
                    ours, theirs = found[name], library.get_slice(name)
                    assert (ours.shard.path.name, ours.info.dtype) == (file, theirs.get_dtype())
                    assert list(ours.info.shape) == theirs.get_shape()
                    raw = library.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
                    assert bytes(ours.shard.read(ours.info.start, ours.info.num_bytes)) == raw


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["F32", "BF16", "U8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {"dtype": values, "shape": values | st.lists(st.integers(-1, 9), max_size=3)},
    optional={"data_offsets": values | st.lists(st.integers(-1, 40), min_size=2, max_size=2), "x": values},
)


@given(st.dictionaries(names | st.text(max_size=3), entries | values, max_size=3), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_any_header_is_read_as_the_library_does_or_refused(bench: Bench, header: dict[str, Any], size: int) -> None:
    bench.run(Case("header", {SINGLE: WeightFile(to_text(header), size)}, "header"))


@given(st.dictionaries(names | st.just("weight_map"), values, max_size=3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_index_is_refused(bench: Bench, seeds: list[Seed], index: dict[str, Any], nested: bool) -> None:
    seed = seeds[0]
    files = {CONFIG: seed.config.encode(), INDEX: to_text({"weight_map": index} if nested else index)}
    assert bench.run(Case("index", files, "index")).code != ACCEPTED


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_value_of_any_key_gives_a_model_or_one_clear_refusal(
    bench: Bench, seeds: list[Seed], data: st.DataObject
) -> None:
    seed = data.draw(st.sampled_from(seeds))
    config = json.loads(seed.config)
    keys = st.sampled_from(sorted(config)) | names
    changes = data.draw(st.dictionaries(keys, values, min_size=1, max_size=3))
    bench.run(Case("config", {CONFIG: to_text({**config, **changes}), SINGLE: seed.file}, seed.name))


ids = st.lists(st.integers(0, 10**30), max_size=6)


@given(ids, ids, st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_a_plan_is_refused_at_once_or_survives_its_file(attention: list[int], mlp: list[int], origin: str) -> None:
    try:
        plan = DropPlan(tuple(attention), tuple(mlp), origin)
    except PyruntimeError:
        assert not origin.isprintable()
        return
    with tempfile.TemporaryDirectory() as folder:
        save_drop_plan(plan, Path(folder) / "plan.json")
        assert load_drop_plan(Path(folder) / "plan.json") == plan
