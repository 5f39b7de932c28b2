"""What a saved model brings along for the Hub and for transformers, and how it gets there and back.

A directory carries the ``auto_map`` shim for ``trust_remote_code=True`` and a model card; what is known of the training
travels with the model, from one directory to the next.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import HfApi, snapshot_download
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from mambify.card import CARD, render_card
from mambify.config import HybridConfig
from mambify.errors import CheckpointError
from mambify.io import atomic_write_text
from mambify.provenance import Provenance, forget_provenance, read_provenance

#: file beside the weights with their SHA-256, where a directory has one
CHECKSUMS = "checksums.json"
#: what a saved directory carries so that ``trust_remote_code=True`` finds the installed package
_SHIM_NAME = "modeling_mambify"
_SHIM = '''"""Points transformers' auto classes at the installed package: pip install mambify."""

from mambify.config import HybridConfig
from mambify.model import HybridForCausalLM

__all__ = ["HybridConfig", "HybridForCausalLM"]
'''
_AUTO_MAP = {
    "AutoConfig": f"{_SHIM_NAME}.HybridConfig",
    "AutoModelForCausalLM": f"{_SHIM_NAME}.HybridForCausalLM",
}
#: what save_pretrained may be told of an upload
_TO_THE_HUB = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")
_FROM_THE_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")

#: (directory that holds mixers only, its configuration) → every weight, as (name, tensor)
Completion = Callable[[Path, HybridConfig], Iterator[tuple[str, Tensor]]]


class HubModel(PreTrainedModel):  # type: ignore[misc]
    """A model that saves itself with card and shim, and that may be read from a directory of mixers only."""

    #: how the weights came to be; forgotten when training begins, for then they become others
    provenance: Provenance | None = None
    _completion: ClassVar[Completion | None] = None

    def train(self, mode: bool = True) -> Self:
        """As every module's; a model in training no longer has the recorded results."""
        if mode:
            self.provenance = None
        super().train(mode)
        return self

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to register: a saved directory carries a shim that names the installed package."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Saves sharded safetensors, the config, the model card, and the shim for ``trust_remote_code=True``.

        With ``push_to_hub`` the files that it wrote are uploaded, to ``repo_id`` or a repository of the directory's
        name; of :meth:`push_to_hub` the options ``commit_message``, ``commit_description``, ``private``, ``token``,
        ``revision`` and ``create_pr`` are taken.
        """
        directory = Path(save_directory)
        hub = {name: kwargs.pop(name) for name in _TO_THE_HUB if push_to_hub and name in kwargs}
        before = _states(directory)
        self.config.auto_map = dict(_AUTO_MAP)
        self.config.base = None
        super().save_pretrained(save_directory, is_main_process, state_dict, False, *args, **kwargs)
        if not is_main_process:
            return
        (directory / CHECKSUMS).unlink(missing_ok=True)  # those of weights that were there before
        write_companions(directory, self.config, self.provenance)
        if push_to_hub:  # not before: transformers' own upload comes too early for what was written last
            written = [name for name, state in _states(directory).items() if before.get(name) != state]
            repo_id = hub.pop("repo_id", directory.name)
            upload_directory(directory, repo_id, token=kwargs.get("token"), only=written, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
    ) -> str:
        """Uploads what :meth:`save_pretrained` writes, and returns the commit's address.

        transformers' own would put a card without content in the place of ours. A card that stands in the repository
        already is kept, for someone may have edited it.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, max_shard_size=max_shard_size)
            return upload_directory(
                directory,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; of a directory that holds mixers only, the base's weights with the mixers put in.

        Raises:
            CheckpointError: the base is not the one that the mixers were made with.
            UnknownSourceError: the base cannot be found.
        """
        path = pretrained_model_name_or_path
        config = None if path is None else _config_on_base(path, kwargs)
        if path is None or config is None:
            loaded = super().from_pretrained(path, *args, **kwargs)
            directory = None if path is None else Path(path) / (kwargs.get("subfolder") or "")
        else:
            assert HubModel._completion is not None, "mambify.families.load is imported with the package"
            directory = _fetch(path, kwargs)
            kwargs = {key: value for key, value in kwargs.items() if key not in (*_FROM_THE_HUB, "subfolder", "config")}
            whole = copy.deepcopy(config)
            whole.base = None
            weights = dict(HubModel._completion(directory, config))
            loaded = super().from_pretrained(None, *args, config=whole, state_dict=weights, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if config is not None and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        if directory is not None and directory.is_dir():
            model.provenance = read_provenance(directory)
        return loaded


def complete_with(completion: Completion) -> None:
    """Registers what reads directories that hold mixers only, for it knows where their bases are to be found."""
    HubModel._completion = staticmethod(completion)


def _config_on_base(path: str | Path, arguments: Mapping[str, Any]) -> HybridConfig | None:
    """The configuration of a directory that holds mixers only; ``None`` of any other."""
    config = arguments.get("config")
    if not isinstance(config, PreTrainedConfig):
        options = {key: value for key, value in arguments.items() if key in (*_FROM_THE_HUB, "subfolder")}
        facts, _ = PreTrainedConfig.get_config_dict(config or path, **options)
        if not facts.get("base"):
            return None
        config = HybridConfig.from_dict(facts)
    return config if getattr(config, "base", None) else None


def _fetch(path: str | Path, arguments: Mapping[str, Any]) -> Path:
    """The directory of a model's files, downloaded where it is a Hub id."""
    root = Path(path)
    if not root.is_dir():
        options = {key: value for key, value in arguments.items() if key in _FROM_THE_HUB}
        root = Path(snapshot_download(str(path), **options))
    return root / (arguments.get("subfolder") or "")


def _states(directory: Path) -> dict[str, tuple[int, ...]]:
    """The files of a directory, and of each what another write would change."""
    found = {path.relative_to(directory).as_posix(): path.stat() for path in directory.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def upload_directory(
    directory: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    only: list[str] | None = None,
) -> str:
    """Uploads a model's directory to the Hub, making the repository where there is none; returns the commit's address.

    ``only`` names the files to upload, if not all. A card that stands in the repository already is kept, for someone
    may have edited it.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=directory,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        allow_patterns=only,
        ignore_patterns=[CARD] if api.file_exists(repo_id, CARD, revision=revision) else None,
    )


def prepare_config(config: HybridConfig, *, base: dict[str, str] | None = None) -> HybridConfig:
    """A copy as it is written beside weights: with the shim's ``auto_map``, and the base of mixers that need one."""
    written = copy.deepcopy(config)
    written.auto_map = dict(_AUTO_MAP)
    written.architectures = ["HybridForCausalLM"]
    written.base = base
    return written


def write_companions(directory: Path, config: HybridConfig, provenance: Provenance | None) -> None:
    """Writes what stands beside weights and configuration: shim, model card, and the provenance where there is one."""
    atomic_write_text(directory / f"{_SHIM_NAME}.py", _SHIM)
    atomic_write_text(directory / CARD, render_card(config, provenance))
    if provenance is not None:
        provenance.write(directory)
    else:
        forget_provenance(directory)  # that of weights that were there before


def update_card(directory: Path, results: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes the card of a saved model again, with further results where given.

    Raises:
        CheckpointError: the directory is no saved model of ours.
    """
    facts, _ = PreTrainedConfig.get_config_dict(directory)
    if facts.get("model_type") != HybridConfig.model_type:
        raise CheckpointError(f"{directory} is no model that mambify saved: it has no card of ours")
    provenance = read_provenance(directory)
    for result in results:
        provenance = (provenance or Provenance()).with_results(result)
    write_companions(directory, HybridConfig.from_dict(facts), provenance)
