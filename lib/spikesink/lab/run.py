"""Train what is missing of a tier: what `make ablations` calls. Alone, several runs at once, or under torchrun."""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from spikesink.cli import SOURCE
from spikesink.common import INTERRUPTED, CommandError, check_writable
from spikesink.lab.config import LAB, Config, ConfigError
from spikesink.lab.data import Task, open_task
from spikesink.lab.families import Planned, planned
from spikesink.lab.records import Record, file_of, keep, keep_text, read
from spikesink.lab.train import CHECKPOINT, Machine, Run, TrainingError, can_compile, multiplies_bfloat16, train
from spikesink.model import texts
from spikesink.model.texts import TextError

DEVICES = ("cpu", "cuda")
POLLED = 0.5  # seconds between looks at what the processes tell


def run(args: argparse.Namespace) -> int:
    """Train what is missing of what the arguments of `spikesink lab` ask for.

    Returns:
        The exit code: 0 all there, 1 some run failed, 2 bad arguments, 130 interrupted.
    """
    folder, build = args.figures / LAB, args.build / LAB
    plans = list(planned(args.tier))
    wanted = [plan for plan in plans if args.only in plan.name or args.only in plan.label]
    if not wanted:
        names = ", ".join(dict.fromkeys(plan.name for plan in plans))
        print(f"no run of the {args.tier} tier has {args.only!r} in its name; there are: {names}.", file=sys.stderr)
        return 2
    missing = [plan for plan in wanted if not _is_there(plan, folder)]
    try:
        machine = _machine(args)
        if not missing:
            if wanted[0].config.task == "text" and args.text != SOURCE and not args.text.startswith("datasets:"):
                texts.read(args.text)  # what is wrong with it is said though it is not needed
            which = f"with {args.only!r} in their name" if args.only else f"of the {args.tier} tier"
            print(f"All runs {which} are there, in {folder / args.tier}.")
            return 0
        for place in (folder, build):  # a run of half an hour must not be lost at its end
            check_writable(place)
        # A text is tokenized once, before several processes ask for it.
        keep_text(_task(missing[0], args), folder / args.tier)
    except (ConfigError, CommandError, TextError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        failed = _together(missing, args, machine) if "RANK" in os.environ else _side_by_side(missing, args, machine)
    except KeyboardInterrupt:
        print(f"Interrupted; the runs go on from their checkpoints in {build} the next time.", file=sys.stderr)
        return INTERRUPTED
    except BrokenProcessPool:
        print(
            f"A run's process was killed, perhaps for want of memory: try --jobs 1; "
            f"the runs go on from their checkpoints in {build}.",
            file=sys.stderr,
        )
        return 1
    return 1 if failed else 0


def _machine(args: argparse.Namespace) -> Machine:
    """What the runs are computed with, of what is asked for."""
    if args.device not in DEVICES or (args.device == "cuda" and not torch.cuda.is_available()):
        there = "" if args.device not in DEVICES else ", for there is no GPU that torch can use"
        raise ConfigError(f"the lab cannot train on {args.device!r}{there}; give --device {' or '.join(DEVICES)}.")
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


def _task(plan: Planned, args: argparse.Namespace) -> Task:
    return _opened(plan.config.task, plan.config.d_vocab, args.text, args.characters)


@cache
def _opened(task: str, d_vocab: int, text: str, characters: int) -> Task:
    """What a process trains on, opened once: all runs of a tier share it, and to find a text takes seconds."""
    return open_task(Config(task=task, d_vocab=d_vocab), text, characters)


def _one(plan: Planned, args: argparse.Namespace, machine: Machine, tell: Callable[[Run], None]) -> Record | None:
    """Train a run and keep it; the first process returns its record."""
    task, place = _task(plan, args), args.build / LAB / plan.tier / plan.label
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock", timeout=0) if machine.rank == 0 else contextlib.nullcontext():
        run = train(plan.config, task, place, machine, tell, kept_every=args.checkpoint_every)
        if machine.rank > 0:
            return None
        record = keep(run, plan, task, machine, args.figures / LAB)
        (place / CHECKPOINT).unlink()
        return record


def _together(plans: Sequence[Planned], args: argparse.Namespace, machine: Machine) -> int:
    """One run after the other, each of all processes that torchrun started."""
    torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    local = int(os.environ["LOCAL_RANK"])
    device = f"cuda:{local}" if args.device == "cuda" else args.device
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    machine = replace(machine, device=device, rank=rank, world=world)
    try:
        for plan in plans:
            with tqdm(total=plan.config.steps, desc=plan.label, unit="step", disable=machine.rank > 0) as bar:
                _one(plan, args, machine, lambda run, bar=bar: bar.update(run.step - bar.n))
    finally:
        torch.distributed.destroy_process_group()
    return 0


def _side_by_side(plans: Sequence[Planned], args: argparse.Namespace, machine: Machine) -> int:
    """Several runs at once, a thread each; returns how many failed."""
    context = multiprocessing.get_context("spawn")
    news, total = context.SimpleQueue(), sum(plan.config.steps * plan.config.batch for plan in plans)
    failed, waiting = 0, list(plans)
    now: dict[str, tuple[int, float]] = {}  # tokens done and the last loss of each run
    before: dict[str, int] = {}  # tokens that were done when it went on from a checkpoint
    with (
        tqdm(total=total, unit="token", unit_scale=True, desc=f"{len(plans)} runs", smoothing=0.02) as bar,
        ProcessPoolExecutor(args.jobs, context, _begin, (news, args.jobs)) as pool,
    ):
        running: dict[Future, Planned] = {}
        while waiting or running:
            while waiting and len(running) < args.jobs:
                plan = waiting.pop(0)
                running[pool.submit(_in_process, plan, args, machine)] = plan
            done, _ = wait(running, timeout=POLLED, return_when=FIRST_COMPLETED)
            while not news.empty():
                label, tokens, loss = news.get()
                now[label] = (tokens, loss)
                if label not in before:
                    before[label] = tokens
                    bar.total -= tokens
            bar.update(sum(tokens - before[label] for label, (tokens, _) in now.items()) - bar.n)
            labels = [plan.label for plan in running.values() if plan.label in now]
            bar.set_postfix_str(", ".join(f"{label} {now[label][1]:.2f}" for label in labels))
            for future in done:
                plan = running.pop(future)
                try:
                    bar.write(future.result())
                except (TrainingError, OSError) as error:
                    failed += 1
                    bar.write(f"{plan.label}: {error}", file=sys.stderr)
    return failed


_news: Any = None  # what a process tells its progress by


def _begin(news: Any, jobs: int) -> None:
    global _news
    _news = news
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as of a command in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it has nothing to tidy up
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs)))


def _leave_with_parent() -> None:
    """A process must not train on when the command that started it was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _in_process(plan: Planned, args: argparse.Namespace, machine: Machine) -> str:
    def tell(run: Run) -> None:
        if run.losses and run.step % max(1, run.config.steps // 200) == 0:
            _news.put((plan.label, run.step * run.config.batch, run.losses[-1]))

    try:
        record = _one(plan, args, machine, tell)
    except Timeout:
        return f"{plan.label}: another process is at it"
    final, speed = record.final, record.tokens / record.seconds
    return (
        f"{plan.label}: loss {final['held_out_loss']:.3f}, sink ratio {final['sink_ratio']:.2f}, largest activation "
        f"{final['max_activation']:.0f} ({final['max_first']:.0f} at position 0); {speed:,.0f} tokens a second"
    )
