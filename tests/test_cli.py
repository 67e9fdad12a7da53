"""The command line: what a user sees when something is asked that cannot be done, and when it can."""

import json
import os
import shutil
import signal
import subprocess
import sys

import hydra
import numpy as np
import pytest

from evodiff import config, paths
from evodiff.cli import COMMANDS, main
from evodiff.models.pretrained import Pretrained
from evodiff.paths import ROOT
from evodiff.runs import loaded
from evodiff.runs.run import Run

MIXTURE = ["model=mixture", "protocol=none", "reference_run=null", "seeds=0-7", "shard=4", "batch=4"]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("shard-*.npz"))}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["solver=heun", "nfe=10", "denoise_final=true"], "Heun cannot spend exactly nfe=10 (denoise_final=True). "
                                                          "Nearest: nfe=9 or 11."),
        (["solver=heun", "nfe=1"], "Nearest: nfe=2"),
        (["solver=evodif"], "solver=evodif does not exist. Did you mean evodiff?"),
        (["model=mnist"], "model=mnist does not exist. Did you mean mnist_tiny?"),
        (["nfee=5"], "Did you mean nfe?"),
        (["nfe=0"], "nfe=0 is impossible: expected a whole number of network evaluations, at least 1."),
        (["nfe=ten"], "nfe=ten is impossible"),
        (["--nfe=6"], "--nfe=6 is no option: nfe is a key of the configuration. Write nfe=6"),
        (["--solver.eta=1"], "Write solver.eta=1"),
        (["seeds=-4"], "seeds=-4 is no range of seeds"),
        (["seeds=9-3"], "seeds=9-3 is empty"),
        (["noise=loud"], "noise=loud does not exist; possible: seeded, legacy"),
        (["batch=0"], "batch=0 is impossible"),
        (["device=abacus"], "device=abacus is not available here"),
        (["solver=dpmpp_2m", "solver.order=4"], "order=4 does not exist; possible: 1, 2, 3"),
        (["t_end=90"], "must be above t_end"),
        (["t_end=0"], "for a last step to 0 set denoise_final=true"),
        (["t_start=abc"], "t_start=abc is impossible: expected a number, or null."),
        (["denoise_final=yes"], "denoise_final=yes is impossible; possible: true, false."),
        (["denoise_final=1"], "denoise_final=1 is impossible"),
        (["guidance=classifier_free", "guidance.scale=abc"], "scale='abc' is impossible; possible: a number"),
        (["metrics=[rmse]", "reference_run=heun"], "reference_run=heun is impossible: expected a list of overrides"),
        (["noise=[seeded]"], "noise=['seeded'] does not exist; possible: seeded, legacy"),
        (["protocol=mnist", "protocol.metric=[a]"], "protocol.metric=['a'] is impossible: expected text"),
        (["metrics=[rmse]", "reference_run=['nfe=200']"], "names no solver, and the default, evodiff, would be meant"),
        (["metrics=[rmse]", "reference_run=['solver=ddim','seeds=8-15']"], "has other seeds than the run"),
        (["metrics=[rmse]", "reference_run=['solver=ddim','model=mnist_tiny']"], "has other model than the run"),
        (["reference_run=[solver=heun,nfe=99]"], "needs quotes, like reference_run=['solver=unipc_3','nfe=200']"),
        (["protocol=mnist", "metrics=[fid]", "seeds=5"], "seeds=5 is one image, of seed 5, and fd_mnist needs"),
        (["protocol=edm", "metrics=[fid]"], "evodiff fetch"),
        (["grid=file", "grid.path=nowhere.json"], "grid file nowhere.json"),
        (["solver=probability_flow", "nfe=10"], "chooses its own steps"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(evodiff_command, results, overrides, message):
    given = {o.split("=")[0] for o in overrides}
    code, out, err = evodiff_command("run", *[o for o in MIXTURE if o.split("=")[0] not in given], *overrides)
    assert code == 1
    assert message in err
    assert err.startswith("evodiff: ")
    assert err.count("\n") == 1, err
    assert out == ""
    assert files(results) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_more(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as e:  # as argparse and Hydra end
        code = e.code
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert "evodiff" in out


@pytest.mark.parametrize(
    "asked", ["table demo --help", "report demo -h", "wandb push demo --help", "show table=demo -h"]
)
def test_help_is_shown_wherever_it_is_asked_for(evodiff_command, results, asked):
    code, out, err = evodiff_command(*asked.split())
    assert (code, err) == (0, "") and out.startswith(f"usage: evodiff {asked.split()[0]} ")
    assert files(results) == []


def test_an_unknown_command_names_the_nearest(evodiff_command):
    code, _, err = evodiff_command("smaple")
    assert code == 1
    assert "Did you mean sample?" in err


def test_results_in_a_file_are_one_line(tmp_path):
    (tmp_path / "afile").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "evodiff.cli", "run", *MIXTURE, "solver=ddim", "nfe=5"],
        capture_output=True, text=True, env=os.environ | {"EVODIFF_RESULTS": str(tmp_path / "afile")},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("evodiff: cannot write ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("shape", "message"),
    [("[3,32,32]", "this protocol scores grey images [B, 1, H, W]"), ("[1,16,16]", "the images are 16x16, but")],
)
def test_images_that_cannot_be_scored_are_not_sampled_to_be_scored(evodiff_command, results, shape, message):
    given = ["model=mixture", f"model.shape={shape}", "protocol=mnist", "metrics=[fid]", "solver=ddim", "nfe=2",
             "seeds=0-7"]  # fmt: skip
    code, _, err = evodiff_command("run", *given)
    assert (code, err.count("\n")) == (1, 1), err
    assert err.startswith(f"evodiff: {message}")
    assert files(results) == []
    assert evodiff_command("sample", *given)[0] == 0, "they can be made for themselves"


@pytest.mark.parametrize("command", ["--help", "models"])
def test_a_reader_that_has_enough_ends_the_command_quietly(command):
    """As `| head` does: its end of the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "evodiff.cli", command], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_run_is_sampled_scored_and_then_left_alone(evodiff_command, results):
    code, out, err = evodiff_command("run", *MIXTURE, "solver=ddim", "nfe=5")
    assert code == 0
    assert "nfe 5" in out
    assert "protocol=none: no fid" in err
    folder = next((results / "runs" / "mixture").iterdir())
    assert {"run.yaml", "manifest.json", "score.json", "grid.png"} <= set(files(folder))
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    assert evodiff_command("run", *MIXTURE, "solver=ddim", "nfe=5")[1] == out
    assert {name: (folder / name).stat().st_mtime_ns for name in files(folder)} == before


def test_the_record_repeats_the_run(evodiff_command, results):
    evodiff_command("run", *MIXTURE, "solver=ddim", "nfe=5")
    folder = next((results / "runs" / "mixture").iterdir())
    record = json.loads((folder / "score.json").read_text())
    assert record["nfe"] == 5
    assert record["images"] == 8
    assert set(record["shards"]) == {"shard-000000.npz", "shard-000004.npz"}
    assert Run(**record["run"]).key() == folder.name == record["key"]


def test_a_method_without_what_makes_it_one_says_so(evodiff_command, results):
    _, _, told = evodiff_command("sample", *MIXTURE, "solver=dpm_v3", "nfe=5")
    assert "solver.statistics=null, so l = 1 and s = b = 0: not the DPM-Solver-v3 of its paper; configs/solver/" in told
    assert "solver.gaussian=null" in evodiff_command("sample", *MIXTURE, "solver=teleport", "nfe=5")[2]
    assert "null" not in evodiff_command("sample", *MIXTURE, "solver=dpmpp_3m", "nfe=5")[2]


def test_the_record_names_the_device_that_made_the_images(evodiff_command, results):
    evodiff_command("sample", *MIXTURE, "solver=ddim", "nfe=5")
    folder = next((results / "runs" / "mixture").iterdir())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert all(shard.pop("device").startswith("cpu (") for shard in manifest["shards"])
    assert evodiff_command("run", *MIXTURE, "solver=ddim", "nfe=5", "threads=1")[0] == 0  # of an older manifest
    record = json.loads((folder / "score.json").read_text())
    for shard in manifest["shards"]:
        shard["device"] = "the GPU"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "score.json").unlink()
    assert evodiff_command("run", *MIXTURE, "solver=ddim", "nfe=5")[0] == 0
    again = json.loads((folder / "score.json").read_text())
    assert record["device"].startswith("cpu (") and again == record | {"device": "the GPU"}


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_batch_size_does_not_change_the_images(evodiff_command, results, tmp_path, batch):
    common = [o for o in MIXTURE if not o.startswith("batch")]
    evodiff_command("sample", *common, "solver=evodiff", "nfe=6", "batch=2")
    folder = next((results / "runs" / "mixture").iterdir())
    first = [np.load(path)["images"] for path in sorted(folder.glob("shard-*"))]
    shutil.rmtree(folder)
    evodiff_command("sample", *common, "solver=evodiff", "nfe=6", f"batch={batch}")
    again = [np.load(path)["images"] for path in sorted(folder.glob("shard-*"))]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_schedule_that_is_none_is_answered(evodiff_command):
    code, _, err = evodiff_command("run", *MIXTURE, "model.schedule=foo")
    assert code == 1 and "schedule='foo' is no noise schedule" in err


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_shard_is_refused_by_score_and_redone_by_run(evodiff_command, results, damage):
    run = ["run", *MIXTURE, "solver=ddim", "nfe=5"]
    evodiff_command(*run)
    before = shards(results)
    first, second = sorted(results.rglob("shard-*.npz"))
    second.write_bytes(first.read_bytes() if damage == "foreign" else second.read_bytes()[:100])
    code, _, err = evodiff_command("score", *run[1:])
    assert code == 1
    assert "shard-000004.npz" in err
    assert err.count("\n") == 1
    code, _, err = evodiff_command(*run)
    assert code == 0
    assert "shard-000004.npz is damaged" in err
    with np.load(second) as redone:
        assert redone["seeds"].tolist() == [4, 5, 6, 7]
    assert shards(results) == before


def test_another_runs_folder_is_refused(evodiff_command, results):
    evodiff_command("run", *MIXTURE, "solver=ddim", "nfe=5")
    folder = next((results / "runs" / "mixture").iterdir())
    evodiff_command("run", *MIXTURE, "solver=ddim", "nfe=6")
    other = next(p for p in (results / "runs" / "mixture").iterdir() if p != folder)
    kept = other.with_name("kept")
    other.rename(kept)
    folder.rename(other)
    before = shards(other)
    code, _, err = evodiff_command("run", *MIXTURE, "solver=ddim", "nfe=6")
    assert code == 1
    assert "holds another run: nfe differ" in err
    assert shards(other) == before


def test_nan_from_the_network_names_the_seeds_and_keeps_nothing(evodiff_command, results, monkeypatch):
    build = loaded.build

    def broken(config, **kwargs):
        model = build(config, **kwargs)
        if not isinstance(model, Pretrained):
            return model

        class NaN:
            schedule = model.denoiser(None).schedule

            def __call__(self, x, node):
                return x * float("nan")

        return Pretrained(lambda labels: NaN(), shape=model.shape)

    monkeypatch.setattr(loaded, "build", broken)
    code, _, err = evodiff_command("run", *MIXTURE, "solver=ddim", "nfe=5")
    assert code == 1
    assert "4 of 4 images are not finite (seeds 0, 1, 2, 3)" in err
    assert shards(results) == {}


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--cfg=job"]])
def test_a_flag_of_hydra_shows_and_runs_nothing(evodiff_command, results, flags):
    before = sys.argv
    code, out, _ = evodiff_command("run", *flags, *MIXTURE, "nfe=7")
    assert code == 0 and "nfe: 7" in out and sys.argv is before
    assert evodiff_command("run", *MIXTURE, "nfe=7", *flags) == (0, out, "")
    assert shards(results) == {}
    assert "Did you mean nfe?" in evodiff_command("run", *flags, "nfee=7")[2]


@pytest.mark.parametrize("flag", ["--config-dir=mine", "--experimental-rerun", "--shell-completion", "--hydra-help"])
def test_flags_of_hydra_that_do_nothing_here_are_refused(evodiff_command, flag):
    code, _, err = evodiff_command("run", *MIXTURE, flag)
    assert code == 1 and f"{flag.partition('=')[0]} does nothing here. Possible: -m, --help, and Hydra's" in err
    assert "--resolve says how --cfg shows it" in evodiff_command("run", *MIXTURE, "--resolve")[2]


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_run_with_a_closed_stream_is_scored(closed, results):
    command = f"{sys.executable} -m evodiff run {' '.join(MIXTURE)} solver=ddim nfe=2 {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout if closed == ">&-" else done.stderr) == (0, "")
    assert [*results.glob("runs/mixture/*/score.json")]


def test_without_a_checkout_help_says_so(evodiff_command, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CONFIGS", tmp_path / "configs")
    config.keys.cache_clear()
    monkeypatch.setattr(paths, "CONFIGS", tmp_path / "configs")
    code, _, err = evodiff_command("run", "--help")
    config.keys.cache_clear()
    assert code == 1 and "there is no folder" in err


def test_a_run_without_flags_is_composed_by_us_alone(evodiff_command, results, monkeypatch):
    monkeypatch.delattr(hydra, "main")
    assert evodiff_command("sample", *MIXTURE, "solver=ddim", "nfe=2")[0] == 0
    assert len(shards(results)) == 2


def test_scoring_before_sampling_says_what_to_do(evodiff_command, results):
    code, _, err = evodiff_command("score", *MIXTURE, "solver=ddim", "nfe=5")
    assert code == 1
    assert "lacks 8 of 8 images" in err


RMSE = [*MIXTURE[:2], *MIXTURE[3:], "reference_run=['solver=ddim','nfe=9']", "metrics=[rmse]", "solver=ddim", "nfe=5"]


def test_scoring_before_sampling_makes_no_reference(evodiff_command, results):
    code, _, err = evodiff_command("score", *RMSE)
    assert code == 1
    assert "lacks 8 of 8 images" in err
    assert files(results) == []


@pytest.mark.parametrize("command", ["run", "score"])
def test_what_is_scored_needs_its_reference_no_more(evodiff_command, results, command):
    first = evodiff_command("run", *RMSE)
    (reference,) = (results / "runs/mixture").glob("ddim-nfe9-*")
    shutil.rmtree(reference)
    assert evodiff_command(command, *RMSE) == (0, first[1], "")
    assert not reference.exists()


KILLED = """
import os, sys
from evodiff.cli import main
from evodiff.store import SampleStore

os.environ["EVODIFF_RESULTS"] = sys.argv[1]
write = SampleStore.write
def write_then_die(self, *args, **kwargs):
    write(self, *args, **kwargs)
    os.kill(os.getpid(), 9)
SampleStore.write = write_then_die
main(["sample", *sys.argv[2:]])
"""


def test_killed_and_resumed_gives_the_same_bytes(evodiff_command, results, tmp_path_factory, monkeypatch):
    run = [*MIXTURE, "solver=evodiff", "nfe=5"]
    evodiff_command("sample", *run)
    whole = shards(results)
    elsewhere = tmp_path_factory.mktemp("killed")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(elsewhere), *run], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(shards(elsewhere)) == 1
    monkeypatch.setenv("EVODIFF_RESULTS", str(elsewhere))
    assert evodiff_command("sample", *run)[0] == 0
    assert shards(elsewhere) == whole


def test_the_installed_command_and_the_script_are_the_same():
    env = os.environ | {"COLUMNS": "120"}
    outs = [
        subprocess.run([sys.executable, *start, "nfee=1"], capture_output=True, text=True, env=env, cwd=ROOT)
        for start in (["-m", "evodiff.cli", "run"], ["scripts/run.py"])
    ]
    assert outs[0].returncode == outs[1].returncode == 1
    assert outs[0].stderr == outs[1].stderr


def test_importing_and_help_load_nothing_heavy():
    """No torch, no hydra: help comes at once."""
    code = "import sys, evodiff.cli; evodiff.cli.main(['--help']); print({'torch', 'hydra', 'numpy'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("set()\n")
    assert "usage: evodiff COMMAND" in out


def test_statistics_of_other_images_are_refused_before_sampling(evodiff_command, results):
    folder = ROOT / "checkpoints/mnist_tiny/ems"
    statistics = f"solver.statistics={{_target_: evodiff.ems.load, folder: {folder}}}"
    code, _, err = evodiff_command("run", *MIXTURE, "solver=dpm_v3", "nfe=5", statistics)
    assert code == 1
    assert "statistics are of images (1, 32, 32), but the model's are (3, 8, 8)" in err
    assert shards(results) == {}
