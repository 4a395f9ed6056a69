"""Run functions of vLLM-Omni 0.30.0 and SGLang-Omni 0.1.9 that need no GPU on a merged model of Higgs Audio v3.

    python tests/v3_in_runtimes.py MERGED_MODEL

Their wheels are downloaded without what they depend on, and only these parts are executed: configuration, prompt
builder, and the map of weight names with the names that must be there. Not executed: their engines, kernels and codecs.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import AutoTokenizer

from higgs_ds.bases.bundle import open_bundle
from higgs_ds.common.resources import default_cache_dir
from higgs_ds.common.tensor_files import weight_locations
from higgs_ds.model.sample import ASSISTANT, USER, AudioClip, Message

WHEELS = ("vllm-omni==0.30.0", "sglang-omni==0.1.9")
MODEL = "vllm_omni/model_executor/models/higgs_audio_v3"
WORDS, REFERENCE_WORDS, REFERENCE_FRAMES = "one two", "three", 5


def main(merged: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", name, *WHEELS], check=True)
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
        prompts = _prompts(folder, merged)
        assert len({tuple(prompt) for prompt in prompts.values()}) == 1, prompts
        print(f"prompts of {', '.join(prompts)} are equal")
        _check_vllm(folder, merged)
        _check_sglang(folder, merged)


def _prompts(folder: Path, merged: Path) -> dict[str, list[int]]:
    tokenizer, bundle = AutoTokenizer.from_pretrained(merged), open_bundle(str(merged), None, None, default_cache_dir())
    theirs = {
        "vLLM-Omni": _module(folder / MODEL / "higgs_audio_v3_tokenizer.py").HiggsAudioV3TokenizerAdapter,
        "SGLang-Omni": _module(folder / "sglang_omni/models/higgs_tts/text_tokenizer.py").HiggsTokenizerAdapter,
    }
    rows = bundle.stream.num_rows(REFERENCE_FRAMES)
    prompts = {
        name: build(tokenizer).build_prompt(WORDS, num_ref_tokens=rows, reference_text=REFERENCE_WORDS)
        for name, build in theirs.items()
    }
    reference = [Message(USER, (REFERENCE_WORDS,)), Message(ASSISTANT, (AudioClip(Path("reference.wav")),))]
    segments = bundle.family.render_generation([*reference, Message(USER, (WORDS,))], bundle.vocabulary)
    ours = bundle.family.tokenize(
        segments, [REFERENCE_FRAMES], bundle.coder(default_cache_dir()).tokenizer, bundle.stream
    )
    ids = [-100 if column in ours.audio_columns else token for column, token in enumerate(ours.input_ids)]
    return prompts | {"higgs_ds": ids}


def _check_vllm(folder: Path, merged: Path) -> None:
    config = _module(folder / "vllm_omni/transformers_utils/configs/higgs_audio_v3.py").HiggsAudioV3Config
    config = config.from_pretrained(str(merged))
    talker = _methods(folder / MODEL / "higgs_audio_v3_talker.py", ("_map_weight_name", "_build_required_keys"))
    talker.tie_modality = config.tie_modality_embeddings
    names = set(weight_locations(merged))
    mapped = {name: talker()._map_weight_name(name) for name in names}  # raises ValueError for an unknown name
    missing = talker._build_required_keys(config.text_config.num_hidden_layers) - names
    assert not missing, missing
    print(f"vLLM-Omni's configuration and map of weights accept the model: {len(mapped)} tensors, none missing")


def _check_sglang(folder: Path, merged: Path) -> None:
    package = folder / "sglang_omni/models/higgs_tts"
    values = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    config = _module(package / "hf_config.py").HiggsMultimodalQwen3Config(**values)
    prefixes = _constant(package / "model.py", "_BACKBONE_PREFIX_MAP")
    mapper = _module(package / "weight_loader.py").DiscreteWeightMapper(text_prefix_map=prefixes)
    names = set(weight_locations(merged))
    unmapped = [name for name in names if mapper.map(name) == name]
    assert not unmapped, unmapped
    layers = config.text_config.num_hidden_layers
    print(f"SGLang-Omni's configuration ({layers} layers) and map of weights accept the model: {len(names)} tensors")


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _constant(path: Path, name: str) -> Any:
    """Return the value of a name in a module, or in a class of it, that is given as a literal."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in [getattr(target, "id", "") for target in targets]:
            return ast.literal_eval(node.value)  # type: ignore[arg-type]
    raise KeyError(name)


def _methods(path: Path, names: tuple[str, ...]) -> Any:
    """Return a class with these methods of a class of the file, which needs vLLM as a whole, and its constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    namespace = vars(ModuleType("talker"))
    constants = [node for node in tree.body if isinstance(node, ast.Assign)]
    for constant in constants:
        try:
            namespace[constant.targets[0].id] = ast.literal_eval(constant.value)  # type: ignore[attr-defined]
        except ValueError:
            continue  # the value is computed
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = next(c for c in classes if any(getattr(node, "name", "") == names[0] for node in c.body))
    body = [
        node
        for node in found.body
        if getattr(node, "name", "") in names or isinstance(node, ast.Assign | ast.AnnAssign)
    ]
    module = ast.Module([ast.ClassDef("Talker", [], [], body, [])], [])
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.fix_missing_locations(module), str(path), "exec", flags=flags), namespace)
    return namespace["Talker"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
