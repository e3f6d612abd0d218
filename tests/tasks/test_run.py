"""Models on tasks: they learn what they can, alone and in two processes, by the command too."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import gradkernels as gk
from gradkernels.__main__ import main
from gradkernels.arguments import INITS
from gradkernels.tasks import adding, copy_memory, subject_verb
from gradkernels.tasks.model import BODIES, SequenceModel
from gradkernels.tasks.run import make, train

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("body", [*BODIES, "lstm", "gru_reset_before", "rnn_tanh"])
@pytest.mark.parametrize(
    "task", [copy_memory(3, 4, 2), adding(3, 6), subject_verb(3, 2)], ids=lambda t: type(t).__name__
)
def test_every_body_reads_every_task(task, body):
    model = SequenceModel(task, body, hidden=6)
    inputs, targets = next(task.batches())
    out = model(inputs)
    assert out.shape == (task.steps, 3, task.outputs)
    task.loss(out, targets).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("body", BODIES)
def test_bodies_are_causal(body):
    """What comes later changes nothing."""
    task = copy_memory(2, 4, 2)
    model, (inputs, _) = SequenceModel(task, body, hidden=8).eval(), next(task.batches())
    changed = inputs.clone()
    changed[5:] = 3
    torch.testing.assert_close(model(changed)[:5], model(inputs)[:5])


@pytest.mark.parametrize("init", INITS)
def test_initial_weights(init):
    torch.manual_seed(0)
    plain = make(copy_memory(2, 20), "lstm", 8, "default")
    torch.manual_seed(0)
    changed = make(copy_memory(2, 20), "lstm", 8, init)
    same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), changed.parameters()))
    assert same == (init == "default")


def test_what_cannot_be_made():
    with pytest.raises(ValueError, match="unknown body 'lstn'"):
        make(adding(), "lstn", 8, "default")
    with pytest.raises(ValueError, match="unknown initialisation 'xavier'; there are default"):
        make(adding(), "lstm", 8, "xavier")
    with pytest.raises(ValueError, match="initialisation chrono is for recurrent cells, not for attention"):
        make(adding(), "attention", 8, "chrono")


@pytest.mark.slow
def test_a_gated_cell_learns_what_a_plain_one_does_not():
    """The numbers of 30 steps ago, added."""
    task, right = adding(32, 30), {}
    for body in ("gru", "rnn_tanh"):
        torch.manual_seed(0)
        right[body] = train(task, make(task, body, 32, "default"), 500, 5e-3)
    assert right["gru"].right > 0.8 and right["rnn_tanh"].right < 0.6
    assert right["gru"].loss < 0.1 * task.trivial


def test_results():
    task = adding(4, 5)
    model, seen = make(task, "gru", 4, "default"), []
    with gk.flow.watch(model) as monitor:
        found = train(task, model, 20, each=lambda *v: seen.append(v))
    assert len(monitor.history) == 20
    assert [step for step, _, _ in seen] == list(range(20)) and found.steps == 20 and found.trivial == 1 / 6
    assert found.loss == pytest.approx((seen[18][1] + seen[19][1]) / 2)
    assert found.horizon == monitor.horizon() and found.solved_at is None  # the loss is of the last output alone
    assert json.loads(json.dumps(found.as_dict()))["trivial"] == 1 / 6


def test_the_horizon_is_that_of_the_last_output():
    """Copying is judged at every step, so that the loss itself reaches all of them."""
    torch.manual_seed(0)
    task = copy_memory(4, 60, 5)
    assert train(task, make(task, "lstm", 16, "default"), 2).horizon < 20
    assert train(task, make(task, "lstm", 16, "chrono"), 2).horizon > 60
    assert train(task, make(task, "attention", 16, "default"), 2).horizon is None


def test_command(capsys, tmp_path):
    page = tmp_path / "flow.html"
    arguments = ["tasks", "copy", "--cell", "gru", "--delay", "3", "--items", "2", "--steps", "12", "--hidden", "4"]
    assert main([*arguments, "--json", "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["cell"] == "gru" and found["steps"] == 12 and "12/12" in err and "<html" in page.read_text()
    assert found["alerts"] == []
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "remembering nothing" in out and "of the last answer's gradient gets 6 of 6 steps back" in out


def test_alerts_are_said_in_the_end(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["tasks", "adding", "--cell", "rnn_tanh", "--hidden", "8", "--steps", "120"]) == 0
    out, err = capsys.readouterr()
    assert "\n\nVanishing: body.l0, step 100, time step" in out and "Vanishing" not in err and out.endswith(".\n")


def test_command_used_wrongly(capsys):
    assert main(["tasks", "copy", "--cell", "attention", "--init", "chrono"]) == 2
    assert "for recurrent cells, not for attention" in capsys.readouterr().err
    assert main(["tasks", "adding", "--delay", "1"]) == 2
    assert "delay must be at least 2, got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tasks", "copy", "--steps", "0"])
    assert "--steps: must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes():
    """torchrun: both train, one speaks, and their weights stay the same (DistributedDataParallel checks shapes, the seed the rest)."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "gradkernels",
    ]
    command += ["tasks", "adding", "--cell", "gru", "--delay", "6", "--steps", "30", "--hidden", "8", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.strip().splitlines()
    found = json.loads(line)
    assert found["task"] == "adding" and found["steps"] == 30 and found["horizon"] is not None


def test_a_page_that_cannot_be_written_is_refused_before_the_training(capsys):
    assert main(["tasks", "copy", "--steps", "1000000", "--html", "/no/such/folder/x.html"]) == 2
    assert capsys.readouterr().err == "--html: there is no folder /no/such/folder\n"
