from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest

from asyncload.errors import OptionsError
from asyncload.options import DeviceKind, EngineOption, Options, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4096", 4096), ("64MiB", 64 << 20), ("1.5 GB", 1_500_000_000), ("2k", 2000), ("3 KiB", 3072), ("1tib", 1 << 40)],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "-1", "MiB", "1 XB", "1e9", "1MiB2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_sizes_are_written_for_people() -> None:
    assert [format_size(n) for n in (0, 1023, 1 << 20, 3 << 29, 1 << 41)] == [
        "0 B",
        "1023 B",
        "1.0 MiB",
        "1.5 GiB",
        "2.0 TiB",
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"chunk_size": 1},
        {"chunk_size": (1 << 20) + 1},
        {"chunk_size": 1 << 20, "staging": 1 << 20},
        {"threads": -1},
        {"streams": -1},
        {"engine": "rust"},
        {"depth": 0},
        {"retries": -1},
        {"retry_delay": -1.0},
        {"nice": -1},
    ],
)
def test_a_value_that_cannot_be_used_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(OptionsError) as caught:
        Options(**values)
    assert caught.value.option == list(values)[-1]


def test_the_default_budget_is_at_most_512_mb() -> None:
    for kind, engine in product(get_args(DeviceKind), get_args(EngineOption)):
        options = Options(engine=engine).suited_to(kind)
        assert 0 < options.buffers * options.chunk_size <= options.staging <= 512_000_000


def test_sizes_that_were_left_open_suit_the_device() -> None:
    on_host, on_cuda = Options().suited_to("host"), Options().suited_to("cuda")
    assert on_host.chunk_size > on_cuda.chunk_size  # which takes several in one copy
    assert (on_host.buffers, on_cuda.buffers) == (2 * on_host.threads, 4 * on_cuda.threads)
    python = Options(engine="python")
    assert python.suited_to("host").chunk_size < python.suited_to("cuda").chunk_size
    assert Options(engine="python", staging=64 << 20).suited_to("cuda").buffers == 4
    given = Options(chunk_size=1 << 20, staging=2 << 20, threads=1, streams=1)
    assert given.suited_to("cuda") == given.suited_to("host") == given


def test_each_thread_of_the_native_engine_has_a_stream_and_a_buffer() -> None:
    options = Options(engine="native", chunk_size=1 << 20, staging=3 << 20, threads=8, streams=2).suited_to("cuda")
    assert (options.threads, options.streams, options.buffers) == (3, 3, 3)
    assert options.scratch == 3 << 20


def test_staging_that_holds_no_two_chunks_is_refused() -> None:
    with pytest.raises(OptionsError):
        Options(staging=1 << 20).suited_to("cuda")


def test_the_environment_sets_every_option() -> None:
    options = Options.from_env(
        {
            "ASYNCLOAD_CHUNK_SIZE": "64MiB",
            "ASYNCLOAD_STAGING": "256MiB",
            "ASYNCLOAD_THREADS": "3",
            "ASYNCLOAD_RETRY_DELAY": "0.5",
            "ASYNCLOAD_STRICT": "yes",
            "ASYNCLOAD_UNRELATED": "x",
        }
    )
    assert options == Options(chunk_size=64 << 20, staging=256 << 20, threads=3, retry_delay=0.5, strict=True)
    assert Options.from_env({}) == Options()


@pytest.mark.parametrize(("name", "text"), [("THREADS", "many"), ("CHUNK_SIZE", "big"), ("STRICT", "perhaps")])
def test_an_environment_variable_that_cannot_be_read_is_named(name: str, text: str) -> None:
    with pytest.raises(OptionsError, match=f"ASYNCLOAD_{name}") as caught:
        Options.from_env({f"ASYNCLOAD_{name}": text})
    assert caught.value.option == name.lower()
