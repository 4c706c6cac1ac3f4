"""Exit codes: 2 and one sentence for what the user can mend, 3 with a traceback for a bug, never 1 for either."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, error_of
from PIL import Image, UnidentifiedImageError

from tokenbridge.reproduction import listing
from tokenbridge.results.schema import Row
from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.files import reference_folder
from tokenbridge.utils.provenance import EnvironmentProblemError
from tokenbridge.utils.text import plain


@pytest.fixture
def fail(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[int, str, str]]:
    """Return a function that runs a command which calls another function on its way."""

    def run(function: Callable[[], Any]) -> tuple[int, str, str]:
        monkeypatch.setattr(listing, "list_presets", function)
        return run_command("models")

    return run


def raiser(error: BaseException) -> Callable[[], Any]:
    def function() -> Any:
        raise error

    return function


# ------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("error", [UserError("Mend this."), MissingFileError("Mend this.")])
def test_what_the_user_can_mend(fail: Callable[..., tuple[int, str, str]], error: Exception) -> None:
    assert error_of(fail(raiser(error))) == "Error: Mend this."


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.zeros(2).view(3),  # a RuntimeError
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: torch.nn.Dropout(2.0),  # a ValueError of torch's
        lambda: np.zeros(2).reshape(3),  # a ValueError of numpy's
        lambda: int("many"),
        lambda: {"a": 1}["b"],
        lambda: [][0],
        raiser(AssertionError("an invariant")),
        raiser(OSError("of no file")),
        raiser(FloatingPointError("a number")),
    ],
)
def test_a_bug(fail: Callable[..., tuple[int, str, str]], function: Callable[[], Any]) -> None:
    """A library's ValueError is a bug of ours like any other: its traceback is shown."""
    code, out, err = fail(function)
    assert (code, out) == (3, "")
    assert err.startswith("Traceback (most recent call last):")
    last = err.rstrip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert last.endswith("This is a bug of tokenbridge; please report it with the above.")
    assert "test_errors.py" in err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/file"), "No such file or directory: a/file"),
        (PermissionError(errno.EACCES, "Permission denied", "a/file"), "Permission denied: a/file"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a/folder"), "Is a directory: a/folder"),
        (OSError(errno.ENOSPC, "No space left on device"), "There is no space left on the disk."),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "There is no space left on the disk."),
        (UnidentifiedImageError("cannot identify image file 'a.png'"), "An image is damaged: cannot identify image"),
        (MemoryError(), "There is not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "There is not enough memory; a smaller batch takes less."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "There is not enough memory"),
    ],
)
def test_what_the_machine_refuses(fail: Callable[..., tuple[int, str, str]], error: Exception, sentence: str) -> None:
    assert error_of(fail(raiser(error))).startswith(f"Error: {sentence}")


def test_packages_that_do_not_fit(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tokenbridge.utils.provenance.check_environment", raiser(EnvironmentProblemError("They do not fit."))
    )
    assert error_of(run_command("models")) == "Error: They do not fit."


def test_an_interrupt_is_130(fail: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = fail(raiser(KeyboardInterrupt()))
    assert (code, out, err) == (130, "", "Interrupted.\n")


def test_an_interrupted_process(tmp_path: Path) -> None:
    """^C while a run is under way; the same command then makes the rest."""
    arguments = ["sample", "tokenbridge-tiny", "--num-images", "4000", "--batch-size", "4", "--out", tmp_path / "run"]
    command = [sys.executable, "-m", "tokenbridge", *map(str, arguments)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("run/images/*.png")) and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


def test_usage(run_command: Run) -> None:
    for arguments in ([], ["nothing"], ["sample", "--seed", "x"], ["train", "--jobs", "0"], ["convert"]):
        code, out, err = run_command(*arguments)
        assert code == 2
        assert "Traceback" not in err
        assert (out + err).strip()


# ---------------------------------------------------------------------------------- what users get wrong


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with files and folders of every wrong kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "some.json").write_text('{"a": 1}')
    np.savez(tmp_path / "some.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    for name in ("photos", "damaged"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(np.full((32, 32, 3), 100 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    whole = (tmp_path / "damaged" / "1.png").read_bytes()
    (tmp_path / "damaged" / "1.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        # folders in the place of files, and the reverse
        ("audit photos", "photos is a folder; name a result file"),
        ("reproduce tiny --reference photos", "photos is a folder"),
        ("reproduce tiny --weights text", "No model of the scale tiny is in text"),
        ("reproduce table1 --folder text", "The folder of the published files is text"),
        ("sample tiny/mar --out text --num-images 1", "text cannot be written to"),
        ("sample tokenbridge-l --weights photos --vae photos", "There is no checkpoint at photos/checkpoint-last.pth"),
        ("discrepancies --latents photos", "photos is no regular file"),
        ("train tiny vae --data text", "text is neither a folder of images nor a Parquet file"),
        ("reconstruct text --tokenizer VAE", "text is neither a folder of images nor a Parquet file"),
        # files of another kind
        ("audit text", "text is not JSON"),
        ("audit some.npz", "some.npz is not JSON"),
        ("audit some.json", "scale: Field required"),
        ("convert text kl16 --out out", "text (5 bytes) is truncated, damaged or not a checkpoint of torch"),
        ("convert text givt-vae --out out", "text (5 bytes) is damaged"),
        (
            "evaluate photos --reference photos --inception text --allow-few",
            "text is not the published weights-inception",
        ),
        (
            "evaluate photos --reference photos --inception text --allow-other-inception --allow-few",
            "text does not hold the weights",
        ),
        ("reconstruct damaged --tokenizer VAE --out out", "cannot be read as an image"),
        ("reconstruct photos --out out", "The tiny VAE encodes the digits alone. Name a tokenizer for photos"),
        # what is not there
        ("audit nowhere", "There is no result file nowhere"),
        ("audit --weights nowhere", "There is no folder of models nowhere"),
        ("convert nowhere kl16 --out out", "There is no checkpoint at nowhere"),
        ("discrepancies --latents nowhere", "There is no file nowhere"),
        ("discrepancies --latents pipe", "pipe is no regular file"),
        ("train tiny vae --data empty", "no Parquet files in empty"),
        ("train tiny vae --data nobody/nothing", "Could not load the data set 'nobody/nothing'"),
        ("reconstruct photos --split train --tokenizer nobody/nothing", "There is no tokenizer 'nobody/nothing'"),
        # folders that cannot be written, found before the work whose results they are to hold
        ("train tiny vae --out text", "text/weights cannot be written to"),
        ("reproduce tiny --out text", "text is a file, so no folder can be written there"),
        ("discrepancies --out text", "text is a file, so no folder can be written there"),
        ("reconstruct photos --tokenizer VAE --out text", "text is a file, so no folder can be written there"),
        ("audit --out text", "text cannot be written to"),
        ("gate goldens --out text", "text cannot be written to"),
        ("update-references verdicts --out text", "text cannot be written to"),
        # numbers
        ("sample tiny/mar --num-images 99999999999999999999 --plan", "A run makes 10,000,000 images at most"),
        ("sample tiny/mar --label 99999999999999999999", "There is no class 99999999999999999999"),
        ("sample tiny/mar --temperature nan", "temperature must be at least 0, not nan"),
        ("sample tiny/mar --num-diffusion-steps many", "not 'many'"),
        ("sample tiny/mar --num-diffusion-steps ddim", "not 'ddim'"),
        ("sample tiny/mar --num-iterations 1.5", "Input should be a valid integer"),
        ("sample tiny/mar --bogus 3", "tiny/mar has no setting bogus; it has num_iterations"),
        ("sample tiny/mar --model x", "tiny/mar has no setting model"),
        (
            "reconstruct photos --tokenizer VAE --levels 99999999999",
            "A quantiser can have at most 65,536 levels",
        ),
        (
            "reconstruct photos --tokenizer VAE --value-range nan",
            "value_range must be positive and finite",
        ),
        ("discrepancies --num-images 7", "multiple of twice the 10 classes"),
        ("reconstruct photos --batch-size 99999999999999999999", "less than or equal to 1000000"),
        ("reconstruct photos --seed 4294967296", "less than or equal to 4294967295"),
        ("evaluate photos --reference photos --num-bootstrap 1", "An interval needs at least 2 resamples"),
        ("train tiny vae --jobs 0", "greater than or equal to 1"),
        # inputs are looked at before published files, which are missing here
        ("evaluate nowhere --reference photos", "nowhere is neither a folder of images nor an .npz file"),
        ("evaluate photos --reference nowhere --allow-few", "nowhere is neither a folder of images nor an .npz file"),
        ("evaluate empty --reference photos", "There are no images"),
        ("evaluate photos --reference photos", "photos has 2 images"),
        ("evaluate photos --reference photos --allow-few --out photos", "photos is a folder"),
        ("evaluate photos --reference photos --allow-few --out pipe", "pipe is a device or a pipe"),
        ("evaluate photos --reference photos --allow-few --out text/a.json", "text/a.json cannot be written to"),
        ("reference empty --out out/a.npz", "There are no images"),
        ("audit --samples nowhere --claim table3/tokenbridge-l/fid", "nowhere is neither a folder of images"),
        ("audit --samples photos --claim table3/tokenbridge-l/fid", "have 32 x 32 pixels"),
        ("reproduce tokenbridge-l --variant nothing", "no sampling settings 'nothing'; there are official, paper"),
        ("conformance nowhere", "There is no golden file or folder nowhere"),
        ("conformance empty", "There are no golden files (.npz) in empty"),
        # words that mean nothing, or mean nothing together
        ("samples", "No such command 'samples'. Did you mean 'sample'? See `tokenbridge --help`."),
        ("models --nothing", "No such option: --nothing. See `tokenbridge models --help`."),
        ("models more words", "unexpected extra argument"),
        ("evaluate photos", "Missing option '--reference'"),
        ("sample tiny/mar --dtype fp8", "'fp8' is not one of 'fp32', 'bf16', 'fp16'"),
        ("sample tiny/mar --format gif", "'gif' is not one of 'png', 'npz'"),
        ("sample tiny/mar --=3", "No such option"),
        ("sample tokenbridge-tiny --position-order zigzag", "'random', 'raster' or 'confidence'"),
        ("reconstruct photos --quantizer none", "'none' is not one of 'gaussian', 'uniform', 'lloyd-max'"),
        ("gate nothing", "it has goldens, tiny, tokens, audit, benchmarks"),
        ("update-references nothing", "there are tiny, verdicts, benchmarks"),
        ("artifacts nothing", "There is no file 'nothing'; there are tokenbridge-l"),
        ("artifacts --download", "Name the files to download"),
        ("audit --inception text", "--inception can be used only with --samples"),
        ("audit --samples photos --claim x --weights text", "--weights can be used only without --samples"),
        ("audit --fail-on nothing", "or on verdicts (reproduced,"),
        # names with markup, in errors
        ("train tiny [/red]", "Unknown recipe '[/red]' at scale tiny; there are vae, vq"),
        ("evaluate [red]nowhere[/b] --reference photos", "[red]nowhere[/b] is neither a folder"),
        ("evaluate :heart: --reference photos", ":heart: is neither a folder"),
    ],
)
def test_one_sentence(run_command: Run, line: str, message: str) -> None:
    vae = str(reference_folder() / "tiny" / "weights" / "vae")
    result = run_command(*[vae if word == "VAE" else word for word in line.split()])
    assert message in error_of(result)
    assert not Path("out").exists() or not list(Path("out").iterdir())


@pytest.mark.usefixtures("here")
def test_damaged_runs(run_command: Run) -> None:
    arguments = ["sample", "tiny/mar", "--num-images", "1", "--num-iterations", "1", "--out", "run"]
    assert run_command(*arguments)[0] == 0
    image = Path("run/images/000000.png")
    whole = image.read_bytes()
    image.write_text("{")
    code, _, err = run_command(*arguments)
    assert (code, image.read_bytes()) == (0, whole)
    assert "1 file is damaged in run, and the images are made anew." in err
    Path("run/run.json").write_text("{")
    assert "is damaged" in error_of(run_command(*arguments))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["f-[/red]x", "[a]\x1b[31m\x1b]0;title\x07", "\udcff", "{x} $x_{", "n" * 250])
def test_a_folder_of_any_name(run_command: Run, name: str) -> None:
    """A table with a folder's name comes after hours of work."""
    Path(name).mkdir(parents=True)
    for i in range(2):
        (Path(name) / f"{i}.png").write_bytes((Path("photos") / f"{i}.png").read_bytes())
    vae = reference_folder() / "tiny" / "weights" / "vae"
    words = ("--tokenizer", vae, "--levels", "8", "--out", f"{name[:200]}-out")
    code, out, err = run_command("reconstruct", f"./{name}", *words)
    assert (code, "Traceback" in err) == (0, False)
    assert "\x1b" not in out + err
    assert f"are in {plain(name[:200])}-out/" in out


def test_scores_are_printed_before_they_are_written(
    run_command: Run, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    row = Row(id="evaluation/1", label="[red]photos", metrics={"images": 2, "FID": 1.5})
    measured = SimpleNamespace(rows=[row], provenance=SimpleNamespace(settings={"notes": ["[/b]"]}))
    monkeypatch.setattr("tokenbridge.reproduction.evaluation.measure_evaluation", lambda *_, **__: measured)

    def full(path: Path, results: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("tokenbridge.results.schema.write", full)
    code, out, err = run_command("evaluate", "photos", "--reference", "[/r]", "--out", here / "a.json")
    assert code == 2
    assert "There is no space left on the disk." in err
    assert "1.5" in out
    for name in ("[red]photos", "[/b]", "[/r]"):
        assert name in out


def test_an_error_of_an_interrupted_import_is_no_error(fail: Callable[..., tuple[int, str, str]]) -> None:
    """A library may turn the interrupt of its import into an ImportError."""

    def interrupted() -> Any:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    try:
        assert fail(interrupted) == (130, "", "Interrupted.\n")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [EOFError(), BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_errors_that_typer_would_turn_into_1(fail: Callable[..., tuple[int, str, str]], error: Exception) -> None:
    assert fail(raiser(error))[0] == 3


@pytest.mark.parametrize(("redirection", "code"), [("| head -c 0", 0), ("> /dev/full", 2)])
def test_a_stdout_that_takes_nothing(redirection: str, code: int) -> None:
    line = f"{sys.executable} -m tokenbridge artifacts {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code
    assert done.stderr == ("" if code == 0 else "Error: There is no space left on the disk.\n")


def test_results_of_a_bug_are_never_json(fail: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = fail(raiser(RuntimeError("no")))
    assert code == 3
    with pytest.raises(json.JSONDecodeError):
        json.loads(out)
