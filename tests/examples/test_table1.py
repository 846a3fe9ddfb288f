"""The table of the paper's first: which runs it makes, and what it says of those that do not come to an end."""

import pytest

from examples import table1
from fused_lora.pretrain.__main__ import DIVERGED, options_of, parse


def test_every_row_is_a_run_that_can_be_made():
    for _, flags, _ in table1.ROWS:
        options_of(parse(["--preset", "small", *flags.split()]))
    assert len({name for name, _, _ in table1.ROWS}) == len(table1.ROWS) == 10


@pytest.fixture
def runs(monkeypatch):
    """Instead of trainings: the first row diverges, the second fails, and the others end at some perplexity."""
    seen = []

    def run(row, seed, common, output, gpus):
        seen.append((row[0], seed, common))
        folder = table1.folder_of(output, row[0], seed)
        folder.mkdir(parents=True)
        (folder / "run.log").write_text("loss 3, held-out perplexity 457.04\nerror: no memory\n")
        (folder / "held_out.csv").write_text(f"step,tokens,loss,perplexity\n10,10,3.0,{20 + seed}\n")
        return {"regular training": DIVERGED, "all four": 1}.get(row[0], 0)

    monkeypatch.setattr(table1, "_run", run)
    return seen


def test_the_table(runs, tmp_path, capsys):
    assert table1.main(["--data", "tokens", "--output", str(tmp_path), "--", "--compile"]) == 1
    assert len(runs) == 20
    assert runs[0][2] == ["--preset", "small", "--compile", "--data", "tokens"]
    printed = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines() if "|" in line][2:]
    assert rows[0] == ["regular training", "diverged", "diverged", "-", "23.65"]
    assert rows[1][1:4] == ["-", "-", "-"]
    assert rows[2] == ["warm start only", "20.00", "21.00", "20.50", "25.46"]
    assert "all four, seed 0: error: no memory" in printed.err
    assert (tmp_path / "table.md").read_text() in printed.out
    assert (tmp_path / "curves.png").exists()


def test_some_rows_at_rates_of_their_own(runs, tmp_path, capsys):
    wanted = ["warm start only", "all four, and Adam's step is reset"]
    options = ["--rows", *wanted[::-1], "--lr", "1e-3", "2e-3", "--seeds", "1"]
    assert table1.main(["--data", "tokens", "--output", str(tmp_path), *options]) == 0
    names = [f"{name}, {rate}" for rate in (0.001, 0.002) for name in wanted]
    assert [(name, seed) for name, seed, _ in runs] == [(name, 1) for name in names]
    table = (tmp_path / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == names
    assert table.splitlines()[0] == "| ingredients | seed 1 | mean | paper, 130M |"
    assert len({table1.folder_of(tmp_path, name, 1) for name in names}) == 4
    assert table in capsys.readouterr().out


def test_a_rate_is_of_the_low_rank_phase():
    for name, flags, _ in table1.rows_of(["all four", "warm start only"], [2e-3]):
        options = options_of(parse(["--preset", "small", *flags.split()]))
        assert (options.preset.learning_rate, options.preset.relora_learning_rate) == (1e-3, 2e-3), name
        assert options.published


def test_a_row_that_is_none(capsys):
    with pytest.raises(SystemExit):
        table1.main(["--rows", "all five"])
    assert "argument --rows: invalid choice: 'all five'" in capsys.readouterr().err


def test_only_the_users_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert table1.visible_gpus() == ["4", "5"]
