"""`overnight doctor`: what works here, and how to mend what does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from overnight.agent.cli.options import db_option, format_option, print_rows
from overnight.store.errors import OvernightError

_TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
fp8 = cuda and torch.cuda.get_device_capability() >= (8, 9)
name = torch.cuda.get_device_name() if cuda else "CPU, %d threads" % torch.get_num_threads()
print(json.dumps({"torch": torch.__version__, "device": name, "cuda": cuda, "fp8": fp8}))
"""
MIN_FREE_GIB = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


@click.command()
@click.argument("campaign", required=False)
@db_option
@format_option
def doctor(campaign: str | None, db: str, form: str) -> None:
    """Say what works here, and how to mend what does not; with CAMPAIGN, also what that one needs.

    Exit code 0 when nothing is amiss, 1 otherwise.
    """
    findings = [_python(), _torch(), _disk(db), _database(db), *_plugins()]
    if campaign is not None:
        findings += _campaign(campaign)
    rows = [("ok" if f.ok else "NO", f.what, f.found, f.remedy) for f in findings]
    print_rows(("state", "what", "found", "remedy"), rows, form)
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


def _python() -> Finding:
    return Finding("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")


def _torch() -> Finding:
    try:
        probe = subprocess.run(
            [sys.executable, "-P", "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=120, check=True
        )
        found = json.loads(probe.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        return Finding("torch", False, type(error).__name__, "reinstall torch: `pip install --force-reinstall torch`")
    precisions = "float32" if not found["cuda"] else "bf16, fp8" if found["fp8"] else "bf16"
    return Finding("torch", True, f"{found['torch']} on {found['device']} ({precisions})")


def _disk(db: str) -> Finding:
    folder = Path() if "://" in db else Path(db).absolute().parent
    free = shutil.disk_usage(folder).free / 2**30
    return Finding(
        "disk", free >= MIN_FREE_GIB, f"{free:.1f} GiB free", f"free {MIN_FREE_GIB:g} GiB for data and history"
    )


def _database(db: str) -> Finding:
    from overnight.store.sql_store import SqlStore

    if "://" not in db and not Path(db).exists():
        return Finding("database", True, f"{db} will be made by the first run")
    try:
        store = SqlStore.open(db)
    except OvernightError as error:
        return Finding("database", False, str(error), "see the message")
    names = store.campaigns()
    store.close()
    return Finding("database", True, f"{db}: {len(names)} campaigns")


def _plugins() -> list[Finding]:
    from overnight.agent.proposers.registry import installed_kinds
    from overnight.rails.registry import installed_rails
    from overnight.trainer.registry import installed_trainers

    trainers = [f"{name} ({point.dist.name if point.dist else '?'})" for name, point in installed_trainers().items()]
    kinds = [f"{kind.kind} ({kind.distribution})" for kind in installed_kinds()]
    rails = [f"{point.name} ({point.dist.name if point.dist else '?'})" for point in installed_rails()]
    return [
        Finding("rails", bool(rails), ", ".join(rails), "reinstall overnight"),
        Finding("trainers", bool(trainers), ", ".join(trainers), "reinstall overnight"),
        Finding("proposers", bool(kinds), ", ".join(kinds), "reinstall overnight"),
    ]


def _campaign(where: str) -> list[Finding]:
    """Read the campaign and build its parts; starts no trial."""
    from overnight.agent.campaign import load_campaign
    from overnight.agent.run import host_trainer, proposers_of, rails_of

    try:
        campaign = load_campaign(where)
        host_trainer(campaign, lambda: None)
        rails_of(campaign)
        for proposer in proposers_of(campaign).values():
            proposer.close()
    except OvernightError as error:
        return [Finding("campaign", False, str(error), "see the message")]
    moves = sum(1 for _ in campaign.menu.moves(campaign.menu.default))
    knobs = len(campaign.menu.knobs)
    return [
        Finding("campaign", True, f"{campaign.name}: {knobs} knobs, {moves} first moves, champion {campaign.champion}")
    ]
