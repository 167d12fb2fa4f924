"""Names to files, files to tensors, tensors into a model. Owns every read of a weight file; knows no architecture.

Weights are untrusted: only safetensors and ``torch.load(weights_only=True)`` are read, a shard index cannot
point out of its folder, and a tensor enters a model only under the name, shape and kind that the model expects.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from mm_retriever.downloads import hub_files
from mm_retriever.errors import CheckpointError, ModelNotFoundError, one_line, reason_of, shown

if TYPE_CHECKING:  # what is known of models, for the shell's completion too, is read without torch
    import torch
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (*TORCH_SUFFIXES, ".pkl")  # of files without a fixed name; the last, of flax, is read by its family
_WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, f"0_CLIPModel/{SAFETENSORS}")
_TORCH = "pytorch_model.bin"
_ELSE = (_TORCH, f"0_CLIPModel/{_TORCH}")  # of repositories without safetensors
_BESIDE = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model", "model-*-of-*.safetensors", "[1-9]*/*model.[sb]*")
"""Patterns of a hub repository; "*" crosses folders. The last: weights of further modules, in either format."""
_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_JSON_BYTES = 64 * 1024**2  # of a config or shard index; bge-m3's tokenizer.json has 17 MiB
MAX_LISTED_KEYS = 12  # keys that an error message lists before it only counts


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """Where the files of a named model are, and what is known of them.

    Args:
        folder: of a model that comes with the package.
        repo: on the hub.
        file: the one weight file of the repository; default: its safetensors.
        tokenizer_repo: where the tokenizer is, if not beside the weights.
        size: of `file`, in bytes.
        sha256: of `file`.
        licence: of the weights.
        note: for people who choose a model.
        dimension: length of its vectors.
        parameters: how many numbers its weights are.
        languages: that its text side was trained on.
        composed: how it embeds an image with a text: trained for it, as a weighted sum, or not at all.
        figures: published results, each with its source and protocol.
        needs: the extra of this package that it runs with.
    """

    folder: Path | None = None
    repo: str = ""
    file: str = ""
    tokenizer_repo: str = ""
    size: int | None = None
    sha256: str | None = None
    licence: str = ""
    note: str = ""
    dimension: int | None = None
    parameters: int | None = None
    languages: str = ""
    composed: Literal["trained", "sum", "no"] = "trained"
    figures: tuple[str, ...] = ()
    needs: str = ""


Models: TypeAlias = Mapping[str, ModelEntry]


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of a model: ``weights`` is one file, or the index of several; empty for a model without files."""

    name: str
    weights: Path = Path()
    config: Path | None = None
    tokenizer: Path | None = None


def locate(name_or_path: str | os.PathLike[str], models: Models, *, revision: str | None = None) -> ModelFiles:
    """The files of a named model, a local folder or file, or a hub repository (downloaded if not yet cached).

    A bundled name comes first, then a local path, then the hub. A cached download is used without asking the hub.

    Args:
        name_or_path: one of the names, a path, or the id of a hub repository in our layout.
        models: the names that are known.
        revision: of the hub repository.

    Raises:
        ModelNotFoundError: the name leads nowhere, or the hub cannot be reached.
    """
    name = os.fspath(name_or_path)
    entry = models.get(name)
    if entry is not None and entry.folder is not None:
        return _in_folder(entry.folder, name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, name)
    if path.is_file():
        return replace(_beside(path), name=name)
    if entry is not None and entry.file:
        folder = _download(entry.repo, [entry.file], revision=revision, models=models)
        return replace(_beside(folder / entry.file), name=name)
    repo = entry.repo if entry is not None and entry.repo else name
    if path.is_absolute() or name.startswith((".", "~")) or repo.count("/") != 1 or path.suffix in SUFFIXES:
        raise ModelNotFoundError(f"{name!r} does not exist; {_choices(models)}")
    folder = _download(repo, _WEIGHTS, otherwise=_ELSE, beside=_BESIDE, revision=revision, models=models)
    return _in_folder(folder, name)


def locate_tokenizer(source: str | os.PathLike[str]) -> Path:
    """``tokenizer.json`` of a local file or folder, or of a hub repository."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        path = _download(os.fspath(source), ["tokenizer.json"], models={})
    if not (path / "tokenizer.json").is_file():
        raise ModelNotFoundError(f"no tokenizer.json in {os.fspath(source)!r}; name the file or its folder")
    return path / "tokenizer.json"


def weights_in(folder: Path) -> Path | None:
    """The weight file of a folder, or the index of several; None where there is none, or no such folder.

    Raises:
        ModelNotFoundError: there are several.
    """
    for weights in (folder / SAFETENSORS, folder / SAFETENSORS_INDEX):
        if weights.is_file():
            return weights
    candidates = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES)
    if len(candidates) > 1:
        if (weights := folder / _TORCH).is_file():  # the others are an optimizer's, or of further heads
            return weights
        names = ", ".join(path.name for path in candidates)
        if any(folder.glob(f"{_TORCH}.index.json")):
            raise ModelNotFoundError(
                f"{str(folder)!r} holds its weights in several files of torch ({names}), which are not read: save the "
                "model anew with transformers (save_pretrained), which writes safetensors"
            )
        raise ModelNotFoundError(f"{str(folder)!r} holds several weight files ({names}); name one of them")
    return next(iter(candidates), None)


def _in_folder(folder: Path, name: str) -> ModelFiles:
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{name!r} is an adapter for another model, which it names itself: merge the two with peft "
            "(merge_and_unload) and give the folder of the result, which has no adapter_config.json"
        )
    # folders of the first module in sentence-transformers, and of the first one of each way through a Router
    places = [folder, *sorted(folder.glob("0_*/")), *sorted(folder.glob("*_0_*/"))]
    for weights in filter(None, map(weights_in, places)):
        return replace(_beside(weights), name=name)
    raise ModelNotFoundError(f"no {SAFETENSORS}, {SAFETENSORS_INDEX} or {', '.join(SUFFIXES)} file in {name!r}")


def _beside(weights: Path) -> ModelFiles:
    beside = [weights.parent / "config.json", weights.parent / "tokenizer.json"]
    config, tokenizer = (path if path.is_file() else None for path in beside)
    return ModelFiles(name=str(weights), weights=weights, config=config, tokenizer=tokenizer)


def _choices(models: Models) -> str:
    bundled = ", ".join(repr(name) for name, entry in models.items() if entry.folder is not None)
    bundled = f", or take the bundled model {bundled}" if bundled else ""
    return f"give the path of a local folder or weight file{bundled}"


def _download(
    repo: str,
    wanted: Sequence[str],
    *,
    models: Models,
    otherwise: Sequence[str] = (),
    beside: Sequence[str] = (),
    revision: str | None = None,
) -> Path:
    """Local folder with ``beside`` and what there is of ``wanted``, one at least; from the cache when it is there.

    A repository that has none of ``wanted`` is asked for ``otherwise``.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def snapshot(names: Sequence[str], *, cached: bool) -> Path:
        return hub_files(repo, [*names, *beside], revision, cached=cached)

    with suppress(OSError, HFValidationError):  # not cached: ask the hub
        if _complete(folder := snapshot(wanted, cached=True), [*wanted, *otherwise]):
            return folder
    try:
        folder = snapshot(wanted, cached=False)
        if otherwise and not _complete(folder, wanted):
            folder = snapshot(otherwise, cached=False)
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"the hub refused {repo!r} (revision {revision or 'main'}): {reason}") from error
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{repo!r} is not on this machine and the model hub cannot be reached; {_choices(models)}"
        ) from error
    if not _complete(folder, [*wanted, *otherwise]):
        raise ModelNotFoundError(
            f"the hub repository {repo!r} has not the files {', '.join(wanted)}; {_choices(models)}"
        )
    return folder


def _complete(folder: Path, wanted: Sequence[str]) -> bool:
    """Whether one of ``wanted`` is there and, if it is a shard index, all of its shards."""
    path = next((folder / name for name in wanted if (folder / name).is_file()), None)
    if path is None or not path.name.endswith(".index.json"):
        return path is not None
    weight_map = read_json(path).get("weight_map")
    return isinstance(weight_map, dict) and all((folder / str(shard)).is_file() for shard in weight_map.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; more than {MAX_JSON_BYTES:,} is not read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors by name, mapped from the file rather than read where the format allows.

    Args:
        path: a safetensors file, the ``*.index.json`` of several, or a file of ``torch.save``.

    Raises:
        CheckpointError: the file is damaged, is something else, or would run code.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return _read_shards(_existing(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(_existing(path))
    return _read_torch(_existing(path))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelNotFoundError(f"{path} does not exist")
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        _refuse_pointer(path)
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _refuse_pointer(path: Path) -> None:
    """Say of a file of Git LFS that it is one: what a clone without LFS has in place of the weights."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path} is a pointer of Git LFS and not the weights: fetch them with `git lfs pull`, or download the "
                "file itself"
            )


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for shard in set(map(str, weight_map.values())):
        # a plain name of a file in the same folder: an index must not reach for other files of this machine
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the shard {shown(shard)}; only *.safetensors beside it are read")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        tensors = _read_safetensors(_existing(index.parent / shard))
        expected = {key for key, name in weight_map.items() if name == shard}
        if tensors.keys() != expected:
            differ = _listed(tensors.keys() ^ expected)
            raise CheckpointError(
                f"{index.parent / shard} does not hold what {index.name} says; they differ in {differ}"
            )
        state.update(tensors)
    return state


def _read_torch(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        archive = zipfile.is_zipfile(path)
        if archive and _is_compressed(path):
            raise CheckpointError(f"{path} has compressed entries, which torch.save never writes: not read")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        _refuse_pointer(path)
        if named := _refused_global(error):
            raise CheckpointError(f"{path} holds more than tensors and could run code: refused ({named})") from error
        raise CheckpointError(f"{path} is no file of tensors as torch.save writes them: refused") from error
    except Exception as error:  # three parsers, each with errors of its own
        raise CheckpointError(f"{path} is not a whole file of torch.save: {reason_of(error)}") from error
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a flat dict of tensors by name")
    for key, tensor in content.items():
        # one number that claims to be a billion of them would become a billion as soon as it is copied into a model
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {key} has fewer numbers in the file than its shape says: not read")
    return dict(content)


def _is_compressed(archive: Path) -> bool:
    with zipfile.ZipFile(archive) as entries:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.infolist())


def _refused_global(error: BaseException) -> str:
    """The one telling line of torch's long message: which function the pickle asks for; "" if it asks for none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(next((line for line in lines if "global" in line.lower()), ""), 300)


def skeleton(build: Callable[[], M], source: str | os.PathLike[str]) -> M:
    """A model without weights, on the meta device: it has names and shapes, and takes no memory.

    Args:
        build: makes it from a config, which is untrusted.
        source: for the error message.

    Raises:
        CheckpointError: the config describes no model.
    """
    from mm_retriever.devices import without_memory

    try:
        with without_memory():
            return build()
    except Exception as error:  # impossible sizes raise every kind of error
        raise CheckpointError(f"the config of {os.fspath(source)} describes no model: {reason_of(error)}") from error


def load_strict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    source: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Fills the model, which may lie on the meta device, with copies; nothing is filled when anything is wrong.

    Args:
        model: receives exactly ``state_dict``.
        state_dict: as from :func:`read_state_dict`, under the model's names.
        source: for the error message.
        device: where the tensors go; default: where the model's are.
        dtype: of the floating-point parameters; default: the model's. Buffers keep their own.

    Raises:
        CheckpointError: lists every missing, unexpected and wrong-shaped tensor.
    """
    import torch

    expected = model.state_dict()
    problems = []
    if missing := expected.keys() - state_dict.keys():
        problems.append(f"{len(missing)} missing: {_listed(missing)}")
    if unexpected := state_dict.keys() - expected.keys():
        problems.append(f"{len(unexpected)} unexpected: {_listed(unexpected)}")
    wrong = [
        f"{key} {_kind(state_dict[key])}, expected {_kind(tensor)}"
        for key, tensor in expected.items()
        if key in state_dict and not _fits(state_dict[key], tensor)
    ]
    if wrong:
        problems.append(f"{len(wrong)} of a wrong shape or dtype: {_listed(wrong)}")
    if problems:
        raise CheckpointError(f"{os.fspath(source)} does not fit {type(model).__name__}: {'; '.join(problems)}")
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    filled = {}
    for key, tensor in expected.items():
        target = (dtype if key in parameters else None) or tensor.dtype
        to = torch.device(device) if device is not None else tensor.device
        # a copy even where nothing changes: a mapped file may be overwritten while the model lives
        filled[key] = state_dict[key].detach().to(to, target if tensor.is_floating_point() else tensor.dtype, copy=True)
    model.load_state_dict(filled, strict=True, assign=True)


def _fits(given: Tensor, expected: Tensor) -> bool:
    import torch

    if given.is_meta or given.layout != torch.strided or given.is_quantized or given.shape != expected.shape:
        return False
    if expected.is_floating_point():
        return given.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return given.dtype == expected.dtype


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - MAX_LISTED_KEYS
    return ", ".join(name[:200] for name in ordered[:MAX_LISTED_KEYS]) + (f" and {more} more" if more > 0 else "")


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Twelve hex digits that tell one set of weights from another, whatever file or float format holds them.

    Taken from 64 values of every tensor, in half precision: milliseconds, where a hash of the file takes a second.
    """
    import torch

    digest = hashlib.sha256()
    for key in sorted(state_dict):
        flat = state_dict[key].reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64].to(torch.float16)
        digest.update(f"{key} {list(state_dict[key].shape)}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
