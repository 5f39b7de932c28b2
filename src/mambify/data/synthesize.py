"""Text sampled from the teacher itself: the data a student needs when there is no data set.

An instruct teacher writes both sides of a conversation: its template up to the user's words is a prompt
whose continuation is a question people ask, and the question through the template is a prompt for the answer.
A base teacher, or ``kind="text"``, continues the token that documents begin with. Given questions, a teacher answers
those. What is kept are the token ids that were drawn, so a student learns on exactly the distribution it is asked to
imitate.

The work is cut into shards. What is sampled for shard k depends on the settings and (seed, k) alone, and
duplicates are dropped in shard order: a run that was killed and is started again writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mambify.data.chat import chat_format, has_chat_template
from mambify.data.documents import DEFAULT_HELDOUT, Document, Kind, Source
from mambify.data.manifest import NAME, Manifest, Shard, ShardFile, is_synthesized
from mambify.data.questions import Questions, read_questions
from mambify.data.sampler import Sampler, Settings
from mambify.errors import InvalidOptionError, MambifyError, OutputExistsError
from mambify.fingerprint import weights_fingerprint
from mambify.io import atomic_write_text, require_new
from mambify.tokenization import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_MAX_EMPTY_BATCHES = 20
Progress = Callable[[int, int], None]


def synthesize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    num_tokens: int,
    kind: str = "auto",
    prompts: Source | Sequence[Source] | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 256,
    max_user_tokens: int = 128,
    turns: int = 1,
    batch_size: int = 64,
    documents_per_shard: int = 512,
    heldout: float = DEFAULT_HELDOUT,
    teacher: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Samples about ``num_tokens`` tokens from ``model`` into ``out``; continues what was begun there.

    Args:
        model: The teacher; any causal language model, in its own dtype and on its own device.
        tokenizer: Its tokenizer; its chat template is used if it has one.
        out: Gets ``manifest.json`` and, per shard, ``train-NNNNN.jsonl`` and ``heldout-NNNNN.jsonl``.
        num_tokens: Sampling stops with the document that reaches this many, both splits together, template
            and end tokens included.
        kind: ``chat``; ``text``; ``mixed`` (half of the tokens each); ``auto``: chat if there is a template.
        prompts: Questions that are answered in place of the teacher's own, as
            :func:`~mambify.data.questions.read_questions` reads them: all in an order drawn from ``seed``, then all
            again in another. All answers to a question are on the same side of the split.
        seed: Another seed gives other text.
        temperature: 1 is the teacher's own distribution.
        top_p: See :func:`~mambify.data.sample.sample_continuations`.
        top_k: As above.
        max_new_tokens: Length limit of an answer or a plain text; one that reaches it is kept without an end.
        max_user_tokens: Length limit of a user's turn; a conversation that reaches it is kept up to there, and a
            question of ``prompts`` beyond it is left out.
        turns: Questions and answers in a conversation; one of ``prompts`` has as many as it has turns.
        batch_size: Rows sampled at a time.
        documents_per_shard: What a killed run loses at most, and the size of a file.
        heldout: The fraction of documents that goes to the held-out files, by the hash of their text.
        teacher: The name to record; the model's own by default.
        overwrite: Start anew where ``out`` holds something else.
        progress: Called with (tokens so far, ``num_tokens``) after every batch.

    Raises:
        InvalidOptionError: a setting out of range, or ``out`` was begun with other settings.
        OutputExistsError: ``out`` holds something that is not synthesized text.
        UnsupportedError: no chat template where one is needed, or one that cannot be taken apart.
        UsageError: no question in ``prompts``, or a row that is none.
        OutputWriteError: the disk refused a write; finished shards are intact.
        MambifyError: the teacher keeps repeating itself and gives no new documents.
    """
    settings = Settings(
        num_tokens=num_tokens,
        kind=("chat" if prompts is not None or has_chat_template(tokenizer) else "text") if kind == "auto" else kind,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        max_user_tokens=max_user_tokens,
        turns=turns,
        batch_size=batch_size,
        documents_per_shard=documents_per_shard,
        heldout=heldout,
    )
    questions = None if prompts is None else _questions(prompts, tokenizer, settings)
    sampler = Sampler(model, tokenizer, settings, questions=questions)
    wanted = Manifest(
        teacher=teacher or model.config.name_or_path or model.config.model_type,
        tokenizer=tokenizer_fingerprint(tokenizer),
        settings={**vars(settings), "teacher_weights": weights_fingerprint(model), **sampler.facts()},
        shards=(),
        complete=False,
    )
    out = Path(out)
    manifest, seen = _begin(out, wanted, overwrite=overwrite)
    while not manifest.complete:
        before = manifest.num_tokens
        documents = _sample_shard(sampler, len(manifest.shards), before, seen, progress)
        shard = _write_shard(out, len(manifest.shards), documents, heldout)
        manifest = replace(manifest, shards=(*manifest.shards, shard))
        manifest = replace(manifest, complete=manifest.num_tokens >= num_tokens)
        manifest.write(out)
        log.info("shard %d: %d documents, %d tokens", shard.index, len(documents), shard.num_tokens)
    return manifest


def _questions(prompts: Source | Sequence[Source], tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Questions:
    if settings.kind != "chat":
        raise InvalidOptionError(f"prompts are answered in conversations: they go with kind chat, not {settings.kind}")
    if settings.turns != 1:
        raise InvalidOptionError("a conversation has as many turns as its prompt: leave turns out")
    questions = read_questions(prompts, tokenizer, chat_format(tokenizer), max_tokens=settings.max_user_tokens)
    if questions.too_long:
        log.warning(
            "left out of %d questions, being longer than %d tokens: %d",
            questions.too_long + len(questions), settings.max_user_tokens, questions.too_long,
        )  # fmt: skip
    return questions


def _begin(out: Path, wanted: Manifest, *, overwrite: bool) -> tuple[Manifest, set[str]]:
    """The manifest to continue from, and the ids of the documents that are there already."""
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file: choose another path")
    if is_synthesized(out) and not overwrite:
        return _resume(out, wanted)
    require_new(out, overwrite=overwrite)
    _remove(out, ("manifest.json", "train-*.jsonl", "heldout-*.jsonl"))
    wanted.write(out)
    return wanted, set()


def _resume(out: Path, wanted: Manifest) -> tuple[Manifest, set[str]]:
    found = Manifest.read(out)
    facts: list[tuple[str, Any, Any]] = [
        ("teacher", found.teacher, wanted.teacher),
        ("tokenizer", found.tokenizer, wanted.tokenizer),
    ]
    names = {**found.settings, **wanted.settings}
    facts += [(name, found.settings.get(name), wanted.settings.get(name)) for name in names]
    changed = [f"{name} was {old}, is now {new}" for name, old, new in facts if old != new]
    if changed:
        raise InvalidOptionError(
            f"{out} was begun with other settings ({'; '.join(changed)}): "
            "use the same ones to continue, another directory, or --overwrite to start anew"
        )
    shards: list[Shard] = []
    seen: set[str] = set()
    for shard in found.shards:
        if not all(file.intact(out) for file in shard.files):
            log.warning("%s: shard %d is damaged; sampling again from there", out, shard.index)
            break
        for file in shard.files:
            seen.update(json.loads(line)["id"] for line in file.verified_lines(out))
        shards.append(shard)
    whole = len(shards) == len(found.shards)
    manifest = replace(found, shards=tuple(shards), complete=found.complete and whole)
    _remove(out, (f".{NAME}.*", ".train-*.jsonl.*", ".heldout-*.jsonl.*"))  # what a killed write left
    return manifest, seen


def _remove(out: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in out.glob(pattern):
            path.unlink()


def _write_shard(out: Path, index: int, documents: Sequence[Document], heldout: float) -> Shard:
    files = []
    for split in ("train", "heldout"):
        rows = [d for d in documents if d.is_heldout(heldout) == (split == "heldout")]
        text = "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
        name = f"{split}-{index:05d}.jsonl"
        atomic_write_text(out / name, text)
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        files.append(ShardFile(name, split, len(rows), sum(map(len, rows)), digest))
    tokens: Counter[str] = Counter()
    for document in documents:
        tokens[document.kind] += len(document)
    return Shard(index, tuple(files), dict(sorted(tokens.items())))


def _sample_shard(
    sampler: Sampler, index: int, tokens_before: int, seen: set[str], progress: Progress | None
) -> list[Document]:
    """The documents of one shard; their ids are added to ``seen``.

    The kinds of text take turns so that each has its share of the tokens to within one document.
    """
    settings = sampler.settings
    asked = sampler.asked(index * settings.documents_per_shard)
    documents: list[Document] = []
    waiting: dict[Kind, list[Document]] = {kind: [] for kind in settings.kinds}
    tokens: Counter[Kind] = Counter()
    empty = 0
    with _own_randomness(settings.seed, index, sampler.device):
        while len(documents) < settings.documents_per_shard:
            total = tokens_before + tokens.total()
            if total >= settings.num_tokens:
                break
            kind = min(settings.kinds, key=lambda kind: tokens[kind])
            if not waiting[kind]:
                rows = _rows_to_draw(sampler, documents, settings.num_tokens - total)
                drawn = sampler.sample(kind, rows, _counting(total, settings.num_tokens, progress), asked=asked)
                waiting[kind] = drawn[::-1]
                empty = 0 if any(document.id not in seen for document in drawn) else empty + 1
                if empty == _MAX_EMPTY_BATCHES:
                    raise MambifyError(
                        f"the teacher repeats itself: the last {empty} batches held no new text; "
                        f"{total} of {settings.num_tokens} tokens were sampled"
                    )
                continue
            document = waiting[kind].pop()
            if document.id in seen:
                continue
            seen.add(document.id)
            documents.append(document)
            tokens[kind] += len(document)
    if progress is not None:
        progress(min(tokens_before + tokens.total(), settings.num_tokens), settings.num_tokens)
    return documents


def _counting(before: int, wanted: int, progress: Progress | None) -> Callable[[int], None] | None:
    """Adds the tokens of each finished document to those there are, for ``progress``."""
    if progress is None:
        return None
    so_far = before

    def count(tokens: int) -> None:
        nonlocal so_far
        so_far += tokens
        progress(min(so_far, wanted), wanted)

    return count


def _rows_to_draw(sampler: Sampler, documents: Sequence[Document], tokens_left: int) -> int:
    """What the shard still needs, in slots; else a full batch, or fewer rows where the rest would be thrown away."""
    settings = sampler.settings
    # Until there is a document to go by, one is taken to be half as long as it may be.
    mean = sum(map(len, documents)) / len(documents) if documents else sampler.longest / 2
    left = min(settings.documents_per_shard - len(documents), int(tokens_left / mean) + 1)
    per_kind = -(-left // len(settings.kinds))
    return max(1, per_kind if sampler.at_once is None else min(sampler.at_once, per_kind))


@contextmanager
def _own_randomness(seed: int, shard: int, device: torch.device) -> Iterator[None]:
    """Seeds torch from (seed, shard) for the block and puts the caller's random state back after it."""
    mixed = hashlib.sha256(f"mambify synthesize {seed} {shard}".encode()).digest()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(mixed[:8], "big") >> 1)
        yield
