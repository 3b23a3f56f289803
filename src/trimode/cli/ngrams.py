"""`trimode ngrams`: what a model tends to say, as drafts that cost nothing."""

from pathlib import Path
from typing import Annotated

import typer

from trimode.cli import screen
from trimode.cli.options import ModelName, whole_number
from trimode.errors import DataError, SettingError

__all__ = ["ngrams"]


def ngrams(
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...", help="JSONL, also gzipped: answers as trimode distill writes them, chats or texts."
        ),
    ],
    model: ModelName = "smollm2-135m",
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where the table goes; the model's own directory if left out."
        ),
    ] = None,
    max_tokens: Annotated[str, typer.Option("--max-tokens", metavar="N", help="Longer documents are cut.")] = "4096",
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON on standard output.")] = False,
) -> None:
    """Count what a model says after which few tokens, for drafts that need no forward.

    Mode auto and self_spec with --self-spec-kind lookup draft from the table that lies in a checkpoint's directory; what they draft is
    verified, so answers stay as they are. Documents by the model itself (trimode distill) serve best. An earlier table is replaced;
    trimode convert makes one of its own documents.
    """
    longest = whole_number(max_tokens, "--max-tokens", low=2)
    from trimode.checkpoint import open_checkpoint
    from trimode.checkpoint.ngram_files import NGRAMS, is_table, save_ngrams
    from trimode.checkpoint.presets import PRESETS
    from trimode.text.ngrams import count_ngrams
    from trimode.training.encode import make_encode, read_source
    from trimode.training.recipe import Source

    checkpoint = open_checkpoint(model)
    if output is None and (model in PRESETS or not checkpoint.path.is_dir()):
        raise SettingError(
            f"{model} has no directory of its own, where the table would be found. Make one with trimode convert {model} "
            f"--quantize int8 --output DIR and give --model DIR, or name a file: --output {NGRAMS}."
        )
    target = checkpoint.path / NGRAMS if output is None else Path(output)
    if output == "" or target.is_dir() or not target.parent.is_dir():
        raise SettingError(f"--output must name a file in a directory that is there; got {output!r}.")
    if target.exists() and not is_table(target):
        raise SettingError(f"{target} is no table of n-grams. Choose another place or remove it.")
    skipped: list[str] = []
    given = {"max_tokens": longest, "vocab_size": checkpoint.config.vocab_size, "skip": skipped.append}
    encode = make_encode(checkpoint)
    try:
        documents = [document for file in data for document in read_source(Source(path=file), encode, **given)]
    except DataError as error:
        why = f" The first line that was left out: {skipped[0]}" if skipped else ""
        raise DataError(f"{error}{why}") from None
    table = count_ngrams(((d.ids, d.num_prompt) for d in documents), checkpoint.config.vocab_size)
    save_ngrams(target, table)
    if skipped:
        screen.say(f"{len(skipped):,} lines skipped; the first: {skipped[0]}")
    summary = {
        "output": str(target),
        "documents": len(documents),
        "skipped": len(skipped),
        "contexts": table.num_contexts,
        "bytes": target.stat().st_size,
    }
    if json:
        screen.print_json(summary)
    else:
        screen.say(f"{table.num_contexts:,} contexts of {len(documents):,} documents in {target}")
