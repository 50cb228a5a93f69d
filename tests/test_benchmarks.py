"""benchmarks/: turns, ratios and fresh processes measure what they say; every row runs, on small work."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from benchmarks import __main__ as command
from benchmarks import embedded, loss, measure, real
from benchmarks.measure import Row, Spread

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def test_contestants_take_turns_and_the_warm_up_is_not_counted():
    order = []
    seconds = measure.in_turns({name: lambda n=name: order.append(n) for name in "abc"}, rounds=3, warmups=1)
    assert {name: len(some) for name, some in seconds.items()} == dict.fromkeys("abc", 3)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({one[0] for one in rounds[1:]}) == 3


def test_seconds_are_those_of_the_call():
    seconds = measure.in_turns({"quick": lambda: None, "slow": lambda: time.sleep(0.05)}, rounds=2)
    assert min(seconds["slow"]) >= 0.05 and len(seconds["quick"]) == 2


def test_ratios_are_taken_round_by_round():
    assert measure.ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == Spread(3.0, 2.0, 4.0)


def test_a_fresh_process_reports_its_own_peak_and_time():
    used = {size: measure.fresh("import json, sys\nx = bytearray(int(sys.argv[1]))\nprint(json.dumps(len(x)))", size)
            for size in ("1", "300000000")}  # fmt: skip
    assert {one.printed for one in used.values()} == {1, 300_000_000}
    assert used["300000000"].peak - used["1"].peak == pytest.approx(3e8, rel=0.1)
    assert all(one.seconds > 0.05 for one in used.values())
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measure.fresh("1 / 0")


def test_bandwidth_is_bytes_a_second():
    assert 1e8 < measure.read_bandwidth(size=2**26, rounds=2) < 1e13


def test_exponents_of_known_laws():
    x = [1, 2, 4, 8]
    assert embedded.exponent(x, [3 * n**2 for n in x]) == pytest.approx(2)
    assert embedded.exponent(x, [5 / n for n in x]) == pytest.approx(-1)


def test_a_race_of_different_answers_does_not_count():
    embedded.check_equal({"a": [1, 2], "b": [1, 2]})
    with pytest.raises(AssertionError, match="answer differently"):
        embedded.check_equal({"a": [1, 2], "b": [1, 3]})


def test_growth_measures_and_draws(tmp_path):
    row, points = embedded.growth(rounds=1, most_tokens=128, most_rows=2)
    assert points["tokens"] == [64, 128] and points["rows"] == [1, 2]
    assert points["bytes"] == [2 * 4 * 48 * 4 * n for n in (64, 128)]  # keys and values, layers, width, bytes
    assert points["seconds"][0] < points["seconds"][1]
    assert [row.measured[name].median for name in row.measured if "bytes" in name] == pytest.approx([1, 1])
    embedded.draw_growth(points, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_training_step_races_equal_losses():
    row = embedded.training_step(rounds=1)
    assert set(row.measured) == {"minivlm", "transformers"} and row.ratios["minivlm"].median > 0


def test_cold_starts_give_one_caption():
    row = embedded.cold_start(rounds=1)
    assert row.ratios["minivlm, time"].median == pytest.approx(
        row.measured["minivlm"].median / row.measured["transformers"].median
    )


def test_sigmoid_rows_say_who_is_absent():
    seconds, peak = loss.sigmoid_loss(1, None, pairs=4096)
    assert "absent" in seconds.measured["open_clip"] and set(peak.ratios) == {"chunked to dense, peak"}
    assert peak.ratios["chunked to dense, peak"].median < 1


def test_real_size_rows_on_a_tiny_size(tmp_path, monkeypatch):
    config = tiny_config(1)
    config.image_token_index = 100
    monkeypatch.setattr(real, "config_of", lambda image_size: config)
    monkeypatch.setattr(real, "CAPTION_EN", (21, 65))
    monkeypatch.setattr(real, "read_bandwidth", lambda device: measure.read_bandwidth(device, size=2**24, rounds=1))
    rows = real.on_cpu(tmp_path, None, rounds=1, compiled=False)
    assert "absent" in rows[2].measured["hkproj"] and len(rows) == 4
    decoder = real.ours_on(tmp_path / "random-3b-224", "cpu").language_model
    weights = 2 * sum(weight.numel() for weight in decoder.parameters())
    assert real.per_token_bytes(torch.nn.ModuleDict({"language_model": decoder}), 0) == weights


def test_the_command_writes_table_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(embedded, "cold_start", lambda rounds: Row("a start", "s", {"ours": Spread(1, 1, rounds)}))
    command.main(["--only", "start", "--rounds", "3", "--json", str(tmp_path / "new" / "out.json")])
    assert "| a start | ours: 1 (1…3) s |  |  |" in capsys.readouterr().out
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["machine"]["torch"] == torch.__version__ and written["rows"][0]["measured"]["ours"]["maximum"] == 3


@pytest.mark.parametrize("option", [["--hkproj", "/nowhere"], ["--open-clip", "/nowhere"], ["--rounds", "0"]])
def test_bad_options_are_named(option, capsys):
    with pytest.raises(SystemExit):
        command.main(option)
    assert option[1] in capsys.readouterr().err


def test_a_fresh_process_for_theirs_imports_nothing_of_ours():
    code = "import sys; from benchmarks import theirs; print([m for m in sys.modules if m.startswith('minivlm')])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
