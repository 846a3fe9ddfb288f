"""The loop: every task learns what it would alone, whatever happens to the others."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora import adapter_parameters, add_adapter, load_adapter, route
from fused_lora.modules.protocol import is_bank
from fused_lora.tasks import Task, TaskTrainer, next_token_losses
from fused_lora.tasks.batches import collate, tokens_of
from tests.tasks.problem import Alone, base, config, factors, layers, near, sequences, tasks


def trainer_of(model, *each, **options):
    trainer = TaskTrainer(model, progress=False, **options)
    for task in each:
        trainer.add(task)
    return trainer


def alone(model, task):
    """To be asked for before the first step."""
    return Alone(task, factors(model, task.name), layers(model, task.name))


def run(trainer):
    """Every task's steps."""
    done = {}
    while trainer.running:
        for name, step in trainer.step().items():
            done.setdefault(name, []).append(step)
    return done


def assert_as_alone(model, single, steps):
    assert near(factors(model, single.task.name), single.factors)
    assert [step.step for step in steps] == list(range(1, single.task.steps + 1))
    assert [step.loss for step in steps] == pytest.approx(single.losses, rel=1e-11)
    assert [step.grad_norm for step in steps] == pytest.approx(single.norms, rel=1e-10)
    assert [step.lr for step in steps] == pytest.approx(single.rates)


def test_every_task_learns_what_it_would_alone():
    """Lengths, ranks, layers, batches, accumulation, clipping, decay, warm-up and schedule are all their own."""
    model = base()
    trainer = trainer_of(model, *tasks().values())
    singles = {name: alone(model, task).run() for name, task in tasks().items()}
    done = run(trainer)
    for name, single in singles.items():
        assert_as_alone(model, single, done[name])
        assert any(norm > 0.05 for norm in single.norms)  # so that b is clipped
    assert trainer.ended == ["a", "b", "c"]
    tokens = sum(item["labels"][1:].ne(-100).sum().item() for item in map(tasks()["b"].data.__getitem__, (0, 1, 2)))
    assert sum(step.tokens for step in done["b"][:3]) == 2 * tokens  # two epochs of three in steps of two


def test_the_order_of_adding_is_none_of_the_results():
    found = []
    for names in ("abc", "cba"):
        model = base()
        run(trainer_of(model, *(tasks()[name] for name in names)))
        found.append([factors(model, name) for name in "abc"])
    for first, second in zip(*found, strict=True):
        assert near(first, second)


def gradients(dtype, each):
    """Of the first pass, from factors of which none is zero."""
    trainer = trainer_of(base(dtype), *each)
    for name in trainer.running:
        generator = torch.Generator().manual_seed(ord(name))
        with torch.no_grad():
            for factor in adapter_parameters(trainer.model, name):
                factor.copy_(0.2 * torch.randn(factor.shape, generator=generator, dtype=torch.float64))
    return {job.task.name: grads for job, grads, *_ in trainer._computed([*trainer._jobs.values()])}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_together_are_those_alone_bit_for_bit(dtype):
    """Of other lengths and ranks, where layers are the same, and rows so few that a product adds them in one go."""
    lengths = {"a": 5, "b": 40, "c": 33}
    each = [Task(name, sequences(T, [T]), config(3 + T % 7), 1, 1.0) for name, T in lengths.items()]
    together = gradients(dtype, each)
    for task in each:
        assert all(map(torch.equal, together[task.name], gradients(dtype, [task])[task.name]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_together_are_those_alone_within_rounding(dtype):
    """Of other layers too: as far from what is exact, up to the luck of few numbers."""
    each = list(tasks(accumulate=1).values())
    together, exact = gradients(dtype, each), gradients(torch.float64, each)
    for task in each:
        apart = gradients(dtype, [task])[task.name]
        for grad, other, want in zip(together[task.name], apart, exact[task.name], strict=True):
            slack = 8 * torch.finfo(dtype).eps * want.abs().max()
            assert (grad - want).abs().max() <= 2 * (other - want).abs().max() + slack


def test_a_step_of_one_leaves_the_others_alone():
    """Neither their bits, nor what their optimizers keep, nor decay."""
    model = base()
    trainer = trainer_of(model, *tasks(weight_decay=0.5).values())
    trainer.step()
    trainer.step()
    before = copy.deepcopy({name: (factors(model, name), trainer._jobs[name].optimizer.state_dict()) for name in "abc"})
    assert sorted(trainer.step()) == ["a", "c"]  # b has done one of its two passes
    moments = [state["exp_avg"] for state in trainer._jobs["b"].optimizer.state.values()]
    assert all(map(torch.equal, factors(model, "b"), before["b"][0]))
    assert all(map(torch.equal, moments, (each["exp_avg"] for each in before["b"][1]["state"].values())))
    for name in "ac":
        assert not any(map(torch.equal, factors(model, name), before[name][0]))


def test_first_values_are_of_the_seed():
    """And the generator of the process goes on as if nobody had drawn."""
    model = base()
    state = torch.get_rng_state()
    trainer_of(model, *tasks().values())
    assert torch.equal(torch.get_rng_state(), state)
    single = base()
    trainer_of(single, tasks()["c"])
    assert all(map(torch.equal, factors(single, "c"), factors(model, "c")))
    twin = base()
    trainer_of(twin, tasks(seed=9)["c"])
    assert not torch.equal(factors(twin, "c")[0], factors(model, "c")[0])


def test_tasks_join_and_end(tmp_path):
    model, all_of = base(), tasks()
    trainer = trainer_of(model, all_of["c"], folder=tmp_path, keep_adapters=False)
    singles, done = {"c": alone(model, all_of["c"]).run()}, {"a": [], "b": [], "c": []}
    for passes in range(12):
        if passes == 3:
            trainer.add(all_of["b"])
            singles["b"] = alone(model, all_of["b"]).run()
        if passes == 5:
            trainer.add(all_of["a"])
            singles["a"] = alone(model, all_of["a"]).run()
        for name, step in trainer.step().items():
            done[name].append(step)
        if passes == 8:
            assert trainer.running == ["a", "b"]
            assert trainer.ended == ["c"]
    assert trainer.ended == ["c", "b", "a"]
    assert not any(bank.adapters for bank in model.modules() if is_bank(bank))
    for name, single in singles.items():
        fresh = base()
        load_adapter(fresh, tmp_path / "adapters" / name, name)
        assert_as_alone(fresh, single, done[name])


def test_one_is_removed():
    model = base()
    trainer = trainer_of(model, *tasks().values())
    single = alone(model, tasks()["c"]).run()
    trainer.step()
    trainer.remove("a")
    left = factors(model, "a")
    run(trainer)
    assert all(map(torch.equal, factors(model, "a"), left))
    assert near(factors(model, "c"), single.factors)
    with pytest.raises(ValueError, match=r"name must be a running task \(there is none\), got 'a'"):
        trainer.remove("a")


def test_layers_that_come_between_passes():
    """Of a task that never ran, and of what is no task."""
    model, each = base(), tasks(batch_size=3)
    trainer = trainer_of(model, each["b"])
    single = alone(model, each["b"]).run()
    trainer.step()
    trainer.add(Task("x", each["a"].data, config(4, ["v_proj"]), 1, 1.0))
    trainer.remove("x")
    trainer.step()
    add_adapter(model, "own", config=config(4))
    run(trainer)
    assert near(factors(model, "b"), single.factors)


MARK = 60  # the first token of what one task's loss makes much of


def marked(task, numbers):
    """The task, whose sequences of these numbers are marked."""
    data = [dict(item) for item in task.data]
    for number, item in enumerate(data):
        first = MARK if number in numbers else 0
        item["input_ids"] = torch.cat([torch.tensor([first]), item["input_ids"][1:]])
    return Task(**{**vars(task), "data": data})


def times(factor):
    def loss(model, batch):
        return next_token_losses(model, batch) * torch.where(batch.input_ids[:, 0] == MARK, factor, 1.0)

    return loss


def test_a_huge_gradient_of_one_is_clipped_alone():
    model, each = base(), tasks()
    a, c = marked(each["a"], range(5)), marked(Task(**{**vars(each["c"]), "max_grad_norm": 1.0}), [])
    trainer = trainer_of(model, a, c, loss=times(1e9))
    single = alone(model, c).run()
    done = run(trainer)
    assert min(step.grad_norm for step in done["a"]) > 1e6
    assert_as_alone(model, single, done["c"])


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_is_skipped_and_spoils_nobody(factor, capsys):
    """Nor the steps before and after it, where only one of a's sequences is such."""
    model, each = base(), tasks()
    each["a"] = marked(each["a"], [2])
    each |= {name: marked(each[name], []) for name in "bc"}
    trainer = TaskTrainer(model, loss=times(factor))
    for task in each.values():
        trainer.add(task)
    singles = {name: alone(model, each[name]) for name in "abc"}
    bad = {step for step in range(7) if 2 in each["a"].numbers(step)}
    assert 0 < len(bad) < 7
    done = run(trainer)
    for name in "bc":
        assert_as_alone(model, singles[name].run(), done[name])
    assert {step.step - 1 for step in done["a"] if step.skipped} == bad
    assert near(factors(model, "a"), singles["a"].run(skipped=bad).factors)
    said = capsys.readouterr().err
    assert said.count("is skipped: loss") == len(bad)
    assert f"a: step {min(bad) + 1} is skipped" in said


def test_no_number_in_one_pass_of_a_step():
    """Passes of the step that follow are whole."""
    model, each = base(), tasks()
    b, c = marked(each["b"], [0]), marked(each["c"], [])
    calls = []
    trainer = trainer_of(model, b, c, loss=lambda *args: (calls.append(1), times(float("nan"))(*args))[1])
    bad = {step for step in range(4) if 0 in b.numbers(step)}
    single, other = alone(model, b).run(skipped=bad), alone(model, c).run()
    done = run(trainer)
    assert 0 < len(bad) < 4
    assert near(factors(model, "b"), single.factors)
    assert_as_alone(model, other, done["c"])
    passes = sum(b.numbers(step).count(0) for step in range(4))
    assert len(calls) == 9 + 2 * passes  # one more for each of two halves, of those passes alone


def test_a_step_without_labelled_tokens_is_skipped():
    data = [{"input_ids": torch.arange(5), "labels": torch.full((5,), -100)}]
    model = base()
    trainer = trainer_of(model, Task("n", data, config(2), 2, 1e-2, weight_decay=1.0), tasks()["c"])
    before = factors(model, "n")
    done = run(trainer)
    assert all(step.skipped and step.tokens == 0 for step in done["n"])
    assert all(map(torch.equal, factors(model, "n"), before))
    assert not any(step.skipped for step in done["c"])


def test_batches_are_padded_at_their_ends():
    each = [tokens_of(item, "x") for item in ([1, 2, 3], {"input_ids": list(range(17)), "labels": [-100] * 16 + [5]})]
    batch = collate(each, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 2, 3] + [0] * 29, [*range(17)] + [0] * 15]
    assert batch.labels.tolist() == [[1, 2, 3] + [-100] * 29, [-100] * 16 + [5] + [-100] * 15]
    assert batch.attention_mask.sum(1).tolist() == [3, 17]
    assert [one.labelled for one in each] == [2, 1]
    assert collate([tokens_of(list(range(16)), "x")] * 2, torch.device("cpu")).attention_mask is None


def test_a_model_that_takes_a_mask_gets_it():
    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            self.mask = attention_mask
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))

    model, batch = Model(), collate([tokens_of([1, 2, 3], "x"), tokens_of([1, 2], "x")], torch.device("cpu"))
    assert next_token_losses(model, batch).tolist() == pytest.approx([2 * math.log(4), math.log(4)])
    assert torch.equal(model.mask, batch.attention_mask)


def hugging_face():
    torch.manual_seed(0)
    sizes = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(sizes).double()


def test_a_model_of_hugging_face():
    """By its own losses, one sequence after another without padding."""
    model, twin, each = hugging_face(), hugging_face(), tasks(max_grad_norm=None, steps=1, warmup=0)
    trainer = trainer_of(model, *each.values())
    trainer_of(twin, *each.values())
    done = run(trainer)
    for name, task in each.items():
        items = [task.data[number] for number in task.numbers(0)]
        counts = [item["labels"][1:].ne(-100).sum().item() for item in items]
        with route(twin, name):
            losses = [twin(item["input_ids"][None], labels=item["labels"][None]).loss for item in items]
        loss = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        parameters = adapter_parameters(twin, name)
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        assert done[name][0].loss == pytest.approx(loss.item(), rel=1e-6)  # its loss is of float32
        assert done[name][0].grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_the_base_is_frozen_and_stays_what_it_is():
    torch.manual_seed(0)
    model = base().requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    run(trainer_of(model, *tasks(weight_decay=0.5).values()))
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_bars(capsys):
    trainer = TaskTrainer(base())
    for task in tasks(steps=2).values():
        trainer.add(task)
    trainer.run()
    said = capsys.readouterr().err
    assert "a: 2 of 2 steps" in said
    assert "b:   0%" in said


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda trainer: trainer.add("x"), TypeError, "task must be a Task, got str"),
    (lambda trainer: trainer.add(tasks()["a"]), ValueError, "name must be new, got 'a'"),
    (lambda trainer: trainer.add(Task("x", [torch.ones(3)], config(2), 1, 1.0)), ValueError,
     "x, sequence 0: input_ids must be at least two ints in a row"),
    (lambda trainer: trainer.add(Task("x", [{"labels": [1]}], config(2), 1, 1.0)), ValueError,
     "x, sequence 0: input_ids must be there, got labels"),
    (lambda trainer: trainer.add(Task("x", [[1]], config(2), 1, 1.0)), ValueError, "at least two ints in a row"),
    (lambda trainer: trainer.add(Task("x", [{"input_ids": [1, 2], "labels": [1, 2, 3]}], config(2), 1, 1.0)),
     ValueError, "labels must be as many as input_ids, got 3 and 2"),
    (lambda trainer: trainer.add(Task("x", [[1, 2]], config(2) | {"use_dora": True}, 1, 1.0)), ValueError,
     "what banks do not serve: use_dora=True"),
    (lambda trainer: trainer.remove("x"), ValueError, r"name must be a running task \(a, b, c\), got 'x'"),
    (lambda trainer: trainer.save(), RuntimeError, "cannot save: there is no folder"),
    (lambda trainer: TaskTrainer(trainer.model, save_every=0), ValueError, "save_every must be at least 1, got 0"),
    (lambda trainer: TaskTrainer(trainer.model, resume=True), ValueError, "folder must be given to resume"),
])  # fmt: skip
def test_errors(call, error, words):
    model = base()
    trainer = trainer_of(model, *tasks().values())
    singles = {name: alone(model, task).run() for name, task in tasks().items()}
    with pytest.raises(error, match=words):
        call(trainer)
    done = run(trainer)
    for name, single in singles.items():
        assert_as_alone(model, single, done[name])


def test_steps_without_tasks_and_losses_of_another_shape():
    with pytest.raises(RuntimeError, match="no task runs: add one"):
        TaskTrainer(base()).step()
    trainer = trainer_of(base(), tasks()["a"], loss=lambda model, batch: next_token_losses(model, batch).sum())
    with pytest.raises(ValueError, match=r"loss must give one number for each of 2 sequences, got \(\)"):
        trainer.step()


def test_data_that_fails_leaves_every_task_where_it_was():
    """And the next pass goes on."""

    class Failing(list):
        fails = False

        def __getitem__(self, number):
            if self.fails:
                raise OSError("the disk is away")
            return super().__getitem__(number)

    model, each = base(), tasks()
    each["c"] = Task(**{**vars(each["c"]), "data": Failing(each["c"].data)})
    trainer = trainer_of(model, *each.values())
    singles = {name: alone(model, task).run() for name, task in each.items()}
    each["c"].data.fails = True
    with pytest.raises(OSError, match="the disk is away"):
        trainer.step()
    each["c"].data.fails = False
    done = run(trainer)
    for name, single in singles.items():
        assert_as_alone(model, single, done[name])
