"""Training steps of Hugging Face models: every arm has the same losses, and what has not has no speed."""

import json

import pytest
import torch

from bench import models
from bench.model_arms import ARMS, LINEARS, base_of, make
from bench.model_cases import CASES, CPU_CASES, SETTINGS, Case
from bench.model_report import markdown, merged
from bench.models import check, main
from bench.step_arms import factors
from bench.variants import FLOOR

pytestmark = pytest.mark.filterwarnings("default")  # the libraries warn of their own affairs
CPU, EAGER = torch.device("cpu"), SETTINGS["eager"]
CASE = CPU_CASES[0]


def arms_of(*names, setting=EAGER):
    base = base_of(CASE, CPU)
    return {name: make(base, CASE, setting, name) for name in names}


@pytest.mark.parametrize("setting", ["eager", "checkpointing"])
def test_arms_agree(setting):
    arms = arms_of(*ARMS, setting=SETTINGS[setting])
    for arm in arms.values():
        for _ in range(2):
            arm.step()
    check(arms, SETTINGS[setting])
    weights = [next(arm.model.parameters()) for arm in arms.values()]
    assert all(weight is weights[0] for weight in weights)  # all stand on one base
    for name, arm in arms.items():
        assert len(factors(arm.model)) == (0 if name == FLOOR else 14)


def test_an_arm_that_is_wrong_has_no_speed():
    arms = arms_of("peft", "replaced")
    for arm in arms.values():
        arm.step()
    check(arms, EAGER)
    arms["replaced"].losses[-1] *= 1.02
    with pytest.raises(AssertionError, match=r"replaced's loss is .*, peft's"):
        check(arms, EAGER)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_models_linears_are_adapted(case):
    """All that lie in its blocks."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(case.config)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.rpartition(".")[2] for name in linears if "layers." in name} <= set(LINEARS)


def run_of(commit="abc", **settings):
    arm = {"median": 1.0, "q1": 0.9, "q3": 1.1, "tokens_per_second": 50.0, "losses": [3.0, 2.5], "peak_bytes": 2**30}
    settings = {name: {key: dict(arm, tokens_per_second=rate) for key, rate in arms.items()}
                for name, arms in settings.items()}  # fmt: skip
    about = {"device": "A GPU", "dtype": "bfloat16", "versions": {}, "commit": commit, "date": "2026-01-01"}
    about |= {"command": f"of {','.join(settings)}", "settings": dict.fromkeys(settings)}
    return about | {"cases": [{"name": "A model, whole", "short": "A model", "settings": settings}]}


def test_the_table_compares_with_the_frozen_model():
    text = markdown(run_of(eager={FLOOR: 100.0, "replaced": 98.0}))
    assert "| **replace_linear**, adapters in bf16 | eager | 98 | 0.980 | 20.0% | 1.0 | 3.0000 | 2.5000 |" in text


def test_runs_of_one_commit_can_be_merged():
    runs = [run_of(eager={FLOOR: 100.0}), run_of(eager={"peft": 80.0})]
    (case,) = merged(runs)["cases"]
    assert case["settings"]["eager"].keys() == {FLOOR, "peft"}
    with pytest.raises(ValueError, match="one commit, got abc and def"):
        merged([runs[0], run_of("def", eager={FLOOR: 1.0})])


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--rounds", "1", "--arms", FLOOR, "replaced", "--settings", "eager", "--out", str(tmp_path)]
    assert main(options) == 0
    assert "### tiny's shapes, 2 layers, 2 x 16 tokens" in capsys.readouterr().out
    stored = json.loads((tmp_path / "models.json").read_text())
    assert stored["cases"][0]["settings"]["eager"]["replaced"]["tokens_per_second"] > 0
    for name in ("models.md", "models.png"):
        (tmp_path / name).unlink()
    assert main(["--redraw", str(tmp_path / "models.json")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"models.json", "models.md", "models.png"}
    assert isinstance(models.CPU_CASES[0], Case)
