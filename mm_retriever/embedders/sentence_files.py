"""Loads models of sentence-transformers safely, for embedders and rerankers.

A folder is untrusted: its pickles are read only as tensors, its Python files run only if the caller allows it by
`trust_remote_code`, and it cannot send the loader to another folder or to a hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mm_retriever.checkpoint import ModelFiles, read_json, read_state_dict, weights_in
from mm_retriever.errors import CheckpointError, MissingExtraError, MMRetrieverError, one_line, reason_of
from mm_retriever.from_pretrained import without_progress_bar, without_random_weights, without_video_processor
from mm_retriever.tokenizer import check_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MODULES = "modules.json"
LIBRARY_CONFIG = "config_sentence_transformers.json"
_LAYER = re.compile(r"(.+?)\.\{?(\d+)[^a-z]*\.")  # transformers lists the numbers of several as {1, 2}
MAX_PIXELS = 1800 * 32 * 32
"""Limit of an image for a model of many patches, from the scripts of Qwen3-VL-Embedding and -Reranker."""


def model_folder(files: ModelFiles) -> Path:
    """Return the folder of the whole model; its weights may be in a folder inside it."""
    folder = files.weights.parent
    return folder.parent if not (folder / MODULES).is_file() and (folder.parent / MODULES).is_file() else folder


def library_kind(folder: Path) -> str:
    """Return the class of sentence-transformers that saved the folder; "" if none did."""
    if (folder / LIBRARY_CONFIG).is_file():
        return str(read_json(folder / LIBRARY_CONFIG).get("model_type", "SentenceTransformer"))
    return "SentenceTransformer" if (folder / MODULES).is_file() else ""


def model_tensors(files: ModelFiles) -> dict[str, Tensor]:
    """Return every tensor of every module, by the module's folder and the tensor's name; memory-mapped."""
    folder = model_folder(files)
    places = _module_folders(folder) or [""]
    tensors: dict[str, Tensor] = {}
    for place in places:
        if weights := weights_in(folder / place):
            tensors |= {f"{place}/{key}": tensor for key, tensor in read_state_dict(weights).items()}
    return tensors


def load_model(
    kind: Literal["SentenceTransformer", "CrossEncoder"],
    files: ModelFiles,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Return the model of a folder, ready for inference.

    Args:
        kind: the class of sentence-transformers.
        files: from `locate`.
        device: where it computes.
        dtype: of the computation.
        trust_remote_code: run the Python files in the folder.
        **options: of the class.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        CheckpointError: the files are damaged, unsafe, or incomplete.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise MissingExtraError.of(error, "sentence-transformers", "sentence-transformers") from error
    folder = model_folder(files)
    _check_folder(folder, files.name)
    _check_weights(files)
    weights = {"use_safetensors": True} if ".safetensors" in files.weights.name else {}
    with ExitStack() as around:
        unexpected = around.enter_context(without_random_weights(files.name))
        around.enter_context(without_progress_bar())
        around.enter_context(without_video_processor())
        try:
            model = getattr(sentence_transformers, kind)(
                str(folder),
                device=str(device),
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                model_kwargs={"dtype": dtype, **weights},
                **options,
            )
        except MMRetrieverError:
            raise
        except Exception as error:  # damaged configs and weights raise anything
            raise CheckpointError(why_not(files.name, error)) from error
    _check_layers(model, unexpected, files.name)
    from transformers import PreTrainedTokenizerBase

    from mm_retriever.packed_linear import pack_linears

    if isinstance(tokenizer := model.tokenizer, PreTrainedTokenizerBase):
        check_words(tokenizer, files.name)
    return pack_linears(model.eval())


def plain_text(text: str, tokenizer: Any) -> str:
    """Return the text with a space inside the names of control tokens, so that they are plain words to the model.

    A text with ``<|image_pad|>`` or ``<|im_end|>`` could otherwise claim an image, or end its own message.
    """
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and len(str(token)) > 1]
    if not any(token in text for token in tokens):
        return text
    names = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.sub(names, lambda match: f"{match[0][0]} {match[0][1:]}", text)


def _check_weights(files: ModelFiles) -> None:
    """Refuse weights that the library would pass over, or take for numbers that they are not."""
    import torch

    if files.weights != (own := weights_in(files.weights.parent)):
        raise CheckpointError(
            f"{str(files.weights)!r} is not what its folder is loaded from, which is {own and own.name!r}: put it into "
            "a folder of its own, as model.safetensors, with the other files of the model"
        )
    if files.config is not None and read_json(files.config).get("quantization_config"):
        return  # the library reads them, or says what it needs
    whole = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
    quantised = [key for key, tensor in model_tensors(files).items() if tensor.dtype in whole and tensor.ndim > 1]
    if quantised:
        raise CheckpointError(
            f"{files.name!r} has quantised weights ({one_line(quantised[0], 200)} and {len(quantised) - 1} more), and "
            "its config.json does not say how: take the weights in float32, bfloat16 or float16"
        )


def _check_layers(model: Any, unexpected: Iterable[str], name: str) -> None:
    """Refuse a model whose config has fewer layers than its weights: the rest were left out."""
    from torch.nn import ModuleList

    lists = {place: len(module) for place, module in model.named_modules() if isinstance(module, ModuleList)}
    for key in unexpected:
        numbered = _LAYER.match(key)
        if numbered is None:
            continue
        layers = next((count for place, count in lists.items() if place.endswith(f".{numbered[1]}")), None)
        if layers is not None and int(numbered[2]) >= layers:
            raise CheckpointError(
                f"the weights of {name!r} have more layers than the {layers} that its config.json says "
                f"({one_line(key, 200)}): the two are of different models"
            )


def _module_folders(folder: Path) -> list[str]:
    """The folders of the modules, "" for the folder itself, and those of the modules inside a Router."""
    if not (folder / MODULES).is_file():
        return []
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        places = [str(module["path"]) for module in modules]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{folder / MODULES} is no list of modules: {reason_of(error)}") from error
    _check_inside(places, folder / MODULES)
    routed = []
    for place in places:
        for config in (folder / place / "router_config.json", folder / place / "config.json"):  # its earlier name
            types = read_json(config).get("types") if config.is_file() else None
            if isinstance(types, Mapping):
                _check_inside(types, config)
                routed += [f"{place}/{name}" if place else name for name in types]
                break
    return [*places, *routed]


def _check_inside(names: Iterable[str], source: Path) -> None:
    for name in names:
        if name and (Path(name).name != name or "\\" in name or name == ".."):
            raise CheckpointError(f"{source} names the folder {one_line(name, 200)!r}; only its own are read")


def _check_folder(folder: Path, name: str) -> None:
    """Refuse files that would make the loader read other places."""
    for place in _module_folders(folder) or [""]:
        if (folder / place / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{name!r} is an adapter for another model, which it names itself: merge the two with peft "
                "(merge_and_unload) and give the folder of the result"
            )
        config = folder / place / "sentence_bert_config.json"
        if not config.is_file():
            continue
        options = read_json(config)
        if options.get("tokenizer_name_or_path"):
            raise CheckpointError(f"{config} takes its tokenizer from another place; put it into the folder")
        for part in ("model_args", "model_kwargs"):
            wanted = options.get(part)
            attention = wanted.get("attn_implementation") if isinstance(wanted, Mapping) else None
            if "/" in str(attention):  # the name of code on the hub
                raise CheckpointError(f"{config} asks for the attention {one_line(attention, 100)!r} of a hub")


def why_not(name: str, error: Exception) -> str:
    """Return what a user reads where the library cannot load a model."""
    reason = reason_of(error)
    if "trust_remote_code" in str(error):
        return (
            f"{name!r} needs Python code that its own repository brings, which is not run by default: read it, then "
            "allow it in Python with trust_remote_code=True"
        )
    return f"{name!r} cannot be loaded by sentence-transformers: {reason}"
