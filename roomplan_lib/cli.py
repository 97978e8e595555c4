"""The `roomplan` command: each subcommand is a few lines over a public function of the library."""

from __future__ import annotations

import sys
from functools import partial, wraps
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Teach a language model to understand rooms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


prepare = typer.Typer(name="prepare", help="Turn downloaded scenes into samples.", no_args_is_help=True)
app.add_typer(prepare)


def command(function=None, *, app: typer.Typer = app):
    """Registers a subcommand whose ValueErrors (wrong input) become one line on stderr and exit status 1."""
    if function is None:
        return partial(command, app=app)
    group = [app.info.name] if app.info.name else []

    @wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            print(f"{' '.join(['roomplan', *group, function.__name__])}: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    return app.command()(guarded)


Params = Annotated[Path, typer.Argument(help="Stage file, e.g. papermill_runs/params/tiny.yaml.")]
RunName = Annotated[str | None, typer.Option(help="Folder under papermill_runs; the stage file's when left out.")]


@command
def rooms(
    output: Annotated[Path, typer.Option(help="Folder for the scenes, in the ARKitScenes 3DOD layout.")],
    num_rooms: Annotated[int, typer.Option(min=1, help="Every fifth goes to Validation.")] = 20,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    num_poses: Annotated[int, typer.Option(min=2, help="Posed views per room, 10 a second.")] = 24,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores when left out.")] = None,
) -> None:
    """Render procedural rooms; rooms that are there already are kept."""
    from roomplan_lib.scenes.rooms import write_rooms

    folders = write_rooms(output, num_rooms, seed, num_poses=num_poses, workers=workers)
    print(f"{len(folders)} rooms in {output}")


@command(app=prepare)
def arkitscenes(
    root: Annotated[Path, typer.Option(help="Folder of scenes in an ARKitScenes layout.")],
    output: Annotated[Path, typer.Option(help="Folder for the JSONL files and their manifests.")],
    split: Annotated[str | None, typer.Option(help="train or val only; both when left out.")] = None,
    num_views: Annotated[int, typer.Option(min=1, help="Views per sample, chosen for coverage.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of wording and choice of questions.")] = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="Scene id to leave out; may be repeated.")] = None,
    skip_broken: Annotated[bool, typer.Option(help="Leave out scenes that cannot be read, and name them.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores when left out.")] = None,
) -> None:
    """Turn ARKitScenes folders, or rooms written like them, into place_anchor and question records."""
    from roomplan_lib.samples.prepare import prepare_arkitscenes

    files = prepare_arkitscenes(
        root, output, split=split, num_views=num_views, seed=seed, exclude=exclude or (), skip_broken=skip_broken,
        workers=workers,
    )  # fmt: skip
    for name, path in files.items():
        print(f"{name}: {path}")


@command
def validate(file: Annotated[Path, typer.Argument(help="JSONL file of samples.")]) -> None:
    """Check every record of a file; exit status 1 when anything is wrong."""
    from roomplan_lib.samples.validate import summarise, validate_file

    faults = validate_file(file)
    print(summarise(file, faults))
    raise typer.Exit(1 if faults else 0)


@command
def train(params: Params, run_name: RunName = None) -> None:
    """Train the run of a stage file; a stopped run goes on, a finished one is kept."""
    from roomplan_lib.config import load_run_config
    from roomplan_lib.training.run import train as train_run

    print(train_run(load_run_config(params, run_name=run_name)))


@command
def predict(
    params: Params,
    run_name: RunName = None,
    checkpoint: Annotated[
        str | None, typer.Option(help='Model folder or checkpoint; "base" = untrained; default: the run\'s newest.')
    ] = None,
    num_scenes: Annotated[int | None, typer.Option(min=0, help="First held-out scenes only; 0 = all.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
) -> None:
    """Answer the held-out samples greedily: with their views, with none, and with another scene's."""
    from roomplan_lib.config import load_run_config
    from roomplan_lib.evaluation.predict import predict_run

    config = load_run_config(params, run_name=run_name)
    print(predict_run(config, checkpoint, num_scenes=num_scenes, max_new_tokens=max_new_tokens, device=device))


@command
def score(
    params: Params,
    run_name: RunName = None,
    predictions: Annotated[Path | None, typer.Option(help="Folder that `predict` printed; the run's for none.")] = None,
) -> None:
    """Score a run's predictions beside their controls; writes scores.json."""
    from roomplan_lib.config import load_run_config
    from roomplan_lib.evaluation.scores import score_run
    from roomplan_lib.viz import scores_table

    print(scores_table(score_run(load_run_config(params, run_name=run_name), predictions)))


if __name__ == "__main__":
    app()
