"""Several processes on one machine, over gloo: the same run as with one, killed or not."""

import signal

import pytest

from tests.conftest import make_shards, run_python, train_flags
from tests.test_train import assert_same, metrics, state

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TWENTY = ("--samples", "160", "--save-every", "6")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs of 20 steps on shards that were never interrupted: by two processes, and by one."""
    folder = tmp_path_factory.mktemp("whole")
    shards = make_shards(folder / "shards")
    run_python(
        *TORCHRUN, "train.py", *train_flags(shards, folder / "two", *TWENTY, "--workers", "1")
    )
    run_python(
        "train.py",
        *train_flags(shards, folder / "one", *TWENTY, "--workers", "2", "--micro-batch", "4"),
    )
    return folder


def losses(run):
    return [line["loss"] for line in metrics(run)]


def test_two_processes_one_process_and_micro_batches_are_the_same_run(whole, tmp_path):
    """The readers are two in each run: the same samples are in the same global batches."""
    four = tmp_path / "four"
    more = [*TWENTY, "--workers", "2", "--micro-batch", "2"]
    run_python("train.py", *train_flags(whole / "shards", four, *more))
    for run in (whole / "one", four):
        assert losses(run) == pytest.approx(losses(whole / "two"), rel=1e-4)
        assert_same(state(run)["idf"], state(whole / "two")["idf"])
        assert state(run)["idf"]["n"] == 160
    assert [key for key in state(whole / "two")["model"] if "module" in key] == []


@pytest.mark.parametrize("n", [4, 11, 17])
def test_one_process_with_workers_is_killed_and_resumed(whole, tmp_path, n):
    run = tmp_path / "run"
    flags = train_flags(whole / "shards", run, *TWENTY, "--workers", "2", "--micro-batch", "4")
    died = run_python("-m", "tests.die", "SIGKILL", "optimizer", str(n), *flags, check=False)
    assert died.returncode == -signal.SIGKILL
    run_python("train.py", "--out", str(run), "--resume")
    assert_same(state(run), state(whole / "one"))
    assert metrics(run) == metrics(whole / "one")


@pytest.mark.parametrize(("rank", "n"), [("0", 9), ("1", 15)])
def test_two_processes_are_killed_and_resumed(whole, tmp_path, rank, n):
    """One rank dies; the job ends instead of waiting for it, and resumes."""
    run = tmp_path / "run"
    flags = train_flags(whole / "shards", run, *TWENTY, "--workers", "1")
    died = run_python(
        *TORCHRUN,
        "-m",
        "tests.die",
        "SIGKILL",
        "optimizer",
        str(n),
        *flags,
        check=False,
        DIE_ON_RANK=rank,
    )
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    run_python(*TORCHRUN, "train.py", "--out", str(run), "--resume")
    assert_same(state(run), state(whole / "two"))
    assert metrics(run) == metrics(whole / "two")


def test_a_signal_to_one_rank_stops_all_after_the_same_step(whole, tmp_path):
    run = tmp_path / "run"
    flags = train_flags(whole / "shards", run, *TWENTY, "--workers", "1")
    stopped = run_python(
        *TORCHRUN, "-m", "tests.die", "SIGTERM", "batch", "7", *flags, check=False, DIE_ON_RANK="1"
    )
    assert stopped.returncode != 0
    assert "of 20; continue with: " in stopped.stdout and f"--out {run} --resume" in stopped.stdout
    assert state(run)["step"] in (7, 8)
    run_python(*TORCHRUN, "train.py", "--out", str(run), "--resume")
    assert_same(state(run)["model"], state(whole / "two")["model"])


def test_another_number_of_processes_goes_on_with_a_fresh_pass(whole, tmp_path):
    run = tmp_path / "run"
    flags = train_flags(whole / "shards", run, *TWENTY, "--workers", "1")
    run_python("-m", "tests.die", "SIGTERM", "batch", "5", *flags, check=False)
    resumed = run_python(*TORCHRUN, "train.py", "--out", str(run), "--resume")
    assert "1 readers are now 2: the stream starts a fresh pass" in resumed.stdout
    assert state(run)["step"] == 20 and state(run)["first_pass"] == 1


def test_a_mistake_ends_all_processes_with_its_sentence(tmp_path):
    failed = run_python(
        *TORCHRUN, "train.py", "--data", "nowhere", "--out", str(tmp_path), check=False
    )
    assert failed.returncode != 0 and "error: no source 'nowhere'" in failed.stderr


def test_two_processes_train_clip_as_one_does(pairs, tmp_path):
    """Its loss sees the whole batch: four images here and four there are as eight in one place."""
    flags = ["--samples", "48", "--objective", "clip", "--workers", "1"]
    run_python(*TORCHRUN, "train.py", *train_flags(pairs, tmp_path / "two", *flags))
    run_python("train.py", *train_flags(pairs, tmp_path / "one", *flags))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
