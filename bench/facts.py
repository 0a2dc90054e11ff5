"""What a measurement was made on and with: it is kept beside every number."""

import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import peers
import torch

import kdfast

ROOT = Path(__file__).parents[1]

# What a measurement depends on, in the repository.
MEASURED_CODE = (
    "kdfast/*.py",
    "kdfast/ops/*.py",
    "kdfast/trainer/*.py",
    "kernels/*.py",
    "csrc/**/*.*",
    "bench/*_peers.py",
    "bench/bench_*.py",
    *(f"bench/{name}.py" for name in ("conftest", "measure", "peers")),
)


@functools.cache
def facts_of(device: str) -> dict[str, object]:
    if device == "cuda":
        name = torch.cuda.get_device_name()
        settings = {
            "driver": ", ".join(nvidia_smi("driver_version")),
            "cuda": torch.version.cuda,
            "capability": list(torch.cuda.get_device_capability()),
        }
    else:
        name = _processor()
        settings = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {
        "device": name,
        **settings,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "backends": list(kdfast.available_backends()),
        "versions": peers.versions(),
        "code": _code(),
    }


def _code() -> str:
    """A fingerprint of everything that is measured, and of what measures it."""
    digest = hashlib.sha256()
    for pattern in MEASURED_CODE:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def nvidia_smi(query: str) -> list[str]:
    """What nvidia-smi says of this process's GPU; nothing where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    # Some virtual machines number their GPU anew: the only one is meant.
    for device in ([f"--id=GPU-{torch.cuda.get_device_properties().uuid}"], []):
        try:
            result = subprocess.run(
                [*command, *device], capture_output=True, text=True, check=False
            )
        except OSError:
            return []
        if result.returncode == 0:
            return result.stdout.partition("\n")[0].split(", ")
    return []


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
