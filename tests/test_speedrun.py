"""tools/speedrun.py: three seeds of a script against a fixed target, in turn with a yardstick."""

import json
import math
import sys

import common
import pytest
import reproduce
import speedrun

SCRIPT = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("seed", "out_dir", "data", "bits", "sleep"):
    parser.add_argument(f"--{name}", type=str if name in ("out_dir", "data") else float, default=0)
flags = parser.parse_args()
if flags.seed == 2 and flags.bits > 5:
    sys.exit("error: no such thing")
time.sleep(flags.sleep)
folder = pathlib.Path(flags.out_dir)
folder.mkdir(parents=True, exist_ok=True)
metrics = {"bits_per_char": flags.bits + flags.seed / 1e6, "params": 7, "steps": 3}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script that does nothing but sleep and claim a loss; the yardstick is another such."""
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    (tmp_path / speedrun.YARDSTICK).write_text(SCRIPT)
    monkeypatch.setattr(speedrun, "ROOT", tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.json")
    return path


def race(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *map(str, args)])
    speedrun.main()


def test_a_record_is_three_seeds_below_the_target(script, monkeypatch, capsys):
    race(monkeypatch, "--record", "mine", script, "--bits=2.118", "--sleep=0.3")  # with seed 1337: 2.1193
    record = json.loads(common.RESULTS.read_text())["speedrun"]["mine"]
    assert record["loss"]["most"] == pytest.approx(2.119337 * math.log(2)) and 2.1203 * math.log(2) > 1.4696
    assert len(record["seconds"]["values"]) == 3 and record["seconds"]["least"] > 0.3
    assert record["share"] > 1 and record["params"] == 7
    assert capsys.readouterr().out.count("reached") == 3


def test_one_seed_above_the_target_is_no_record(script, monkeypatch):
    with pytest.raises(SystemExit, match="no record"):
        race(monkeypatch, "--record", "mine", script, "--bits=2.1199")  # 1337 of a millionth more: 2.1212
    assert not common.RESULTS.exists()


def test_without_a_name_nothing_is_kept(script, monkeypatch):
    race(monkeypatch, script, "--bits=2")
    assert not common.RESULTS.exists()


def test_a_script_that_fails_is_named_with_its_last_words(script, monkeypatch):
    with pytest.raises(SystemExit, match=r"mine\.py with seed 2 failed: error: no such thing"):
        race(monkeypatch, script, "--bits=6")
    with pytest.raises(SystemExit, match="name a script"):
        race(monkeypatch, "nowhere.py")
    with pytest.raises(SystemExit, match="name a script"):
        race(monkeypatch)


def test_the_table_of_records_begins_with_the_slowest():
    def record(share):
        seconds, loss = {"mean": 61.4, "least": 60, "most": 62.7}, {"least": 1.4, "most": 1.4698}
        run = {"script": "mine.py", "flags": ["--a=1", "--b"], "params": 1200, "steps": 3000}
        return run | {"seconds": seconds, "loss": loss, "share": share}

    rows = reproduce.records_table({"speedrun": {"new": record(0.24), "old": record(2.5)}}).split("\n")[2:]
    assert rows[0].startswith("| old |") and rows[0].endswith("| 2.50 |")
    expected = "| new | `mine.py --a=1 --b` | 1,200 | 3,000 | 1.4000 to 1.4698 | 61 (60 to 63) | 0.24 |"
    assert rows[1] == expected and len(rows) == 2
