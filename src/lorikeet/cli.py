"""`lorikeet`: one program. Every command imports what it needs when it runs, so `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorikeet import __version__, cli_jobs, cli_keys, cli_up
from lorikeet.cli_flags import ADAPTERS, HTTP, EngineFlags, HttpFlags, SourceFlags, StepFlags, one_of, with_flags
from lorikeet.cli_progress import adapter_folder, progress
from lorikeet.cli_registry import add_commands
from lorikeet.errors import ConfigError, LorikeetError

app = typer.Typer(
    name="lorikeet",
    help="Train many small adapters together on one base model, serve them mixed in one batch, judge each against "
    "the base.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lorikeet {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "lorikeet serve --adapters runs/demo\n\n"
    "lorikeet serve --model ./Qwen2.5-0.5B --adapters ./adapters --port 8080 --kv-memory 2GiB\n\n"
    "curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' "
    '-d \'{"model": "intent", "prompt": "..."}\''
)
@with_flags
def serve(
    adapters: Annotated[
        str | None,
        typer.Option(
            help="Serve every PEFT folder below this one, new ones without a restart.", rich_help_panel=ADAPTERS
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LORIKEET_API_KEY", help="Key that every request must carry.", rich_help_panel=HTTP),
    ] = None,
    *,
    engine: EngineFlags,
    sources: SourceFlags,
    http: HttpFlags,
) -> None:
    """Serve one base and all its adapters over HTTP (OpenAI and LoRAX protocols)."""
    from lorikeet.server.serve import run_serve

    run_serve(http.serving(engine.engine(), sources, adapters=adapters, api_key=api_key))


app.command(epilog=cli_up.EPILOG)(cli_up.up)
app.add_typer(cli_keys.keys_app, name="keys")
app.add_typer(cli_jobs.jobs_app, name="jobs")


@app.command(
    epilog="[bold]Examples[/]\n\nlorikeet train recipes/real.yaml\n\n"
    "lorikeet train recipes/real.yaml --dry-run     audit the data, train nothing\n\n"
    "lorikeet train recipes/real.yaml --resume      go on from the last checkpoints"
)
def train(
    recipe: Annotated[Path, typer.Argument(help="A train.yaml.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the audit of the data and stop.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Train this adapter alone; give it again for more.")] = None,
) -> None:
    """Train the adapters of a recipe together, in shared forward passes over one copy of the base."""
    from lorikeet.train.trainer import run_train

    run_train(recipe, resume=resume, dry_run=dry_run, only=only or ())


@app.command(
    name="eval",
    epilog="[bold]Examples[/]\n\nlorikeet eval recipes/real-eval.yaml --url http://127.0.0.1:8000\n\n"
    "lorikeet eval recipes/real-eval.yaml --adapters runs/real     offline, no server",
)
def evaluate(
    recipe: Annotated[Path, typer.Argument(help="An eval.yaml.")],
    url: Annotated[str | None, typer.Option(help="A running server; without it the offline engine.")] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of the adapters (offline), and of summary.json.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Results file (JSON).")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Judge this task alone; give it again for more.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 32,
    api_key: Annotated[str | None, typer.Option(envvar="LORIKEET_API_KEY", help="Key of the server.")] = None,
) -> None:
    """Judge adapters against the base and a classical baseline, all tasks in one mixed load."""
    from lorikeet.judge import run_eval

    run_eval(
        recipe, url=url, adapters=adapters, output=output, only=only or (), concurrency=concurrency, api_key=api_key
    )


@app.command(
    epilog="[bold]Examples[/]\n\nlorikeet demo            train, serve, judge, stay up\n\n"
    "lorikeet demo --once     the same, then stop"
)
def demo(
    once: Annotated[bool, typer.Option("--once", help="Stop after the table instead of serving on.")] = False,
    port: Annotated[int, typer.Option(help="Port of the server.", min=1, max=65535)] = 8000,
) -> None:
    """The main job on the embedded base: train seven adapters together, serve them, judge them."""
    from lorikeet.demo import run_demo

    run_demo(once=once, port=port)


@app.command(
    epilog="[bold]Examples[/]\n\nlorikeet pretrain recipes/nano.yaml --resume\n\n"
    "lorikeet pretrain recipes/nano.yaml --export build/nano"
)
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="A pretraining recipe.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    until: Annotated[int | None, typer.Option(help="Stop, with a checkpoint, after this many tokens in all.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop, with a checkpoint, after this time.")] = None,
    decay: Annotated[int | None, typer.Option(help="End the run from here, by a decay over so many tokens.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write the last checkpoint as a model folder and stop.")] = None,
) -> None:
    """Train a small base model from text."""
    from lorikeet.train.pretrain import run_pretrain

    run_pretrain(recipe, resume=resume, until=until, minutes=minutes, decay=decay, export=export)


adapters_app = typer.Typer(
    help="Keep adapters in versions, merge them into one, fuse one into its base.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(adapters_app, name="adapters")


@adapters_app.command(
    name="merge",
    epilog="[bold]Examples[/]\n\n"
    "lorikeet adapters merge runs/a runs/b --weights 0.7,0.3 --output runs/ab\n\n"
    "lorikeet adapters merge runs/a runs/b --weights 1,1 --method ties --density 0.5 --output runs/ties\n\n"
    "lorikeet adapters merge runs/a runs/b --weights 1,-0.5 --method svd --svd-rank 8 --output runs/a-minus-b\n\n"
    "lorikeet adapters merge hf://org/a@main s3://bucket/b --weights 1,1 --output runs/ab",
)
def merge_adapters(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Folders of LoRA adapters, or hf://, s3://, gs://, az://, https://; ranks may differ."),
    ],
    weights: Annotated[str, typer.Option(help="A number for each adapter, such as 0.7,0.3; negative ones subtract.")],
    output: Annotated[Path, typer.Option(help="The PEFT folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            help="linear | cat | svd | ties | dare_linear | dare_ties | magnitude_prune; the last four also with _svd. "
            "cat is the exact sum."
        ),
    ] = "linear",
    density: Annotated[float | None, typer.Option(help="Share of the values that pruning methods keep.")] = None,
    majority_sign_method: Annotated[
        str | None, typer.Option(help="total | frequency: how the ties methods elect signs. Default: total.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the dare methods' random pruning.", min=0)] = 0,
    svd_rank: Annotated[int | None, typer.Option(help="Rank of the result of a svd method.", min=1)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is there.")] = False,
) -> None:
    """Combine LoRA adapters with weights into one LoRA adapter."""
    from lorikeet.adapters.merge import METHODS, SIGN_METHODS, merge_folders
    from lorikeet.types import MergeSpec

    try:
        numbers = tuple(float(number) for number in weights.split(","))
    except ValueError:
        expected = "expected numbers such as 0.7,0.3"
        raise ConfigError(f"--weights: found {weights!r}; {expected}", param="--weights") from None
    sign_method = None
    if majority_sign_method is not None:
        sign_method = one_of(majority_sign_method, "--majority-sign-method", *SIGN_METHODS)
    spec = MergeSpec(
        adapters=tuple(adapters),
        weights=numbers,
        method=one_of(method, "--method", *METHODS),
        density=density,
        majority_sign_method=sign_method,
        seed=seed,
        svd_rank=svd_rank,
    )
    folders = [adapter_folder(place) for place in adapters]
    with progress("merging") as report:
        merged = merge_folders(spec, folders, output, force=force, report=report)
    ranks = [len(a) for a, _ in merged.pairs.values()]
    typer.echo(f"{output}: {len(ranks)} modules, rank {min(ranks)} to {max(ranks)}")


@adapters_app.command(
    name="fuse",
    epilog="[bold]Examples[/]\n\n"
    "lorikeet adapters fuse ./Qwen2.5-0.5B-Instruct runs/support --output ./qwen-support\n\n"
    "lorikeet adapters fuse lorikeet-nano runs/demo/intent --output ./nano-intent --dtype float32\n\n"
    "lorikeet adapters fuse ./Qwen2.5-0.5B-Instruct hf://org/support@v2 --output ./qwen-support",
)
def fuse_adapter(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the base; lorikeet-nano is the embedded one.")],
    adapter: Annotated[
        str, typer.Argument(help="PEFT folder of the adapter, or hf://, s3://, gs://, az://, https://.")
    ],
    output: Annotated[Path, typer.Option(help="The model folder to write.")],
    dtype: Annotated[str, typer.Option(help="auto (the base's own) | float32 | bfloat16 | float16")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
    allow_lock_mismatch: Annotated[
        bool, typer.Option("--allow-lock-mismatch", help="Fuse an adapter made for another base or tokenizer.")
    ] = False,
) -> None:
    """Write base + adapter as a plain Hugging Face checkpoint, which needs no adapter any more."""
    from lorikeet.adapters.fuse import BaseModel, fuse
    from lorikeet.model.families import load_spec, read_json
    from lorikeet.model.sources import checkpoint_files, find_model, identify

    wanted = one_of(dtype, "--dtype", "auto", "float32", "bfloat16", "float16")
    folder = find_model(base)
    model = BaseModel(
        folder=folder,
        files=checkpoint_files(folder),
        config=read_json(folder / "config.json"),
        spec=load_spec(folder),
        identity=lambda: identify(folder),
    )
    peft_folder = adapter_folder(adapter)
    with progress("fusing") as report:
        lock = fuse(
            model,
            peft_folder,
            output,
            dtype=None if wanted == "auto" else wanted,
            force=force,
            allow_lock_mismatch=allow_lock_mismatch,
            report=report,
        )
    typer.echo(f"{output}: {Path(base).name} with {Path(adapter).name}")
    if lock is not None and lock.template is not None and lock.template.kind == "prompt":
        typer.echo(f"a checkpoint has no place for the adapter's prompt template; it is: {lock.template.text!r}")


@adapters_app.command(
    name="import-pyreft",
    epilog="[bold]Examples[/]\n\n"
    "lorikeet adapters import-pyreft ./reft_to_share --positions f7+l7 --output runs/reft\n\n"
    "lorikeet adapters import-pyreft results/checkpoint-500 --positions l1 --output runs/reft --force\n\n"
    "lorikeet adapters import-pyreft official_results/run --output runs/reft     positions of its args.json",
)
def import_pyreft_adapter(
    folder: Annotated[Path, typer.Argument(help="What ReftModel.save wrote, or a checkpoint of pyreft's trainer.")],
    output: Annotated[Path, typer.Option(help="The adapter's folder to write.")],
    positions: Annotated[
        str | None,
        typer.Option(help="Tokens of the prompt that were trained, such as f7+l7; pyreft's files do not say it."),
    ] = None,
    last_offset: Annotated[
        int,
        typer.Option(
            help="Tokens at the prompt's end that were left out: 1 where ReftSupervisedDataset and its like were used.",
            min=0,
        ),
    ] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is there.")] = False,
) -> None:
    """Make an adapter of a LoReFT that pyreft saved; linear activation, the same weights for first and last tokens."""
    from lorikeet.adapters.pyreft import import_pyreft

    ranks = import_pyreft(folder, output, positions=positions, last_offset=last_offset, force=force)
    typer.echo(f"{output}: layers {', '.join(map(str, ranks))}, rank {next(iter(ranks.values()))}")


add_commands(app, adapters_app)


@app.command(
    epilog="[bold]Examples[/]\n\nlorikeet simulate recipes/simulate/fleet.yaml\n\n"
    "lorikeet simulate recipes/simulate/noisy.yaml --output noisy.html --json"
)
def simulate(
    scenario: Annotated[Path, typer.Argument(help="A scenario: traffic, replicas, and what a step costs.")],
    output: Annotated[Path, typer.Option(help="The plots, one HTML file.")] = Path("simulation.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Run the real scheduler against a cost model: what would so much traffic on so many replicas be like?"""
    from lorikeet.simulate.run import run_simulate

    run_simulate(scenario, output, as_json)


@app.command(
    epilog="[bold]Examples[/]\n\nlorikeet bench --adapters runs/demo --output bench.json\n\n"
    "lorikeet bench --model ./Qwen2.5-0.5B --adapters ./adapters --max-seqs 32 --output bench.json"
)
@with_flags
def bench(
    output: Annotated[Path, typer.Option(help="Where the measured steps go (JSON).")],
    adapters: Annotated[Path | None, typer.Option(help="PEFT folders below this one take part, 64 at most.")] = None,
    repeats: Annotated[int, typer.Option(help="How often everything is measured.", min=1)] = 1,
    *,
    step: StepFlags,
) -> None:
    """Measure the steps of this machine, for scenarios whose cost is `fitted`. Let nothing else run beside it."""
    from lorikeet.bench import run_bench

    run_bench(step.engine(), adapters=adapters, output=output, repeats=repeats)


def main() -> None:
    """Entry point: what a user did wrong is a message and exit code 2, never a traceback."""
    try:
        app()
    except LorikeetError as error:
        from rich.console import Console

        console = Console(stderr=True)
        console.print(f"[bold red]error[/] ({error.code})", error.message, markup=True, highlight=False, soft_wrap=True)
        if error.hint:
            console.print("[bold]hint[/]", error.hint, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
