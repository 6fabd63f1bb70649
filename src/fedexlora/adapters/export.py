"""What a finished run leaves to its users: one adapter or one full model, with its card."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedexlora.adapters.aggregate import RECORD, compress_adapter
from fedexlora.adapters.card import model_card
from fedexlora.adapters.finished_run import FinishedRun, last_version, read_finished
from fedexlora.adapters.output import check_new, output
from fedexlora.errors import RunError
from fedexlora.exchange.adapter_records import ExportRecord
from fedexlora.peft_bridge.adapter_file import open_adapter
from fedexlora.peft_bridge.export_check import check_export

Kind = Literal["adapter", "merged"]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a run is exported."""

    kind: Kind = "adapter"
    rank: int | None = None
    """The largest rank of a module; the lowest that loses nothing if not given."""
    tolerance: float | None = None
    """The largest relative error of a module."""
    uniform_rank: bool = False
    """Pad all modules to one rank, for servers that read it off the tensors."""
    base: str | None = None
    """For a merged model: the base model's files, if not those that the recipe names."""
    evaluate: bool = False
    """Score what was exported on the run's validation rows."""
    push_to: str | None = None
    """A repository of the hub to upload to."""
    private: bool = True
    """Whether a repository that is new is private."""


def export_run(
    run: str | Path,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ExportRecord:
    """Write a finished run's global model, with a model card.

    The run's own adapter holds the trained adapter and all remainders in one, at the lowest rank
    that loses nothing; it is copied as it is unless a rank or tolerance is given.

    Args:
        run: the run's folder.
        out: the new folder; it must not exist, or be empty.
        options: adapter or merged model, rank, evaluation, upload.
        progress: told of modules, or tensors, done and in all.

    Returns:
        What was written; also stored as ``export.json``.

    Raises:
        InputError: if the run has not ended, or ``out`` or the options cannot be used; ``out`` is
            untouched then.
        ExactnessError: if a module of the adapter is not that of the run's last version.
        RunError: if the upload failed; ``out`` is whole then.
    """
    options = options or ExportOptions()
    run, out = Path(run), Path(out)
    check_new(out)
    finished = read_finished(run)
    with output(out) as folder:
        content = folder / "content"
        record = _write(finished, options, content, progress)
        if options.evaluate:
            from fedexlora.adapters.rescore import rescore

            scored = rescore(finished.recipe, content, merged=options.kind == "merged")
            record = record.model_copy(update={"exported_metrics": scored.metrics})
        merged = options.kind == "merged"
        card = model_card(finished, record, merged=merged, hub=options.push_to)
        (content / "README.md").write_text(card, encoding="utf-8")
        (content / "export.json").write_text(record.model_dump_json(indent=2), encoding="utf-8")
        for path in list(content.iterdir()):
            path.rename(folder / path.name)
        content.rmdir()
    if options.push_to:
        record = record.model_copy(update={"pushed_to": _push(out, options)})
    return record


def _write(
    run: FinishedRun,
    options: ExportOptions,
    content: Path,
    progress: Callable[[int, int], None] | None,
) -> ExportRecord:
    """The adapter or model itself, without records that name folders of this machine."""
    source, error = run.folder.adapter, 0.0
    stated: dict[str, float] = {}
    if options.rank is not None or options.tolerance is not None or options.uniform_rank:
        source = content.with_name("adapter")
        done = compress_adapter(
            run.folder.adapter,
            source,
            rank=options.rank,
            tolerance=options.tolerance,
            uniform_rank=options.uniform_rank,
            progress=progress,
        )
        error = done.error
        stated = {module.module: module.error for module in done.modules}
        (source / RECORD).unlink()
    last = last_version(run)
    worst = check_export(source, last.modules, last.terms, last.dense, stated)
    rank = max(module.rank for module in open_adapter(source).modules.values())
    rounding = 0.0
    if options.kind == "merged":
        from fedexlora.adapters.merge import RECORD as MERGE_RECORD  # it needs transformers
        from fedexlora.adapters.merge import merge_adapter

        merged = merge_adapter(
            source,
            options.base or run.recipe.model.source,
            content,
            revision=None if options.base else run.recipe.model.revision,
            config=run.header["model_config"],
            progress=progress,
        )
        rounding = merged.error
        (content / MERGE_RECORD).unlink()
    else:
        shutil.copytree(source, content)
    if source != run.folder.adapter:
        shutil.rmtree(source)
    return ExportRecord(
        run=run.folder.path.name,
        base=options.base or run.recipe.model.source,
        rounds=len(run.records),
        rank=rank,
        error=error,
        worst_module=worst.module,
        worst_error=worst.error,
        rounding=rounding,
        metrics=run.records[-1].metrics,
        exported_metrics=None,
        pushed_to=None,
    )


def _push(out: Path, options: ExportOptions) -> str:
    """Upload a folder to the hub, with the user's own token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    name = str(options.push_to)
    try:
        repository = api.create_repo(name, private=options.private, exist_ok=True)
        api.upload_folder(
            folder_path=out, repo_id=repository.repo_id, commit_message="Upload by fedexlora"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(
            f"--push {name}: the upload failed: {reason}", [f"everything is in {out}"]
        ) from error
    return str(repository)
