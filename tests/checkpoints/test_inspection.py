"""The commands that inspect the output of runs, on the output of a real run, intact and damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launcher import train_runs
from safetensors.torch import load_file, save_file

from higgs_ds.adapters import convert, merge
from higgs_ds.checkpoints.inspection import find_adapters, validate_adapter, validate_checkpoint
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import sha256_of
from higgs_ds.options.commands import ConvertOptions, InspectOptions, MergeOptions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    options = (
        f"--deepspeed {ds_file(2)} --train_manifest {mixed_manifest} --allow_text_targets --precision fp32 --lora_r 4 "
        f"--batch_size 1 --grad_accum 1 --max_steps 3 --save_steps 2 --output_dir {folder} --lora_targets attention"
    )
    train_runs(1, [options.split()])
    return folder


def as_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_adapters_below_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find_adapters(InspectOptions(run.parent, as_json=True))
    found = {adapter["path"]: adapter for adapter in as_json(capsys)}
    steps = {
        f"{run}/checkpoint-2/lora_adapters": 2,
        f"{run}/checkpoint-3/lora_adapters": 3,
        f"{run}/lora_adapters": None,
    }
    assert {path: adapter["of_step"] for path, adapter in found.items()} == steps
    for adapter in found.values():
        assert (adapter["rank"], adapter["alpha"], adapter["tensors"], adapter["problem"]) == (4, 32, 16, None)
        assert adapter["targets"] == [f"self_attn.{name}_proj" for name in "koqv"]
    find_adapters(InspectOptions(run))
    shown = capsys.readouterr().out
    assert f"{run}/lora_adapters\n  rank 4, alpha 32, on self_attn.k_proj" in shown
    assert "step 2, 16 tensors" in shown


def test_which_adapter_to_take(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the lowest validation loss, if it was saved; copies of the run's adapter are said to be copies."""

    def taken(folder: Path) -> str:
        find_adapters(InspectOptions(folder))
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Take ")]
        return line.removeprefix(f"Take {folder}/")

    assert taken(run).startswith("lora_adapters: it is of the last step, 3; ")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copytree(copy / "lora_adapters", copy / "final_model")
    state = json.loads((copy / "trainer_state.json").read_text())
    for losses, expected in (
        ({"2": 3.5, "3": 4.0}, f"checkpoint-2/lora_adapters: its validation loss, 3.5, is the lowest; {copy}/lora"),
        ({"2": 4.5, "3": 4.0}, "lora_adapters: it is of the last step, 3; its validation loss, 4, is the lowest"),
        (
            {"1": 3.5, "3": 4.0},
            "lora_adapters: it is of the last step, 3; the validation loss was lowest at step 1,",
        ),
        ({}, "lora_adapters: it is of the last step, 3; nothing was validated, which would show"),
    ):
        (copy / "trainer_state.json").write_text(json.dumps(state | {"val_losses": losses}))
        assert taken(copy).startswith(expected)
    find_adapters(InspectOptions(copy, as_json=True))
    found = {Path(adapter["path"]).relative_to(copy).as_posix(): adapter for adapter in as_json(capsys)}
    assert {name for name, adapter in found.items() if adapter["take"]} == {"lora_adapters"}
    same = {name for name, adapter in found.items() if adapter["same_as"] == f"{copy}/lora_adapters"}
    assert same == {"checkpoint-3/lora_adapters", "final_model"}


def test_a_damaged_adapter_is_listed_as_such(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(run / "lora_adapters", tmp_path / "run" / "lora_adapters"))
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-7] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    shutil.copytree(run / "lora_adapters", tmp_path / "run" / "final_model")
    shutil.copy(run / "trainer_state.json", tmp_path / "run")
    find_adapters(InspectOptions(tmp_path))
    shown = capsys.readouterr().out
    assert "unusable: " in shown
    assert "Take " not in shown
    assert "the same adapter" not in shown


def test_tips_where_there_are_none(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find_adapters(InspectOptions(tmp_path))
    assert f"python launch/find_lora_adapters.py {tmp_path.parent}" in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    shutil.copy(run / "trainer_state.json", tmp_path / "run")
    find_adapters(InspectOptions(tmp_path))
    assert f"runs found: {tmp_path}/run; a run writes its adapter to lora_adapters/ with" in capsys.readouterr().out
    with pytest.raises(InputError, match="is not a folder"):
        find_adapters(InspectOptions(tmp_path / "gone"))


def test_a_good_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validate_checkpoint(InspectOptions(run / "checkpoint-2"))
    shown = capsys.readouterr().out
    assert "BAD" not in shown
    assert "step 2 of 3" in shown
    assert f"to resume from it: --resume {run}/checkpoint-2" in shown
    with pytest.raises(
        InputError, match=f"is not a checkpoint-N folder; it holds {run}/checkpoint-3, {run}/checkpoint-2"
    ):
        validate_checkpoint(InspectOptions(run))


def without_a_moment(folder: Path) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "optimizer.safetensors")


SPOILED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no optimizer": (
        lambda f: (f / "optimizer.safetensors").unlink(), ["files", "as written"], "missing optimizer.safetensors",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ["files", "as written"], "missing manifest.json"),
    "half an optimizer": (without_a_moment, ["as written"], "optimizer.safetensors has changed since it was written"),
    "no adapter": (
        lambda f: shutil.rmtree(f / "lora_adapters"), ["files", "as written", "adapter"],
        "missing lora_adapters/adapter_config.json, lora_adapters/adapter_model.safetensors",
    ),
    "empty": (
        lambda f: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in f.iterdir()],
        ["files", "as written", "adapter"], "missing manifest.json, trainer_state.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_a_checkpoint_that_is_not_whole(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    spoil, bad, words = SPOILED[kind]
    folder = Path(shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2"))
    spoil(folder)
    with pytest.raises(InputError, match=f"failed checks: {', '.join(bad)}$"):
        validate_checkpoint(InspectOptions(folder, as_json=True))
    report = as_json(capsys)
    assert not report["good"]
    assert [check["what"] for check in report["checks"] if not check["good"]] == bad
    assert any(words in check["detail"] for check in report["checks"]), report


def test_a_good_adapter_and_its_base(run: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validate_adapter(InspectOptions(run / "lora_adapters", str(base)))
    shown = capsys.readouterr().out
    assert "8 layers adapted" in shown
    assert f"every adapted layer exists in {base}" in shown


def test_adapters_that_are_not_good(run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="failed checks: files"):
        validate_adapter(InspectOptions(run / "checkpoint-2"))
    assert "is a checkpoint directory" in capsys.readouterr().out
    folder = Path(shutil.copytree(run / "lora_adapters", tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors", {"format": "pt"},
    )  # fmt: skip
    with pytest.raises(InputError, match="failed checks: trained"):
        validate_adapter(InspectOptions(folder))
    other = {name: tensor[:2] if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file({n: t.contiguous() for n, t in other.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="failed checks: fits"):
        validate_adapter(InspectOptions(folder, str(base)))
    assert "but in the base it is" in capsys.readouterr().out


def test_built_in_bases_by_name(run: Path, base: Path, tmp_path: Path) -> None:
    """For every command that takes an adapter and its base, or a base to convert."""
    adapter = run / "lora_adapters"
    validate_adapter(InspectOptions(adapter, "tiny-random-base"))
    with pytest.raises(InputError, match="failed checks: fits"):
        validate_adapter(InspectOptions(adapter, "speaking-base"))
    files: dict[str, list[str]] = {}
    for number, name in enumerate(("tiny-random-base", str(base))):
        merge.main(MergeOptions(adapter, tmp_path / f"merged-{number}", name, no_verify=True))
        convert.main(ConvertOptions(Path(name), tmp_path / f"converted-{number}", "original"))
        written = sorted(
            path for kind in ("merged", "converted") for path in (tmp_path / f"{kind}-{number}").glob("*.s*")
        )
        files[name] = [sha256_of(path) for path in written]
    assert len(files[str(base)]) == 2
    assert files["tiny-random-base"] == files[str(base)]
