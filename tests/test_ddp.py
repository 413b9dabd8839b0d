"""Several processes on one machine, over gloo: the same run as with one, killed or not.

Most runs read the same shards with the same four lanes. On --device cuda, all share one GPU.
"""

import signal

import pytest

import train
from eval import read_jsonl
from tests.conftest import make_shards, run_python, train_flags
from tests.die import launch
from tests.test_train import assert_same, metrics, refused, state

TWENTY = ("--samples", "160", "--save-every", "6", "--lanes", "4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, device):
    """Shards, and runs of 20 steps on them by one process and by two, which nothing interrupted."""
    if device.type == "mps":
        pytest.skip("gloo has no MPS")
    folder = tmp_path_factory.mktemp("whole")
    shards = make_shards(folder / "shards")
    train.main(train_flags(shards, folder / "one", *TWENTY, "--workers", "0"))
    two = launch(train_flags(shards, folder / "two", *TWENTY, "--workers", "2"), world=2)
    assert two.codes == [0, 0], two.said
    return folder


def losses(run, key="loss"):
    return [line[key] for line in metrics(run)]


def assert_same_run(run, other):
    """The same losses to 1e-5 after 20 steps, gradients of the same norm, and the same counts."""
    assert len(losses(run)) == 20
    assert losses(run) == pytest.approx(losses(other), rel=0, abs=1e-5)
    assert losses(run, "grad_norm") == pytest.approx(losses(other, "grad_norm"), rel=1e-4)
    assert_same(state(run)["idf"], state(other)["idf"])
    assert state(run)["idf"]["n"] == 160


# ------------------------------------------------------------------------------------------------
# Any split is the same run.


def test_two_processes_of_two_workers_are_one_process_without(whole):
    assert_same_run(whole / "two", whole / "one")
    assert [key for key in state(whole / "two")["model"] if "module" in key] == []


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 2)])
def test_processes_workers_and_micro_batches_are_the_same_run(whole, tmp_path, world, workers):
    flags = train_flags(whole / "shards", tmp_path / "run", *TWENTY, "--micro-batch", "2")
    ended = launch([*flags, "--workers", str(workers)], world)
    assert ended.codes == [0] * world, ended.said
    assert_same_run(tmp_path / "run", whole / "one")


def test_a_split_that_does_not_divide_the_lanes_is_refused(capsys, whole, tmp_path):
    flags = train_flags(whole / "shards", tmp_path / "run", *TWENTY, "--workers", "3")
    fitting = "do not divide the run's 4 lanes: their product may be 1, 2, 4"
    assert f"1 processes x 3 workers {fitting}" in refused(capsys, *flags)
    assert not (tmp_path / "run").exists()
    error = refused(capsys, "--out", whole / "one", "--resume", "--workers", "8")
    assert f"1 processes x 8 workers {fitting}" in error


def test_lanes_are_the_readers_of_the_first_start(capsys, whole, tmp_path):
    flags = ["--samples", "8", "--workers", "3"]
    train.main(train_flags(whole / "shards", tmp_path / "run", *flags))
    assert len(state(tmp_path / "run")["progress"]["lanes"]) == 3
    error = refused(capsys, "--out", tmp_path / "run", "--resume", "--workers", "2")
    assert "1 processes x 2 workers do not divide the run's 3 lanes" in error


@pytest.mark.parametrize("objective", ["clip", "siglip", "superclip", "two_way", "cap"])
def test_four_images_here_and_four_there_are_eight_in_one_place(pairs, tmp_path, objective, device):
    """Most of these compare all images of a batch; the first process also evaluates alone."""
    flags = ["--loss" if objective == "two_way" else "--objective", objective]
    flags += ["--samples", "48", "--workers", "0", "--eval-every", "4", "--val-data", str(pairs)]
    ended = launch(train_flags(pairs, tmp_path / "two", *flags), world=2)
    assert ended.codes == [0, 0], ended.said
    train.main(train_flags(pairs, tmp_path / "one", *flags))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=0, abs=1e-5)
    norms = [losses(tmp_path / name, "grad_norm") for name in ("one", "two")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    found = []
    for name in ("one", "two"):
        lines = read_jsonl(tmp_path / name / "metrics.jsonl")
        found.append({line["step"]: line["val_loss"] for line in lines if "val_loss" in line})
    assert list(found[0]) == [0, 4, 6] and found[0] == pytest.approx(found[1], abs=1e-5)


# ------------------------------------------------------------------------------------------------
# Killed and resumed.


def test_one_process_with_workers_is_killed_and_resumed(whole, tmp_path):
    run = tmp_path / "run"
    flags = train_flags(whole / "shards", run, *TWENTY, "--workers", "2")
    assert launch(flags, 1, (0, "SIGKILL", "optimizer", 17)).codes == [-signal.SIGKILL]
    assert launch(["--out", run, "--resume"]).codes == [0]
    assert_same(state(run), state(whole / "one"))
    assert metrics(run) == metrics(whole / "one")


def test_two_processes_are_killed_and_resumed_twice(whole, tmp_path):
    """The other process also ends, instead of waiting for the one that died."""
    run = tmp_path / "run"
    flags = train_flags(whole / "shards", run, *TWENTY, "--workers", "2")
    died = launch(flags, 2, (1, "SIGKILL", "optimizer", 9))
    assert died.codes[1] == -signal.SIGKILL and died.codes[0] not in (0, -signal.SIGKILL)
    assert state(run)["progress"]["step"] == 6
    died = launch(["--out", run, "--resume"], 2, (0, "SIGKILL", "optimizer", 9))
    assert died.codes[0] == -signal.SIGKILL and died.codes[1] not in (0, -signal.SIGKILL)
    assert state(run)["progress"]["step"] == 12
    ended = launch(["--out", run, "--resume"], 2)
    assert ended.codes == [0, 0], ended.said
    assert_same(state(run), state(whole / "two"))
    assert metrics(run) == metrics(whole / "two")


def test_a_run_goes_on_with_other_splits(whole, tmp_path):
    """Killed at 2 processes x 2 workers, then at 1 x 1, and ended at 1 x 4."""
    run = tmp_path / "run"
    flags = train_flags(whole / "shards", run, *TWENTY, "--workers", "2")
    assert launch(flags, 2, (0, "SIGKILL", "optimizer", 9)).codes[0] == -signal.SIGKILL
    again = ["--out", run, "--resume", "--workers"]
    assert launch([*again, "1"], 1, (0, "SIGKILL", "optimizer", 9)).codes == [-signal.SIGKILL]
    assert state(run)["progress"]["step"] == 12
    train.main([*map(str, again), "4"])
    assert_same_run(run, whole / "one")
    assert_same(state(run)["progress"], state(whole / "two")["progress"])


def test_torchrun_ends_the_job_of_a_killed_process(whole, tmp_path):
    run = tmp_path / "run"
    flags = train_flags(whole / "shards", run, *TWENTY, "--workers", "2")
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    died = run_python(
        *torchrun, "-m", "tests.die", "1", "SIGKILL", "optimizer", "15", *flags, check=False
    )
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    assert state(run)["progress"]["step"] == 12
    assert launch(["--out", run, "--resume"], 2).codes == [0, 0]
    assert_same(state(run), state(whole / "two"))
    assert metrics(run) == metrics(whole / "two")


def test_a_signal_to_one_process_stops_all_after_the_same_step(whole, tmp_path):
    run = tmp_path / "run"
    flags = train_flags(whole / "shards", run, *TWENTY, "--workers", "1")
    stopped = launch(flags, 2, (1, "SIGTERM", "batch", 7))
    assert stopped.codes == [128 + signal.SIGTERM] * 2
    assert "of 20; continue with: " in stopped.said and f"--out {run} --resume" in stopped.said
    assert state(run)["progress"]["step"] in (7, 8)
    assert launch(["--out", run, "--resume"], 2).codes == [0, 0]
    assert_same(state(run)["model"], state(whole / "two")["model"])


def test_a_mistake_ends_all_processes_with_its_sentence(tmp_path, device):
    failed = launch(train_flags("nowhere", tmp_path / "run"), 2)
    assert failed.codes[0] == 2 and failed.codes[1] != 0
    assert failed.said.count("error: no source 'nowhere'") == 1
