"""``tools/predict.py`` with its arguments: what is predicted, and by whom."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial

from spatial_mamba_d2.models.checkpoints.reading import file_sha256
from spatial_mamba_d2.prediction.bulk import Options, predict_files
from spatial_mamba_d2.prediction.drivers import (
    device_of_rank,
    run_processes,
    run_rank,
    run_ray,
    slurm_script,
)
from spatial_mamba_d2.prediction.loading import load_named_predictor
from spatial_mamba_d2.prediction.recording import record_stream
from spatial_mamba_d2.prediction.streams import is_stream
from spatial_mamba_d2.system.cli import log_to_stdout
from spatial_mamba_d2.system.launching import under_torchrun


def run(args: argparse.Namespace) -> None:
    """``tools/predict.py``."""
    drivers = [args.processes > 1, args.slurm is not None, args.ray is not None, under_torchrun()]
    is_shared = any(drivers)
    if is_shared and (args.shard or args.merge):
        raise ValueError(
            "shard (--shard, --merge) must be left out with --processes, --slurm, --ray and "
            "torchrun, which share the work themselves"
        )
    if args.ray is not None and sum(drivers) > 1:
        raise ValueError(
            "ray (--ray) must be left out with --processes, --slurm and torchrun, got "
            f"--ray {args.ray} and one of them"
        )
    if args.processes < 1 or (args.processes > 1 and under_torchrun()):
        raise ValueError(
            f"processes (--processes) must be at least 1, and 1 under torchrun, got "
            f"{args.processes}"
        )
    if any(map(is_stream, args.input)):
        if is_shared or args.shard or args.merge or args.resume:
            raise ValueError(
                "input (--input): a stream or camera is predicted by one process, as it comes; "
                "leave out --resume, --shard, --merge, --processes, --slurm, --ray and torchrun"
            )
        _record(args)
    elif args.max_frames is not None or args.seconds is not None:
        raise ValueError(
            "max_frames, seconds (--max-frames, --seconds) are for a stream or camera, got "
            f"--input {' '.join(args.input)}"
        )
    elif args.slurm is not None:
        print(slurm_script(_without_option(sys.argv, "--slurm"), args.slurm), end="")
    elif under_torchrun():
        args.device = args.device or device_of_rank()
        run_rank(partial(_predict_shard, args))
    elif args.ray is not None:
        log_to_stdout()
        run_ray(partial(_predict_shard, args), args.ray, args.device)
    elif args.processes > 1:
        run_processes(partial(_predict_shard, args), args.processes)
    else:
        _predict(args, _shard(args.shard), merge=args.merge)


def _record(args: argparse.Namespace) -> None:
    """Predict a stream or a camera."""
    log_to_stdout()
    if len(args.input) > 1:
        raise ValueError(
            f"input (--input) must be one stream or camera, or none, got {len(args.input)} inputs "
            "with one among them"
        )
    record_stream(
        args.input[0], args.output, load_named_predictor(args), _options(args),
        max_frames=args.max_frames, max_seconds=args.seconds,
    )  # fmt: skip


def _predict_shard(args: argparse.Namespace, shard: tuple[int, int] | None) -> None:
    """What :mod:`.drivers` calls: predict a shard, or merge."""
    if shard is None and args.ray is not None:
        args.device = "cpu"  # the tasks have the GPUs, and perhaps this machine has none
    _predict(args, shard, merge=shard is None)


def _predict(args: argparse.Namespace, shard: tuple[int, int] | None, *, merge: bool) -> None:
    log_to_stdout()
    options = _options(args, shard, merge=merge)
    predictor = load_named_predictor(args)
    settings = [args.config_file, args.opts, args.optimize, args.calibrate]
    identity = json.dumps([file_sha256(args.weights), *settings])
    predict_files(args.input, args.output, predictor, options, identity=identity)


def _options(
    args: argparse.Namespace, shard: tuple[int, int] | None = None, *, merge: bool = False
) -> Options:
    return Options(
        formats=[name for word in args.format for name in word.split(",") if name],
        score_thresh=args.score_thresh,
        window_px=args.window,
        overlap_px=args.overlap,
        batch_size=args.batch_size,
        resume=args.resume,
        overwrite=args.overwrite,
        shard=shard,
        merge=merge,
    )


def _without_option(words: Sequence[str], option: str) -> list[str]:
    """A command line without an option and its value."""
    kept, is_value = [], False
    for word in words:
        if is_value:
            is_value = False
        elif word == option:
            is_value = True
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return kept


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise ValueError(f"shard (--shard) must be I/N, such as 1/3, got {text!r}")
    return int(number), int(count)
