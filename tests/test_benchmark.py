"""The benchmark's command prints a row a case."""

import time

import jax
import pytest

from jax_flash.benchmark import split
from jax_flash.benchmark.__main__ import main
from jax_flash.benchmark.timing import take_turns


def test_a_row_for_every_case(capsys):
    main(["--head-dims", "16", "--lengths", "32,64", "--tokens", "64", "--hidden", "32", "--budget", "0.001"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].split() for row in rows] == [["16", c, n] for c in ("False", "True") for n in ("32", "64")]
    assert all(float(figure) > 0 for row in rows for part in row[1:] for figure in part.split())


def test_the_slower_function_takes_longer():
    times = take_turns(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}, (), budget=0.02, rounds=3
    )
    assert times["long"] > times["short"]


@pytest.mark.usefixtures("quick_compilation")
def test_split_sequences_beside_one_device(capsys):
    split.main(["--lengths", "128", "--heads", "8", "--kv-heads", "8", "--head-dim", "8", "--budget", "0.001"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    names = [row[0].strip().split(maxsplit=1) for row in rows]
    assert names[0] == [str(128 // len(jax.devices())), "one device"]
    of_all = [
        f"{name} {layout}" for name in ("ring", "all_to_all", "all_gather") for layout in ("contiguous", "zigzag")
    ]
    assert names[1:] == [["128", name] for name in of_all]
    assert all(float(figure) > 0 for row in rows for part in row[1:] for figure in part.split())
