"""The `roomplan` command: each subcommand is a few lines over a public function of the library."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from functools import partial, wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    help="Teach a language model to understand rooms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


prepare = typer.Typer(name="prepare", help="Turn downloaded scenes into samples.", no_args_is_help=True)
app.add_typer(prepare)
download = typer.Typer(name="download", help="Fetch a data set, or tell where its licence is.", no_args_is_help=True)
app.add_typer(download)

benchmark = typer.Typer(name="benchmark", help="Measure what parts of the pipeline cost.", no_args_is_help=True)
app.add_typer(benchmark)


def command(function=None, *, app: typer.Typer = app, name: str = ""):
    """Registers a subcommand whose ValueErrors (wrong input) and OSErrors (a full or read-only disk) become one line on
    stderr and exit status 1.

    name: the subcommand's, the function's own when left out.
    """
    if function is None:
        return partial(command, app=app, name=name)
    name = name or function.__name__
    group = [app.info.name] if app.info.name else []

    @wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
            print(f"{' '.join(['roomplan', *group, name])}: {reason}", file=sys.stderr)
            raise typer.Exit(1) from None

    return app.command(name)(guarded)


Params = Annotated[Path, typer.Argument(help="Stage file, e.g. papermill_runs/params/tiny.yaml.")]
RunName = Annotated[str | None, typer.Option(help="Folder under papermill_runs; the stage file's when left out.")]


DataFolder = Annotated[Path, typer.Option(help="Folder that the files are to lie in.")]


@command
def rooms(
    output: Annotated[Path, typer.Option(help="Folder for the scenes.")],
    num_rooms: Annotated[int, typer.Option(min=1, help="Every fifth is for validation.")] = 20,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    num_poses: Annotated[int, typer.Option(min=2, help="Posed views per room, 10 a second.")] = 24,
    frame_rate: Annotated[
        int | None,
        typer.Option(help="Pictures per second, 10, 20 (default) .. 60; at 10 all have poses. ARKitScenes only."),
    ] = None,
    layout: Annotated[
        Literal["arkitscenes", "scannet"],
        typer.Option(help="ARKitScenes 3DOD, or ScanNet with the files of ScanQA, SQA3D, ScanRefer, LLaVA and others."),
    ] = "arkitscenes",
    unusual: Annotated[
        bool,
        typer.Option(
            "--unusual", help="T and Z shapes, colours unseen elsewhere, 11 to 14 objects; all for validation."
        ),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores when left out.")] = None,
) -> None:
    """Render procedural rooms; rooms that are there already are kept."""
    from roomplan_lib.scenes.rooms import write_rooms, write_scannet_rooms

    if layout == "scannet":
        if unusual:
            raise ValueError("--unusual: rooms in the layout of ScanNet are usual ones; leave one of the two out")
        if frame_rate is not None:
            raise ValueError("--frame-rate: scans in the layout of ScanNet have none; leave one of the two out")
        from roomplan_lib.samples.annotation_files import write_annotations
        from roomplan_lib.samples.conversations import write_conversations

        folders = write_scannet_rooms(output, num_rooms, seed, num_poses=num_poses, workers=workers)
        for path in [*write_annotations(output, seed), *write_conversations(output, seed)]:
            print(path)
    else:
        rate = {} if frame_rate is None else {"frame_rate": frame_rate}
        folders = write_rooms(output, num_rooms, seed, num_poses=num_poses, workers=workers, unusual=unusual, **rate)
    print(f"{len(folders)} rooms in {output}")


@command(app=prepare)
def arkitscenes(
    root: Annotated[Path, typer.Option(help="Folder of scenes in an ARKitScenes layout.")],
    output: Annotated[
        Path,
        typer.Option(help="Folder for a JSONL file per task and split; or FILE.jsonl for all tasks of --split."),
    ],
    split: Annotated[str | None, typer.Option(help="Training or Validation only; both when left out.")] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Any of anchors,qa,lists,negatives,planes,plans; or in place of qa some of its kinds: qa_existence,"
            "qa_count,qa_color,qa_side,qa_nearest,qa_distance."
        ),
    ] = "anchors,qa",
    num_views: Annotated[int, typer.Option(min=1, help="Views per sample.")] = 8,
    strategy: Annotated[str, typer.Option(help="coverage, uniform or random.")] = "coverage",
    stop_ratio: Annotated[float, typer.Option(help="Coverage at which no more views are chosen; 1 = never.")] = 1.0,
    view_sets: Annotated[int, typer.Option(min=1, help="Choices of views per scene; an epoch draws one.")] = 1,
    interpolate: Annotated[bool, typer.Option(help="Also use frames between two poses.")] = False,
    negative_share: Annotated[float, typer.Option(help="Of instructions that name what is not there.")] = 0.25,
    seed: Annotated[int, typer.Option(min=0, help="Of wording, choice of questions and random views.")] = 0,
    exclude: Annotated[list[str] | None, typer.Option(help="Scene id to leave out; may be repeated.")] = None,
    skip_broken: Annotated[bool, typer.Option(help="Leave out scenes that cannot be read, and name them.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores when left out.")] = None,
) -> None:
    """Turn ARKitScenes folders, or rooms written like them, into place_anchor and question records."""
    from roomplan_lib.samples import join_samples
    from roomplan_lib.samples.prepare import prepare_arkitscenes

    one_file = output.suffix == ".jsonl"
    if one_file and split is None:
        raise ValueError(f"{output}: one file holds one split; say --split Training or Validation, or give a folder")
    wanted = tasks.replace(" ", "").split(",")
    if one_file and "qa" in wanted and any(task.startswith("qa_") for task in wanted):
        raise ValueError(f"--tasks {tasks}: qa holds its kinds already, one file would have their questions twice")
    folder = output.with_name(f".{output.stem}") if one_file else output
    files = prepare_arkitscenes(
        root, folder, split=split, tasks=wanted, num_views=num_views, strategy=strategy,
        stop_ratio=stop_ratio, view_sets=view_sets, interpolate=interpolate, negative_share=negative_share, seed=seed,
        exclude=exclude or (), skip_broken=skip_broken, workers=workers,
    )  # fmt: skip
    if one_file:
        join_samples(files.values(), output)
        files = {split: output}
    for name, path in files.items():
        print(f"{name}: {path}")


Split = Annotated[str | None, typer.Option(help="train, val or test, where the file's name does not tell.")]
Seed = Annotated[int, typer.Option(min=0, help="Of wording and of random views.")]
DescriptionFile = Annotated[Path, typer.Option(help="ScanRefer_filtered_<split>.json")]


def _write_annotated(
    annotations,
    output: Annotated[Path, typer.Option(help="JSONL file to write; its manifest and a cache go beside it.")],
    scans: Annotated[
        Path | None, typer.Option(help="Folder of ScanNet scans, pictures exported; records have no views without it.")
    ] = None,
    num_views: Annotated[int, typer.Option(min=1, help="Views per sample.")] = 8,
    strategy: Annotated[
        Literal["coverage", "uniform", "random"], typer.Option(help="How the views are chosen.")
    ] = "coverage",
    stop_ratio: Annotated[float, typer.Option(min=0, max=1, help="Coverage at which there are views enough.")] = 1.0,
    view_sets: Annotated[int, typer.Option(min=1, help="Choices of views per scan, with records of their own.")] = 1,
    shown_only: Annotated[bool, typer.Option(help="Only objects that the views show: never for a test.")] = False,
    skip_missing: Annotated[bool, typer.Option(help="Leave out missing or broken scans, and name them.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores when left out.")] = None,
    seed: Seed = 0,
) -> None:
    from roomplan_lib.samples.annotated import prepare_annotations, summarise

    manifest = prepare_annotations(
        annotations, output, scans=scans, num_views=num_views, strategy=strategy, stop_ratio=stop_ratio,
        view_sets=view_sets, shown_only=shown_only, skip_missing=skip_missing, workers=workers, seed=seed,
    )  # fmt: skip
    print(summarise(manifest))


def annotation_command(read):
    """Registers `prepare <name>`: `read` makes an AnnotationFile of its options, `_write_annotated` has the others."""
    own, shared = (signature(function, eval_str=True).parameters for function in (read, _write_annotated))
    options = {**own, **{name: option for name, option in shared.items() if name != "annotations"}}

    @wraps(read)
    def run(**values):
        chosen = {name: values[name] for name in shared if name != "annotations"}
        _write_annotated(read(**{name: values[name] for name in own}), **chosen)

    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    run.__signature__ = Signature([option.replace(kind=option.KEYWORD_ONLY) for option in options.values()])
    return command(run, app=prepare)


@annotation_command
def sqa3d(
    questions: Annotated[Path, typer.Option(help="v1_balanced_questions_<split>_scannetv2.json")],
    annotations: Annotated[Path, typer.Option(help="v1_balanced_sqa_annotations_<split>_scannetv2.json")],
    split: Split = None,
):
    """SQA3D: questions in a situation, with where its speaker stands and looks."""
    from roomplan_lib.samples.sqa3d import read_sqa3d

    return read_sqa3d(questions, annotations, split)


@annotation_command
def scanqa(qa_file: Annotated[Path, typer.Option(help="ScanQA_v1.0_<split>.json")], split: Split = None):
    """ScanQA: questions with all their answers and the objects they are about."""
    from roomplan_lib.samples.scanqa import read_scanqa

    return read_scanqa(qa_file, split)


@annotation_command
def scanrefer(annotations: DescriptionFile, split: Split = None, seed: Seed = 0):
    """ScanRefer: place an anchor on the one object that is described."""
    from roomplan_lib.samples.grounding import read_scanrefer

    return read_scanrefer(annotations, split, seed)


@annotation_command
def multi3drefer(
    annotations: Annotated[Path, typer.Option(help="multi3drefer_<split>.json")], split: Split = None, seed: Seed = 0
):
    """Multi3DRefer: place anchors on all objects that are described: none, one or several."""
    from roomplan_lib.samples.grounding import read_multi3drefer

    return read_multi3drefer(annotations, split, seed)


@annotation_command
def scan2cap(annotations: DescriptionFile, split: Split = None):
    """Scan2Cap: describe the object in a box; ScanRefer's descriptions of it are the answers."""
    from roomplan_lib.samples.grounding import read_scan2cap

    return read_scan2cap(annotations, split)


@annotation_command
def nr3d(
    annotations: Annotated[Path, typer.Option(help="nr3d.csv, which holds the utterances of all splits.")],
    scene_list: Annotated[Path, typer.Option(help="Official list of the split's scans, e.g. scannetv2_val.txt.")],
    split: Split = None,
    seed: Seed = 0,
):
    """Nr3D: place an anchor on the one object that an utterance means."""
    from roomplan_lib.samples.grounding import read_nr3d

    return read_nr3d(annotations, scene_list, split, seed)


@command(app=prepare)
def instruct(
    layout: Annotated[
        Literal["llava", "sharegpt4v", "docvqa", "chartqa"], typer.Option("--format", help="Layout of the file.")
    ],
    file: Annotated[Path, typer.Option(help="File of conversations or questions, JSON or JSON lines.")],
    images: Annotated[Path, typer.Option(help="Folder that the file's picture names are relative to.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write; its manifest goes beside it.")],
    split: Annotated[str | None, typer.Option(help="train where neither this nor the file's name tells.")] = None,
    history: Annotated[int, typer.Option(min=0, help="Earlier turns that a question repeats at most.")] = 8,
    skip_broken: Annotated[bool, typer.Option(help="Leave out entries that are broken or lack their picture.")] = False,
) -> None:
    """Instruction data about single pictures: LLaVA, ShareGPT4V, DocVQA, ChartQA."""
    from roomplan_lib.samples.instruct import prepare_instruct, summarise

    options = {"layout": layout, "split": split, "history": history, "skip_broken": skip_broken}
    print(summarise(prepare_instruct(file, images, output, **options)))


@command(app=download, name="arkitscenes")
def download_arkitscenes(
    output: Annotated[Path, typer.Option(help="Folder that gets {raw,3dod}/{Training,Validation}/<id>/.")],
    scenes: Annotated[list[str] | None, typer.Option(help="Video id; more of them may follow.")] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="More video ids.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Table with video_id and fold; alone: all of its scenes.")] = None,
    split: Annotated[str | None, typer.Option(help="Training or Validation; needed where no table tells.")] = None,
    dataset: Annotated[Literal["raw", "3dod"], typer.Option(help="Which of Apple's data sets.")] = "raw",
    assets: Annotated[str | None, typer.Option(help="Of the raw data set, parted by commas.")] = None,
    url: Annotated[str | None, typer.Option(help="Another server of the same files.")] = None,
    keep_zip: Annotated[bool, typer.Option(help="Keep the archives after unpacking them.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the steps only, also with --accept-licence.")] = False,
    accept_licence: Annotated[bool, typer.Option(help="You have read Apple's licence and accept it: fetch.")] = False,
) -> None:
    """Print Apple's steps to download ARKitScenes, or run them once the licence is accepted."""
    from roomplan_lib import download as steps

    choice = {"dataset": dataset, "url": url or steps.ARKITSCENES_URL}
    choice["assets"] = assets.split(",") if assets else steps.DEFAULT_ASSETS
    ids = [*(scenes or ()), *(more or ())]
    if accept_licence and not dry_run:
        for folder in steps.download_arkitscenes(output, ids, table=csv, split=split, keep_zip=keep_zip, **choice):
            print(folder)
        return
    print(f"# Licence: {steps.ARKITSCENES_LICENCE}; with --accept-licence these steps are run.")
    metadata = steps.metadata_step(output, dataset, choice["url"])
    folds = steps.arkitscenes_folds(ids, csv, split, metadata.path)
    for line in steps.shell_lines([metadata, *steps.arkitscenes_steps(folds, output, **choice)]):
        print(line)


def _tell_licence(name: str, output: Path) -> None:
    from roomplan_lib import download as steps

    print(getattr(steps, name.upper()).format(output=output))


@command(app=download, name="scannet")
def download_scannet(output: DataFolder = Path("data/raw/scannet")) -> None:
    """Tell how to get ScanNet, and where its files are expected."""
    _tell_licence("scannet", output)


@command(app=download, name="scanqa")
def download_scanqa(output: DataFolder = Path("data/raw/scanqa")) -> None:
    """Tell how to get ScanQA, and where its files are expected."""
    _tell_licence("scanqa", output)


@command(app=download, name="sqa3d")
def download_sqa3d(output: DataFolder = Path("data/raw/sqa3d")) -> None:
    """Tell how to get SQA3D, and where its files are expected."""
    _tell_licence("sqa3d", output)


@command
def actions(
    form: Annotated[Literal["docs", "schema", "seed-schema", "lark", "gbnf"], typer.Argument(help="What to print.")],
    codec: Annotated[Literal["m2", "cm", "rows"], typer.Option(help="Metres, centimetres, or rows.")] = "m2",
    scene: Annotated[str | None, typer.Option(help='Scene id to bind; "*": any or none; none when left out.')] = None,
) -> None:
    """Print the action language: as documentation, as JSON Schema, or as a grammar for constrained decoding."""
    import json

    from roomplan_lib.actions.docs import language_docs
    from roomplan_lib.actions.grammar import grammar, json_schema, seed_schema

    if form == "docs":
        print(language_docs(), end="")
    elif form == "seed-schema":
        print(json.dumps(seed_schema(), indent=1))
    elif form == "schema":
        scene = "*" if scene is None and codec != "rows" else scene
        print(json.dumps(json_schema(scene=scene, codec=codec), indent=1))
    else:
        print(grammar(form, codec=codec, scene=scene), end="")


@command(app=prepare)
def sens(
    scans: Annotated[Path, typer.Option(help="Folder with ScanNet's .sens recordings, in it or below it.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder that gets <scene id>/ for each, beside the scans' folder to be found.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Export every n-th frame.")] = 10,
) -> None:
    """Export ScanNet recordings to pictures, beside them or in a folder; an interrupted export goes on."""
    from roomplan_lib.scenes.scannet import export_sens

    recordings = sorted(scans.rglob("*.sens"))
    if not recordings:
        raise ValueError(f"{scans}: no .sens file in it or below it; `roomplan download scannet` tells how to get them")
    for recording in recordings:
        print(export_sens(recording, output and output / recording.stem, every=every))


@command(app=prepare)
def downloads(
    raw: Annotated[Path, typer.Option(help="Folder of downloads.")] = Path("data/raw"),
    output: Annotated[Path, typer.Option(help="Folder for the prepared files.")] = Path("data/processed"),
    num_views: Annotated[int, typer.Option(min=1, help="Views per sample, chosen for coverage.")] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores when left out.")] = None,
) -> None:
    """Find ARKitScenes folders, ScanNet scans and annotation files under their official names, and prepare them all."""
    from roomplan_lib.samples.downloads import prepare_downloads

    for path in prepare_downloads(raw, output, num_views=num_views, seed=seed, workers=workers):
        print(path)


@command
def validate(file: Annotated[Path, typer.Argument(help="JSONL file of samples.")]) -> None:
    """Check every record of a file; exit status 1 when anything is wrong."""
    from roomplan_lib.samples.validate import check_file, summarise

    report = check_file(file)
    print(summarise(file, report))
    raise typer.Exit(1 if report.faults else 0)


@command
def train(
    params: Params,
    run_name: RunName = None,
    safe: Annotated[bool, typer.Option("--safe", help="Measure memory; train with the micro batch that fits.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Look for anomalies; deterministic; talkative.")] = False,
) -> None:
    """Train the run of a stage file. A run that was stopped or killed goes on from its newest whole checkpoint, without
    being asked to; a finished one is kept. Exit status 75: it was stopped, and has saved."""
    from roomplan_lib.config import load_run_config
    from roomplan_lib.training.launch import launch
    from roomplan_lib.training.status import Preempted

    try:
        print(launch(load_run_config(params, run_name=run_name), safe=safe, debug=debug))
    except Preempted as stopped:
        print(f"roomplan train: {stopped}", file=sys.stderr)
        raise typer.Exit(75) from None  # EX_TEMPFAIL of sysexits.h: run it again


@command
def pretrain(
    params: Annotated[Path, typer.Argument(help="Stage file, e.g. papermill_runs/params/tiny_pretrain_vggt.yaml.")],
    run_name: RunName = None,
) -> None:
    """Train VGGT itself on posed RGB-D scenes; model.vggt_weights reads the run's model folder. It goes on from its
    newest whole checkpoint as `train` does. Exit status 75: it was stopped, and has saved."""
    from roomplan_lib.config import load_pretrain_config
    from roomplan_lib.training.pretrain import pretrain as train_vggt
    from roomplan_lib.training.status import Preempted

    try:
        print(train_vggt(load_pretrain_config(params, run_name=run_name)))
    except Preempted as stopped:
        print(f"roomplan pretrain: {stopped}", file=sys.stderr)
        raise typer.Exit(75) from None  # EX_TEMPFAIL of sysexits.h: run it again


@command
def plan(
    params: Params,
    run_name: RunName = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder of a run of these settings, to set the plan beside it.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="H200, B200, H100 or A100, in place of this machine.")] = None,
    num_processes: Annotated[
        int, typer.Option(min=0, help="Of all nodes together; 0 = as many as would be started here.")
    ] = 0,
    scannet: Annotated[
        bool,
        typer.Option("--scannet", help="As many questions as ScanQA and SQA3D have, in place of the stage's files."),
    ] = False,
) -> None:
    """Print what a run will take before it starts: tokens, memory, TFLOP, questions/s, hours; or also what it took."""
    from roomplan_lib.config import load_run_config
    from roomplan_lib.training import plan as planning
    from roomplan_lib.training.collator import load_samples
    from roomplan_lib.training.metrics import read_metrics
    from roomplan_lib.training.run import make_tokenizer

    config = load_run_config(params, run_name=run_name)
    log = measured and measured / "metrics.jsonl"
    if log and not log.is_file():
        raise ValueError(f"{log} is missing; give --measured the folder of a run that has logged a step")
    workload, vocab_size = planning.SCANNET_QUESTIONS, 0
    if not scannet:
        samples = load_samples(config.data.train_paths)
        tokenizer = make_tokenizer(config, samples)
        workload = planning.measure_workload(samples, tokenizer, config, num_processes)
        vocab_size = len(tokenizer)
    machine = planning.known_gpu(gpu) if gpu else planning.plan_machine(config, workload, vocab_size)
    made = planning.training_plan(config, workload, machine, num_processes=num_processes, vocab_size=vocab_size)
    print(planning.plan_table({config.run_name: made}))
    if log:
        print("\n" + planning.measured_table(made, read_metrics(log)))


@command
def consolidate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a model folder or a checkpoint.")],
    output: Annotated[Path | None, typer.Option(help="Folder to make; beside the weights when left out.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Also the frozen pretrained weights, to carry away.")] = False,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights in the files.")] = "float32",
) -> None:
    """Write what a run has learned as one folder, and its LoRA adapters as peft alone reads them."""
    from roomplan_lib.training.consolidate import consolidate as write_folder

    print(write_folder(run, output, whole=whole, dtype=dtype))


@command
def stage(
    params: Params,
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="training.max_steps=100 ...")] = None,
    safe: Annotated[bool, typer.Option("--safe", help="Measure memory; write the micro batch that fits.")] = False,
) -> None:
    """Write a stage file with changed settings to its run's folder, every field stated; prints the file's path."""
    import yaml

    from roomplan_lib.config import to_dict
    from roomplan_lib.files import write_whole
    from roomplan_lib.training.launch import changed_stage

    config = changed_stage(params, changes or ())
    if safe:
        from roomplan_lib.training.memory import fit_memory

        with redirect_stdout(sys.stderr):
            config = fit_memory(config)
    path = config.run_dir / "stage.yaml"
    write_whole(path, yaml.safe_dump(to_dict(config), sort_keys=False))
    print(path)


@command
def doctor(
    params: Annotated[Path | None, typer.Argument(help="Stage file whose data, weights and folders to check.")] = None,
    run_name: RunName = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Check this machine, and what a stage needs, before a run starts; exit status 1 when something would stop it."""
    from dataclasses import asdict

    from roomplan_lib.config import load_run_config
    from roomplan_lib.doctor import examine

    failed = False
    for check in examine(load_run_config(params, run_name=run_name) if params else None):
        print(json.dumps(asdict(check)) if as_json else check, flush=True)
        failed |= check.status == "fail"
    raise typer.Exit(1 if failed else 0)


@command
def watch(
    runs: Annotated[list[str], typer.Argument(help="Names or folders of runs.")],
    runs_dir: Annotated[Path, typer.Option(help="Where named runs lie.")] = Path("papermill_runs"),
    once: Annotated[bool, typer.Option("--once", help="Print the state and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show what runs are doing until they end: step, losses, rates, memory, time left, newest checkpoint."""
    from roomplan_lib.watch import watch as watch_runs

    watch_runs(runs, runs_dir, once=once, interval=interval)


@command
def cache(
    params: Params,
    part: Annotated[str, typer.Option(help="i/n: the i-th of n parts, from 1, as in a Slurm array.")] = "1/1",
    num_processes: Annotated[int, typer.Option(min=0, help="On this machine; 0 = one per GPU.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="View sets per pass of the encoder.")] = 4,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything again; compute what is damaged.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
) -> None:
    """Fill a stage file's feature cache (data.features.folder) with its views; what is there already is kept."""
    from roomplan_lib.config import load_run_config
    from roomplan_lib.training.cache import fill_cache

    try:
        number, count = map(int, part.split("/"))
    except ValueError:
        raise ValueError(f"--part: expected i/n such as 1/8, got {part!r}") from None
    fill_cache(
        load_run_config(params), part=(number, count), num_processes=num_processes, batch_size=batch_size,
        verify=verify, device=device,
    )  # fmt: skip


@command
def predict(
    params: Params,
    run_name: RunName = None,
    checkpoint: Annotated[
        str | None, typer.Option(help='Model folder or checkpoint; "base" = untrained; default: the run\'s newest.')
    ] = None,
    num_scenes: Annotated[int | None, typer.Option(min=0, help="First held-out scenes only; 0 = all.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    constrained: Annotated[
        str | None, typer.Option(help="Hold actions to the grammar: llguidance, xgrammar or none.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="Make this part of n alone, e.g. 1/4; begun ones go on.")
    ] = None,
    merge: Annotated[int | None, typer.Option(min=1, metavar="N", help="Put n parts together, make nothing.")] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=0, help="Parts at a time, one per GPU for 0, and merged; default: the stage's.")
    ] = None,
) -> None:
    """Answer the held-out samples greedily: with their views, with none, and with another scene's."""
    from roomplan_lib.config import load_run_config
    from roomplan_lib.evaluation.parts import Part
    from roomplan_lib.evaluation.predict import merge_run, predict_run

    if [part, merge, num_processes].count(None) < 2:
        raise ValueError("--part, --merge, --num-processes: give one of them")
    chosen = Part.parse(part) if part else None
    config = load_run_config(params, run_name=run_name)
    choices = {"num_scenes": num_scenes, "max_new_tokens": max_new_tokens, "constrained": constrained}
    if merge:
        print(merge_run(config, checkpoint, num_parts=merge, **choices))
    else:
        print(predict_run(config, checkpoint, device=device, part=chosen, num_processes=num_processes, **choices))


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


@command
def compare(
    predictions: Annotated[list[Path], typer.Argument(help="Folders of runs, or predictions files.")],
    curves: Annotated[Path | None, typer.Option(help="Picture of the runs' training curves to write.")] = None,
) -> None:
    """Scores of several runs' predictions beside one another, a table per task."""
    from roomplan_lib.evaluation.rows import file_scores, find_predictions, run_names
    from roomplan_lib.viz import curve_figure, runs_table

    files = run_names(find_predictions(predictions))
    if curves is not None:
        from roomplan_lib.training.metrics import read_metrics

        metrics = {name: read_metrics(file.parent / "metrics.jsonl") for name, file in files.items()}
        if without := [file.parent for name, file in files.items() if not metrics[name]]:
            raise ValueError(f"{without[0]}: no metrics.jsonl there, so no curve; name folders of trained runs")
        curves.parent.mkdir(parents=True, exist_ok=True)
        curve_figure(metrics).savefig(curves)
    print(runs_table({name: file_scores(file) for name, file in files.items()}))


@command
def export(
    room: Annotated[
        Path,
        typer.Argument(help="CapturedRoom, action text, SpatialLM or SceneScript script, scene folder, predictions."),
    ],
    output: Annotated[Path, typer.Option(help="File to write.")],
    format: Annotated[
        Literal["capturedroom", "usdz", "glb", "svg", "png", "spatiallm", "spatiallm-bins", "scenescript", "actions"],
        typer.Option(help="What to write; svg and png are floor plans."),
    ],
    index: Annotated[int | None, typer.Option(min=0, help="Row of a predictions file.")] = None,
    bins: Annotated[int, typer.Option(min=2, help="Of a SpatialLM script in whole numbers, read or written.")] = 1280,
    codec: Annotated[Literal["m2", "cm", "rows"], typer.Option(help="How an action text writes its numbers.")] = "m2",
) -> None:
    """Write a room for other programs; everything that the format cannot hold is named on stderr."""
    from roomplan_lib.export import export_room, load_room

    notes: list[str] = []
    notes += export_room(load_room(room, notes, index=index, bins=bins, codec=codec), format, output, bins=bins)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(output)


@command(app=benchmark, name="prepare")
def benchmark_prepare(
    num_scenes: Annotated[int, typer.Option(min=5, help="Scans that are made for it.")] = 2000,
    num_poses: Annotated[int, typer.Option(min=2, help="Posed pictures of a scan.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    folder: Annotated[Path | None, typer.Option(help="Where the scans are made and removed again.")] = None,
) -> None:
    """Prepare many small scans: scans per second beside those of reading alone, and the peak of memory."""
    from roomplan_lib.samples import benchmark as bench

    result = bench.benchmark_prepare(num_scenes, num_poses=num_poses, workers=workers, folder=folder)
    print(bench.benchmark_table(result))


@command(app=benchmark)
def pictures(
    picture: Annotated[list[Path] | None, typer.Argument(help="Files to measure; made JPEGs without any.")] = None,
    image_size: Annotated[int, typer.Option(min=14, help="Pixels of the longest side.")] = 448,
    rounds: Annotated[int, typer.Option(min=1, help="In each, all ways take turns.")] = 25,
    output: Annotated[Path | None, typer.Option(help="JSON Lines file for the figures.")] = None,
) -> None:
    """What a picture costs on its way to the encoder, beside the reference's way, and what smaller decoding changes."""
    from roomplan_lib.files import write_whole
    from roomplan_lib.training.picture_benchmark import benchmark_pictures, pictures_table

    rows = list(benchmark_pictures(picture or (), image_size=image_size, rounds=rounds))
    print(pictures_table(rows))
    if output is not None:
        write_whole(output, "".join(json.dumps(row) + "\n" for row in rows))


@command(app=benchmark)
def decoding(
    tokenizer: Annotated[
        str, typer.Option(help="A Qwen3 tokenizer, hub id or folder; the tiny size alone is measured without it.")
    ] = "",
    engine: Annotated[list[str] | None, typer.Option(help="llguidance or xgrammar; may be repeated.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    num_texts: Annotated[int, typer.Option(min=1, help="Random texts per task.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON Lines file for the figures.")] = None,
) -> None:
    """What a grammar costs per token, beside the language model's forward pass, and how many passes it saves."""
    from roomplan_lib.benchmark import benchmark_decoding, decoding_table
    from roomplan_lib.files import write_whole

    rows = list(
        benchmark_decoding(
            tokenizer, engines=engine or ("llguidance",), batch_size=batch_size, num_texts=num_texts, device=device
        )
    )
    print(decoding_table(rows))
    if output is not None:
        write_whole(output, "".join(json.dumps(row) + "\n" for row in rows))


@command(app=benchmark, name="training")
def benchmark_training(
    params: Annotated[
        Path | None,
        typer.Option(help="Stage file whose model and sizes are trained; default: tiny, for cache tiny_rooms."),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="groups, inference, constrained, loop, peers, head, cache, miniature, distributed, checkpoint; "
            "repeatable; default: all."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=10, help="Measured in each process, a multiple of 10.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each variant, taken in turn.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of each process.")] = 1,
    num_rooms: Annotated[int, typer.Option(min=5, help="Procedural rooms that are made to train on.")] = 10,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Of the text model of peers and head, e.g. vocab_size=8192; may be repeated."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON Lines file; the lines are printed as well.")] = None,
    figure: Annotated[Path | None, typer.Option(help="PNG, e.g. figures/benchmark_training.png.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for peers and head.")] = "cpu",
    folder: Annotated[Path | None, typer.Option(help="Where rooms and runs are made and removed again.")] = None,
) -> None:
    """Compare our training and answering with the reference code's loop, other trainers and the bare computation."""
    from roomplan_lib.files import write_whole
    from roomplan_lib.training import benchmark as bench
    from roomplan_lib.training.benchmark.table import benchmark_table

    rows, text = [], bench.parse_sizes(size or ())
    for row in bench.benchmark_training(
        params, parts=part or tuple(bench.VARIANTS), steps=steps, rounds=rounds, threads=threads, num_rooms=num_rooms,
        text=text, device=device, folder=folder,
    ):  # fmt: skip
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(benchmark_table(rows))
    if output is not None:
        write_whole(output, "".join(json.dumps(row) + "\n" for row in rows))
    if figure is not None:
        from roomplan_lib.viz.benchmark import training_benchmark_figure

        figure.parent.mkdir(parents=True, exist_ok=True)
        training_benchmark_figure(rows).savefig(figure)


if __name__ == "__main__":
    app()
