"""Train what is missing of a tier: what `spikesink lab` calls. Several runs at once, or each by all of torchrun's."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from spikesink.common import CommandError, check_writable
from spikesink.lab.config import LAB, ConfigError
from spikesink.lab.data import open_task
from spikesink.lab.families import Planned, planned
from spikesink.lab.records import Record, file_of, keep, keep_text, read
from spikesink.lab.train import CHECKPOINT, Machine, Run, TrainingError, can_compile, multiplies_bfloat16, train
from spikesink.model.texts import TextError

DEVICES = ("cpu", "cuda")


def run(args: argparse.Namespace) -> int:
    """Train what `spikesink lab` asks for and is missing; 0 all there, 1 some failed, 2 bad arguments, 130 stopped."""
    folder, build = args.figures / LAB, args.build / LAB
    try:
        machine, plans = _choose_machine(args), _choose_plans(args)
        missing = [plan for plan in plans if not _is_there(plan, folder)]
        if not missing:
            which = f"with {args.only!r} in their name" if args.only else f"of the {args.tier} tier"
            print(f"All runs {which} are there, in {folder / args.tier}.")
            return 0
        for place in (folder, build):  # a run of half an hour must not be lost at its end
            check_writable(place)
        # A text is tokenized once, before several processes ask for it.
        keep_text(open_task(missing[0].config, args.text, args.characters), folder / args.tier)
    except (ConfigError, CommandError, TextError) as error:
        print(error, file=sys.stderr)
        return 2
    train_all = _train_together if "RANK" in os.environ else _side_by_side
    try:
        return 1 if train_all(missing, args, machine) else 0
    except BrokenProcessPool:
        print(
            "A run's process was killed, perhaps for want of memory: try --jobs 1; "
            f"the runs go on from their checkpoints in {build}.",
            file=sys.stderr,
        )
        return 1


def _choose_plans(args: argparse.Namespace) -> list[Planned]:
    plans = list(planned(args.tier))
    chosen = [plan for plan in plans if args.only in plan.name or args.only in plan.label]
    if not chosen:
        names = ", ".join(dict.fromkeys(plan.name for plan in plans))
        raise ConfigError(f"no run of the {args.tier} tier has {args.only!r} in its name; there are: {names}.")
    return chosen


def _choose_machine(args: argparse.Namespace) -> Machine:
    """What the runs are computed with."""
    if args.device not in DEVICES or (args.device == "cuda" and not torch.cuda.is_available()):
        why = "" if args.device not in DEVICES else ", for there is no GPU that torch can use"
        raise ConfigError(f"the lab cannot train on {args.device!r}{why}; give --device {' or '.join(DEVICES)}.")
    compiled = not args.eager and (args.device != "cpu" or can_compile())
    narrow = multiplies_bfloat16(args.device)
    if compiled and args.device == "cpu" and args.precision == "bfloat16" and not narrow:
        raise ConfigError(
            "this processor has no instructions for bfloat16, and compiled gradients in it are NaN: "
            "leave out --precision, or add --eager."
        )
    usual = "bfloat16" if args.device != "cpu" and narrow else "float32"
    return Machine(args.device, args.precision or usual, compiled)


def _is_there(plan: Planned, folder: Path) -> bool:
    """Whether a run's record is there, and is of the configuration that it is to have now."""
    file = file_of(plan, folder)
    return file.exists() and read(file).config == plan.config


def _train_one(plan: Planned, args: argparse.Namespace, machine: Machine, row: int = 0) -> Record | None:
    """Train a run under a bar in a row of the terminal, and keep it; the first process returns its record."""
    task, place = open_task(plan.config, args.text, args.characters), args.build / LAB / plan.tier / plan.label
    place.mkdir(parents=True, exist_ok=True)
    first = machine.rank == 0
    options = {"unit": "step", "position": row, "leave": False, "disable": not first}
    with (
        FileLock(place / ".lock", timeout=0) if first else contextlib.nullcontext(),
        tqdm(desc=plan.label, total=plan.config.steps, **options) as bar,
    ):

        def tell(run: Run) -> None:
            if run.losses:
                bar.set_postfix(loss=f"{run.losses[-1]:.2f}", refresh=False)
            bar.update(run.step - bar.n)

        run = train(plan.config, task, place, machine, tell, kept_every=args.checkpoint_every)
        if not first:
            return None
        record = keep(run, plan, task, machine, args.figures / LAB)
        (place / CHECKPOINT).unlink()
        return record


def _train_together(plans: Sequence[Planned], args: argparse.Namespace, machine: Machine) -> int:
    """One run after the other, each by all processes that torchrun started."""
    torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        for plan in plans:
            _train_one(plan, args, replace(machine, device=device, rank=rank, world=world))
    finally:
        torch.distributed.destroy_process_group()
    return 0


def _side_by_side(plans: Sequence[Planned], args: argparse.Namespace, machine: Machine) -> int:
    """Several runs at once, a process each; returns how many failed."""
    failed, context = 0, multiprocessing.get_context("spawn")
    tqdm.set_lock(context.RLock())  # their bars stand one below the other
    with ProcessPoolExecutor(args.jobs, context, _begin, (tqdm.get_lock(), args.jobs)) as pool:
        running = {pool.submit(_in_process, plan, args, machine): plan for plan in plans}
        try:
            for future in as_completed(running):
                try:
                    tqdm.write(future.result())
                except (TrainingError, OSError) as error:
                    failed += 1
                    tqdm.write(f"{running[future].label}: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _begin(lock, jobs: int) -> None:
    tqdm.set_lock(lock)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as of a command in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it has nothing to tidy up
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs)))


def _leave_with_parent() -> None:
    """A process must not train on when the command that started it was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _in_process(plan: Planned, args: argparse.Namespace, machine: Machine) -> str:
    row = multiprocessing.current_process()._identity[0] - 1
    try:
        record = _train_one(plan, args, machine, row)
    except Timeout:
        return f"{plan.label}: another process is at it"
    final, speed = record.final, record.tokens / record.seconds
    return (
        f"{plan.label}: loss {final['held_out_loss']:.3f}, sink ratio {final['sink_ratio']:.2f}, largest activation "
        f"{final['max_activation']:.0f} ({final['max_first']:.0f} at position 0); {speed:,.0f} tokens a second"
    )
